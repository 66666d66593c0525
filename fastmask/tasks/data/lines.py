"""JSON lines in, the same lines with predictions out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastmask.files import FileError
from fastmask.tasks.data.conllu import write_texts

if TYPE_CHECKING:
    from fastmask.tasks.task import Task

__all__ = ["CHUNK", "PREDICTION", "predicted_lines"]

CHUNK = 512  # lines that are in memory at a time
PREDICTION = "prediction"


def predicted_lines(task: Task, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Read JSON lines, write each with one more field, "prediction"; return how many there are.

    Args:
        task: its predictions are what JSON can hold.
        source: a UTF-8 file, a pipe or ``/dev/stdin``; blank lines are left out.
        target: a regular file appears under its name once it is complete; may be `source`, a pipe or ``/dev/stdout``.

    Raises:
        FileError: a line that is not a JSON object in UTF-8, with its number; or there is no line.
        OSError: the source cannot be read, or the target not written.
    """
    return write_texts(target, _predicted(task, _rows(source)))


def _predicted(task: Task, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    while chunk := list(itertools.islice(rows, CHUNK)):
        examples = task.examples(chunk)
        for row, prediction in zip(chunk, task.predict(examples), strict=True):
            yield json.dumps({**row, PREDICTION: prediction}, ensure_ascii=False) + "\n"


def _rows(source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    any_row = False
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{os.fspath(source)}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # not JSON, or not UTF-8
                raise FileError(where, f"is not JSON: {error} (expected one object on each line)") from None
            if not isinstance(row, dict):
                raise FileError(where, f"is {str(row)[:40]!r} (expected a JSON object, a name and a value for each)")
            any_row = True
            yield row
    if not any_row:
        raise FileError(source, "has no line (expected a JSON object on each)")
