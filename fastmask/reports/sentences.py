"""Which sentences an analysis runs on: so many of each language, drawn by the seed, the same for every run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmask.errors import FastmaskKeyError
from fastmask.reports.folders import Run
from fastmask.settings import items_of
from fastmask.tasks.data.treebanks import find_treebanks, load_treebanks, select_treebanks
from fastmask.tasks.parsing.batch import Batch
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.windows import rows_that_fit
from fastmask.training.data import data_of_run

__all__ = ["Treebanks", "batches_of", "treebanks_of"]

BATCH = 16  # sentences that are computed at once, in an order that has nothing to do with their length


@dataclass(frozen=True)
class Treebanks:
    """The treebanks of some languages.

    Attributes:
        folder: that holds them.
        names: language -> its treebanks.
        missing: language, as it was asked for -> why there is nothing of it.
    """

    folder: str
    names: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str] = field(default_factory=dict)

    def rows(self, language: str, split: str, n: int | None, seed: int) -> list[Mapping[str, Any]]:
        """`n` sentences of a language (all if None), in random order."""
        loaded = load_treebanks(self.folder, self.names[language], splits=(split,))[language][split]
        order = np.random.default_rng([seed, zlib.crc32(f"{language} {split}".encode())]).permutation(len(loaded))
        return [loaded[int(row)] for row in order[:n]]

    def profile_rows(self, language: str) -> list[Mapping[str, Any]]:
        """Every sentence of a language, with "heads" and "deprels"."""
        splits = load_treebanks(self.folder, self.names[language], optional=("train", "dev", "test"))[language]
        return [row for split in splits.values() for row in split.select_columns(["heads", "deprels"])]


def treebanks_of(run: Run, split: str | None, data: str | None = None, more: str = "") -> Treebanks:
    """The treebanks that have a split of the languages that a run was trained on, and of `more` languages.

    Args:
        run: whose settings say where they are.
        split: that is needed, or None: any.
        data: another folder of them.
        more: further codes or treebank names, by commas.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder, languages = data_of_run(run.config, run.folder) if data is None else (data, run.config.languages)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder of treebanks at {folder}: name it with --data")
    known = find_treebanks(folder)
    if languages is None:
        languages = ",".join(sorted({bank.code for bank in known.values() if "train" in bank.files}))
    names: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    for item in items_of(f"{languages},{more}"):
        try:
            ((code, banks),) = select_treebanks(known, item).items()
        except FastmaskKeyError:
            missing[item] = f"there is no treebank of it in {folder}"
            continue
        if split is not None and not any(split in bank.files for bank in banks):
            missing[code] = f"its treebanks have no {split} split"
            continue
        names[code] = tuple(dict.fromkeys([*names.get(code, ()), *(bank.name for bank in banks)]))
    return Treebanks(os.fspath(folder), names, missing)


def batches_of(parser: Parser, rows: list[Mapping[str, Any]], device: Any) -> list[Batch]:
    """The rows as batches of `BATCH`, in their order, without those that are too long for the encoder.

    Raises:
        ValueError: none is left.
    """
    encoded = parser.features.encode(rows, parser.vocabulary)
    fits = rows_that_fit(parser.features, encoded, "sentences")
    pieces = [fits[first : first + BATCH] for first in range(0, len(fits), BATCH)]
    return [parser.features.collate(encoded.select(piece)).to(device) for piece in pieces]
