"""fastmask: per-language subnetworks of one shared model, trained and run at the cost of the live part.

Names are looked up when they are first used: who only asks for a version, or for help, does not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmask import analysis, unseen
    from fastmask.deltas import Delta
    from fastmask.discovery import discover
    from fastmask.discovery.scores import importance
    from fastmask.dynamic import DynamicSubnetworks
    from fastmask.linear import MaskedLinear, masked_linear, sparse_update_linear
    from fastmask.masks import Mask
    from fastmask.meta import MetaLearner
    from fastmask.models.attach import attach, detach, freeze_unmasked, language, set_language
    from fastmask.models.editing import add_language, remove_language
    from fastmask.models.families import Family, Projections, register_family
    from fastmask.models.languages import LanguageCollator
    from fastmask.models.one_language import extract, merge, summary
    from fastmask.models.saving import from_pretrained, save_pretrained
    from fastmask.optim import LiveAdamW
    from fastmask.subnetworks import Subnetworks
    from fastmask.traced import decompositions

__version__ = "0.1.0"

_WHERE = {
    "fastmask.traced": ("decompositions",),
    "fastmask.deltas": ("Delta",),
    "fastmask.discovery": ("discover", "importance"),
    "fastmask.dynamic": ("DynamicSubnetworks",),
    "fastmask.linear": ("MaskedLinear", "masked_linear", "sparse_update_linear"),
    "fastmask.masks": ("Mask",),
    "fastmask.meta": ("MetaLearner",),
    "fastmask.models.attach": ("attach", "detach", "freeze_unmasked", "language", "set_language"),
    "fastmask.models.editing": ("add_language", "remove_language"),
    "fastmask.models.families": ("Family", "Projections", "register_family"),
    "fastmask.models.languages": ("LanguageCollator",),
    "fastmask.models.one_language": ("extract", "merge", "summary"),
    "fastmask.models.saving": ("from_pretrained", "save_pretrained"),
    "fastmask.optim": ("LiveAdamW",),
    "fastmask.subnetworks": ("Subnetworks",),
}

__all__ = [
    "Delta", "DynamicSubnetworks", "Family", "LanguageCollator", "LiveAdamW", "Mask", "MaskedLinear", "MetaLearner",
    "Projections", "Subnetworks", "add_language", "analysis", "attach", "decompositions", "detach", "discover",
    "extract", "freeze_unmasked", "from_pretrained", "importance", "language", "masked_linear", "merge",
    "register_family", "remove_language", "save_pretrained", "set_language", "sparse_update_linear", "summary",
    "unseen",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("analysis", "unseen"):
        return importlib.import_module(f"fastmask.{name}")
    for module, names in _WHERE.items():
        if name in names:
            found = getattr(importlib.import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'fastmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
