"""What a job of a comparison leaves: its ``result.json``."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from fastmask.compare.plan import Job, Plan
from fastmask.files import Record, read_json, write_text

__all__ = ["RESULT_FILE", "CellResult", "Score", "is_done", "read_result", "write_result"]

RESULT_FILE = "result.json"

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

    day: str
    made_by: str
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


def is_done(plan: Plan, job: Job | str) -> bool:
    """Whether a job's result is there."""
    return (plan.folder(job) / RESULT_FILE).is_file()


def read_result(plan: Plan, job: Job | str) -> dict[str, Any]:
    """The result of a job that is done.

    Raises:
        FileError: it is damaged.
    """
    result: dict[str, Any] = read_json(plan.folder(job) / RESULT_FILE)
    return result


def write_result(plan: Plan, job: Job, result: dict[str, Any]) -> None:
    """Mark a job as done, whole or not at all."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(plan.folder(job) / RESULT_FILE, text, follow=False)
