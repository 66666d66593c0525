"""The analyses that a report can have, in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmask.errors import unknown
from fastmask.reports import conflicts, crossing, masks, scores
from fastmask.reports.folders import Study
from fastmask.reports.sections import Gathered

__all__ = ["ANALYSES", "Analysis", "chosen"]


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: by which it is asked for.
        title: its heading.
        shows: what it shows, in one sentence.
        gather: adds to what was found in a study; raises `SkipError` where it does not apply.
    """

    name: str
    title: str
    shows: str
    gather: Callable[[Study, Gathered], None]


ANALYSES = (
    Analysis(
        "effect",
        "Effect of each method",
        "What each method does to each language's score, against the full network and against random masks of the same "
        "sizes, and what of it is inside the noise.",
        scores.effect,
    ),
    Analysis(
        "overlap",
        "Overlap of masks",
        "How much the languages' subnetworks have in common, beside random masks of the same sizes.",
        masks.overlap,
    ),
    Analysis(
        "heads",
        "Use of heads and neurons",
        "How many languages own each head or neuron, and how many units all, one or none of them own.",
        masks.use,
    ),
    Analysis(
        "conflict",
        "Gradient conflict",
        "Whether the languages' gradients pull the shared parameters the same way, beside how far one language's "
        "gradients agree with themselves.",
        conflicts.conflict,
    ),
    Analysis(
        "cross",
        "Cross-evaluation",
        "How well each language is parsed by every language's subnetwork, and whether its own is the best.",
        crossing.cross,
    ),
    Analysis(
        "typology",
        "Typology",
        "Whether unseen languages gain more, the nearer they are to a training language.",
        scores.typology,
    ),
    Analysis(
        "ablation",
        "Ablation of single heads",
        "What each head is worth to each language, and whether the importance score foresees it.",
        crossing.ablation,
    ),
    Analysis(
        "dynamics",
        "Dynamics of masks",
        "How dynamic masks move in training: what changes, how far they get, whether related languages' come together.",
        masks.dynamics,
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
