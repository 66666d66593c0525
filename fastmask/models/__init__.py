"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows how projections are called, `structure` finds a model's heads and neurons by that, `layers` is the
masked layer, `building` makes those of a model, `proof` tries them before they are put in, `routing` carries the
languages of a batch to them, `attach` puts all together.
"""

from fastmask.models.attach import attach, detach, language
from fastmask.models.families import Family, Projections, register_family

__all__ = ["Family", "Projections", "attach", "detach", "language", "register_family"]
