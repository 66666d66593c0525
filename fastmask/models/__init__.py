"""Putting subnetworks on Hugging Face models: `attach`, `detach`, `language`.

`families` knows how projections are called, `structure` finds a model's heads and neurons by that, `layers` is the
masked layer, `building` makes those of a model, `proof` tries them before they are put in. `language_arguments` knows
what a call says about languages, `entry` takes that from calls, `routing` carries it to the layers. `attach` puts all
together.
"""

from fastmask.models.attach import attach, detach, freeze_unmasked, language, set_language
from fastmask.models.collator import LanguageCollator
from fastmask.models.counting import summary
from fastmask.models.editing import add_language, remove_language
from fastmask.models.exporting import extract, merge
from fastmask.models.families import Family, Projections, register_family
from fastmask.models.saving import from_pretrained, save_pretrained

__all__ = [
    "Family",
    "LanguageCollator",
    "Projections",
    "add_language",
    "attach",
    "detach",
    "extract",
    "freeze_unmasked",
    "from_pretrained",
    "language",
    "merge",
    "register_family",
    "remove_language",
    "save_pretrained",
    "set_language",
    "summary",
]
