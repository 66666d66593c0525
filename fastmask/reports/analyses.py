"""The analyses that a report can have, in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmask.errors import unknown
from fastmask.reports import ablating, along, conflicts, crossing, masks, scores
from fastmask.reports.folders import Study
from fastmask.reports.jobs import Options, Plan

__all__ = ["ANALYSES", "Analysis", "chosen"]


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: by which it is asked for.
        title: its heading.
        shows: what it shows, in one sentence.
        plans: say what there is to do for a study; they raise `SkipError` where it does not apply.
    """

    name: str
    title: str
    shows: str
    plans: tuple[Callable[[Study, Options], Plan], ...]


ANALYSES = (
    Analysis(
        "overlap",
        "Overlap of masks",
        "How much the languages' subnetworks have in common, beside random masks of the same sizes.",
        (masks.overlap,),
    ),
    Analysis(
        "heads",
        "Use of heads and neurons",
        "How many languages own each head or neuron, and how many units all, one or none of them own.",
        (masks.heads,),
    ),
    Analysis(
        "conflict",
        "Gradient conflict",
        "Whether the languages' gradients pull the shared parameters the same way.",
        (conflicts.conflict, along.along),
    ),
    Analysis(
        "cross",
        "Cross-evaluation",
        "How well each language is parsed by every language's subnetwork, and whether its own is the best.",
        (crossing.cross,),
    ),
    Analysis(
        "typology",
        "Typology",
        "Whether unseen languages gain more, the nearer they are to a training language.",
        (scores.typology,),
    ),
    Analysis(
        "ablation",
        "Ablation of single heads",
        "What each head is worth to each language, and whether the importance score foresees it.",
        (ablating.ablation,),
    ),
    Analysis(
        "dynamics",
        "Dynamics of masks",
        "How dynamic masks move in training: what changes, how far they get, whether related languages' come together.",
        (masks.dynamics,),
    ),
    Analysis(
        "effect",
        "Effect of each method",
        "What each method does to each language's score, and what of it is inside the noise.",
        (scores.effect,),
    ),
)


def chosen(names: Sequence[str] | None) -> list[Analysis]:
    """The analyses of these names, all for None, in the report's order.

    Raises:
        FastmaskKeyError: an unknown name; the nearest are given.
    """
    known = [analysis.name for analysis in ANALYSES]
    for name in names or ():
        if name not in known:
            raise unknown("analysis", name, known)
    return [analysis for analysis in ANALYSES if names is None or analysis.name in names]
