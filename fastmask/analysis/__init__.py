"""What masks and methods do to a model: tidy tables and pictures, for any attached model and any loss.

Every function returns a `Result` with `.table` (pandas), `.more` (further tables), `.caption` and `.figure()`
(matplotlib, no display needed). Each is computed beside its control: random masks of the same sizes, halves of one
language's sentences, permutations of names.
"""

# The modules have other names than their functions: a submodule that is imported becomes an attribute of its package.
from fastmask.analysis.ablations import ablation
from fastmask.analysis.conflict import gradient_conflict
from fastmask.analysis.effects import effect
from fastmask.analysis.movement import dynamics
from fastmask.analysis.result import Result
from fastmask.analysis.sharing import overlap, unit_use
from fastmask.analysis.transfer import cross_evaluation, typology

__all__ = [
    "Result", "ablation", "cross_evaluation", "dynamics", "effect", "gradient_conflict", "overlap", "typology",
    "unit_use",
]  # fmt: skip
