"""Predicting: batches of like lengths, cut where padding would cost more than one more batch; files chunk by chunk."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastmask.files import FileError, StrPath
from fastmask.tasks.data.conllu import Sentence, read_texts, with_columns, write_texts

if TYPE_CHECKING:
    from fastmask.tasks.task import Task

CHUNK = 512  # examples of a file that are in memory at a time
# Positions with which a batch keeps the device busy; and how much of a larger one may be padding.
ENOUGH = {"cpu": 256, "gpu": 8192}
PADDING = 0.1


def like_lengths(lengths: np.ndarray, most: int, device: torch.device) -> Iterator[np.ndarray]:
    """Rows of each batch, int64, from short examples to long ones.

    A hundred sentences of a treebank in batches of 64 are two fifths padding, which is computed like words.

    Args:
        lengths: positions of each example, int [n].
        most: examples of a batch, at most.
        device: where they are computed: a GPU wants larger batches, and minds padding less than launches.
    """
    enough = ENOUGH["cpu" if device.type == "cpu" else "gpu"]
    order = np.argsort(lengths, kind="stable")
    begin = positions = 0
    for end, row in enumerate(order.tolist()):
        size, longest = end - begin, int(lengths[row])
        padded = (size + 1) * longest
        wasteful = positions >= enough and padded > (positions + longest) / (1 - PADDING)
        if size and (size == most or wasteful):
            yield order[begin:end]
            begin, positions = end, 0
        positions += longest
    if len(order):
        yield order[begin:]


def predicted_lines(task: Task, source: StrPath, target: StrPath) -> int:
    """Read JSON lines, write each with one more field, "prediction"; return how many there are.

    Args:
        task: its predictions are what JSON can hold.
        source: a UTF-8 file, a pipe or ``/dev/stdin``; blank lines are left out.
        target: a regular file appears under its name once it is complete; may be `source`, a pipe or ``/dev/stdout``.

    Raises:
        FileError: a line that is not a JSON object in UTF-8, with its number, or that the task cannot read; or there is
            no line.
        OSError: the source cannot be read, or the target not written.
    """

    def predicted() -> Iterator[str]:
        rows, before = rows_of_lines(source), 0
        while chunk := list(itertools.islice(rows, CHUNK)):
            for row, prediction in zip(chunk, task.predict(examples_of(chunk, before)), strict=True):
                yield json.dumps({**row, "prediction": prediction}, ensure_ascii=False) + "\n"
            before += len(chunk)

    def examples_of(chunk: list[dict[str, Any]], before: int) -> Any:
        try:
            return task.examples(chunk)
        except (ValueError, KeyError):
            for number, row in enumerate(chunk, start=before + 1):  # which one it was
                try:
                    task.examples([row])
                except (ValueError, KeyError) as error:
                    raise FileError(f"{os.fspath(source)}, row {number}", str(error)) from None
            raise

    return write_texts(target, predicted())


def predicted_sentences(
    source: StrPath, target: StrPath, predict: Callable[[list[Sentence]], Iterable[Mapping[int, Sequence[str]]]]
) -> int:
    """Read CoNLL-U, write it with what `predict` says of some columns of each sentence; return how many there are.

    All else stays byte for byte, line endings and a byte order mark included. The file may be of any length.

    Args:
        source: UTF-8 CoNLL-U, a file or ``/dev/stdin``; HEAD and DEPREL may hold anything.
        target: as in `predicted_lines`.
        predict: of some sentences, for each the new values of its words by column.

    Raises:
        ConlluError: the source is not CoNLL-U.
        OSError: it cannot be read, or the target not written.
    """

    def predicted() -> Iterator[str]:
        sentences = read_texts(source, require_tree=False)
        while chunk := list(itertools.islice(sentences, CHUNK)):
            for (_, text), columns in zip(chunk, predict([sentence for sentence, _ in chunk]), strict=True):
                yield with_columns(text, columns)

    return write_texts(target, predicted())


def rows_of_lines(source: StrPath) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, one after the other; raises what `predicted_lines` does."""
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
