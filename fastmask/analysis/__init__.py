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
    from fastmask.analysis.effects import effect
    from fastmask.analysis.movement import dynamics
    from fastmask.analysis.result import Result
    from fastmask.analysis.sharing import overlap, unit_use
    from fastmask.analysis.transfer import cross_evaluation, specificity, typology

# The modules have other names than their functions: a submodule that is imported becomes an attribute of its package.
_WHERE = {
    "ablation": "ablations", "cross_evaluation": "transfer", "dynamics": "movement", "effect": "effects",
    "gradient_conflict": "conflict", "overlap": "sharing", "Result": "result",
    "specificity": "transfer", "typology": "transfer", "unit_use": "sharing",
}  # fmt: skip

__all__ = [
    "Result", "ablation", "cross_evaluation", "dynamics", "effect", "gradient_conflict", "overlap", "specificity",
    "typology", "unit_use",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
