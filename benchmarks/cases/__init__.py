"""What can be measured; `CASES` names them."""

from __future__ import annotations

from benchmarks.cases.case import Case
from benchmarks.cases.encoder import Encoder, Episode, Step
from benchmarks.cases.op import Op

CASES: dict[str, type[Case]] = {case.name: case for case in (Op, Encoder, Step, Episode)}
