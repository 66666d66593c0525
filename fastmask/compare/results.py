"""What a job of a comparison leaves: its ``result.json``."""

from __future__ import annotations

import json
from typing import Any

from fastmask.compare.plan import Job, Plan
from fastmask.files import read_json, write_text

__all__ = ["RESULT_FILE", "is_done", "read_result", "write_result"]

RESULT_FILE = "result.json"


def is_done(plan: Plan, job: Job | str) -> bool:
    """Whether a job's result is there."""
    return (plan.folder(job) / RESULT_FILE).is_file()


def read_result(plan: Plan, job: Job | str) -> dict[str, Any]:
    """The result of a job that is done; see `fastmask.compare.cells.Runner.run`.

    Raises:
        FileError: it is damaged.
    """
    result: dict[str, Any] = read_json(plan.folder(job) / RESULT_FILE)
    return result


def write_result(plan: Plan, job: Job, result: dict[str, Any]) -> None:
    """Mark a job as done, whole or not at all."""
    write_text(plan.folder(job) / RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False))
