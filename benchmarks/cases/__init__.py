"""What can be measured, one file a case; `CASES` names them."""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.discovery import Discovery
from benchmarks.cases.encoder import Attention, Encoder, Inference
from benchmarks.cases.episode import Episode
from benchmarks.cases.finetune import Finetune
from benchmarks.cases.op import Layer, Op
from benchmarks.cases.optimizer import Optimizer
from benchmarks.cases.step import Step
from fastmask.errors import unknown

__all__ = ["CASES", "Case", "case_of"]

CASES: dict[str, type[Case]] = {
    case.name: case
    for case in (Op, Layer, Attention, Encoder, Inference, Step, Finetune, Episode, Discovery, Optimizer)
}


def case_of(name: str) -> type[Case]:
    """A case by its name.

    Raises:
        KeyError: there is none; the message gives the nearest names.
    """
    if name not in CASES:
        raise unknown("case", name, CASES)
    return CASES[name]
