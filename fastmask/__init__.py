"""fastmask: per-language subnetworks of one shared model, trained and run at the cost of the live part."""

from fastmask import analysis, unseen
from fastmask.decomposed import decompositions
from fastmask.deltas import Delta
from fastmask.discovery import discover
from fastmask.dynamic import DynamicSubnetworks
from fastmask.linear import MaskedLinear, masked_linear, sparse_update_linear
from fastmask.masks import Mask
from fastmask.meta import MetaLearner
from fastmask.models import (
    Family,
    LanguageCollator,
    Projections,
    add_language,
    attach,
    detach,
    extract,
    freeze_unmasked,
    from_pretrained,
    language,
    merge,
    register_family,
    remove_language,
    save_pretrained,
    set_language,
    summary,
)
from fastmask.optim import LiveAdamW
from fastmask.subnetworks import Subnetworks

__version__ = "0.1.0"

__all__ = [
    "Delta",
    "DynamicSubnetworks",
    "Family",
    "LanguageCollator",
    "LiveAdamW",
    "Mask",
    "MaskedLinear",
    "MetaLearner",
    "Projections",
    "Subnetworks",
    "add_language",
    "analysis",
    "attach",
    "decompositions",
    "detach",
    "discover",
    "extract",
    "freeze_unmasked",
    "from_pretrained",
    "language",
    "masked_linear",
    "merge",
    "register_family",
    "remove_language",
    "save_pretrained",
    "set_language",
    "sparse_update_linear",
    "summary",
    "unseen",
]
