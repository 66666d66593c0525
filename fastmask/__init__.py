"""fastmask: per-language subnetworks of one shared model, trained and run at the cost of the live part."""

from fastmask import analysis, unseen
from fastmask.discovery import discover
from fastmask.dynamic import DynamicSubnetworks
from fastmask.linear import MaskedLinear, masked_linear
from fastmask.masks import Mask
from fastmask.meta import MetaLearner
from fastmask.models import LanguageCollator, attach, detach, language, set_language
from fastmask.optim import LiveAdamW
from fastmask.subnetworks import Subnetworks

__version__ = "0.1.0"

__all__ = [
    "DynamicSubnetworks",
    "LanguageCollator",
    "LiveAdamW",
    "Mask",
    "MaskedLinear",
    "MetaLearner",
    "Subnetworks",
    "analysis",
    "attach",
    "detach",
    "discover",
    "language",
    "masked_linear",
    "set_language",
    "unseen",
]
