"""What can be measured, one file a case; `CASES` names them."""

from __future__ import annotations

from benchmarks.cases.case import DENSE, Case
from benchmarks.cases.encoder import Encoder
from benchmarks.cases.episode import Episode
from benchmarks.cases.op import Op
from benchmarks.cases.step import Step

__all__ = ["CASES", "DENSE", "Case"]

CASES: dict[str, type[Case]] = {case.name: case for case in (Op, Encoder, Step, Episode)}
