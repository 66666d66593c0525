"""What a cell of a comparison leaves in its ``result.json``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fastmask.files import Record

__all__ = ["CellResult", "Score"]

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Score(Record):
    """One score of one language; see `fastmask.compare.scoring.Scorer.scores`."""

    language: str
    condition: str
    choice: str
    subnetwork: str
    support_set: Count | None
    steps: Count
    score: Number
    scores: dict[str, Number]
    words: Count


class CellResult(Record):
    """All of a cell that is done; see `fastmask.compare.cells.Runner.run`."""

    seconds: Seconds
    resumed: bool
    training_seconds: Seconds
    scoring_seconds: Seconds
    outer_steps: Count
    gradient_passes: Count
    sentences: Count
    words_per_second: Seconds
    scouting_share: float | None
    density: dict[str, float] | None
    scores: list[Score]
