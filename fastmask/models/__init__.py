"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows how projections are called, `structure` finds a model's heads and neurons by that, `layers` is the
masked layer, `building` makes those of a model, `proof` tries them before they are put in. `language_arguments` knows
what a call says about languages, `entry` takes that from calls, `routing` carries it to the layers. `attach` puts all
together.
"""

from fastmask.models.attach import attach, detach, language

__all__ = ["attach", "detach", "language"]
