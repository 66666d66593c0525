"""What masks and methods do to a model: tidy tables and pictures, for any attached model and any loss.

Every function returns a `Result` with `.table` (pandas), `.more` (further tables), `.caption` and `.figure()`
(matplotlib, no display needed). Each is computed beside its control: random masks of the same sizes, halves of one
language's sentences, permutations of names.

Nothing is imported before it is asked for: `import fastmask` stays free of pandas, scipy and matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmask.analysis.ablations import ablation
    from fastmask.analysis.conflict import gradient_conflict
    from fastmask.analysis.crossing import cross_evaluation
    from fastmask.analysis.effects import effect
    from fastmask.analysis.movement import dynamics
    from fastmask.analysis.overlaps import overlap
    from fastmask.analysis.result import Result
    from fastmask.analysis.transfer import typology
    from fastmask.analysis.use import unit_use

# The modules have other names than their functions: a submodule that is imported becomes an attribute of its package.
_MODULES = {
    "Result": "result",
    "ablation": "ablations",
    "cross_evaluation": "crossing",
    "dynamics": "movement",
    "effect": "effects",
    "gradient_conflict": "conflict",
    "overlap": "overlaps",
    "typology": "transfer",
    "unit_use": "use",
}

__all__ = [
    "Result", "ablation", "cross_evaluation", "dynamics", "effect", "gradient_conflict", "overlap", "typology",
    "unit_use",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
