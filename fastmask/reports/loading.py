"""How a report loads a run: its parser, as training left it or at a checkpoint, and sentences to run it on."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fastmask.errors import FastmaskKeyError
from fastmask.files import FileError, read_tensors
from fastmask.models import attach
from fastmask.parsing.batch import Batch
from fastmask.parsing.evaluation import evaluate, parse, prepare
from fastmask.parsing.parser import Parser
from fastmask.parsing.treebanks import find_treebanks, load_treebanks, select_treebanks
from fastmask.parsing.windows import rows_that_fit
from fastmask.reports.folders import Run
from fastmask.reports.sections import Options, SkipError
from fastmask.subnetworks import Subnetworks
from fastmask.training.checkpoints import MASKS
from fastmask.training.data import data_of_run
from fastmask.training.device import device_of
from fastmask.training.finished import load_run
from fastmask.training.settings import items_of

__all__ = [
    "Row", "Treebanks", "batches_of", "las_of", "parser_at", "parser_of", "sentence_losses", "sentence_scores",
    "treebanks_of",
]  # fmt: skip

BATCH = 16  # sentences that are computed at once, in an order that has nothing to do with their length
Row = Mapping[str, Any]


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

    def rows(self, language: str, split: str, n: int | None, seed: int) -> list[Row]:
        """`n` sentences of a language (all if None), in random order, the same for every run."""
        loaded = load_treebanks(self.folder, self.names[language], splits=(split,))[language][split]
        order = np.random.default_rng([seed, zlib.crc32(f"{language} {split}".encode())]).permutation(len(loaded))
        return [loaded[int(row)] for row in order[:n]]

    def profile_rows(self, language: str) -> list[Row]:
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
        SkipError: there is no such folder.
    """
    folder, languages = data_of_run(run.config, run.folder) if data is None else (data, run.config.languages)
    if not os.path.isdir(folder):
        raise SkipError(f"no folder of treebanks at {folder}: name it with --data")
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


def parser_of(run: Run, options: Options, attached: bool = True) -> tuple[Parser, Subnetworks | None]:
    """The parser of a finished run and its subnetworks, attached or not; None for method `full`."""
    loaded = load_run(run.folder, attached=attached)
    return loaded.parser.to(device_of(options.device)), loaded.subnetworks


def parser_at(run: Run, checkpoint: Path, options: Options) -> tuple[Parser, Subnetworks | None]:
    """The parser as it was at a checkpoint, with the subnetworks of that moment attached (None before the switch).

    Raises:
        FileError: the checkpoint's weights are damaged, or not those of the run's parser.
    """
    parser, _ = parser_of(run, options, attached=False)
    file = checkpoint / "model.safetensors"
    try:
        parser.load_state_dict(read_tensors(file)[0])
    except RuntimeError as error:  # names or shapes, one a line
        raise FileError(file, " ".join(str(error).split())[:500]) from None
    masks = checkpoint / MASKS
    subnets = Subnetworks.load(masks) if masks.is_file() else None
    if subnets is not None:
        attach(parser.encoder, subnets)
    return parser, subnets


def batches_of(parser: Parser, rows: Sequence[Row]) -> list[Batch]:
    """The rows as batches of `BATCH`, in their order, without those that are too long for the encoder.

    Raises:
        ValueError: none is left.
    """
    encoded = parser.features.encode(rows, parser.vocabulary)
    fits = rows_that_fit(parser.features, encoded, "sentences")
    pieces = [fits[first : first + BATCH] for first in range(0, len(fits), BATCH)]
    device = next(parser.parameters()).device
    return [parser.features.collate(encoded.select(piece)).to(device) for piece in pieces]


def sentence_losses(parser: Parser, batch: Batch) -> Tensor:
    """The loss of each sentence, [B]: mean over its words of arc and label cross entropy."""
    losses = parser(batch).loss_per_sentence
    assert losses is not None  # rows of treebanks have heads
    return losses


def las_of(parser: Parser, rows: Sequence[Row], language_ids: Mapping[str, int]) -> dict[str, float]:
    """Official LAS of the rows under each of the attached subnetworks that are named; -1 is the full network."""
    prepared = {"rows": prepare(parser, rows)}
    return {name: evaluate(parser, prepared, number)["rows"].las for name, number in language_ids.items()}


def sentence_scores(parser: Parser, rows: Sequence[Row], language_id: int | None) -> pd.DataFrame:
    """LAS of each sentence: `sentence` (its position), `score` (percent), `weight` (words), subtypes ignored.

    The weighted mean is the official LAS, as words are gold.
    """
    found = []
    trees = parse(parser, prepare(parser, rows).encoded, language_id)
    for at, (row, (heads, labels)) in enumerate(zip(rows, trees, strict=True)):
        right = sum(
            int(head) == gold and label.partition(":")[0] == gold_label.partition(":")[0]
            for head, label, gold, gold_label in zip(heads, labels, row["heads"], row["deprels"], strict=True)
        )
        found.append((at, 100 * right / len(row["heads"]), len(row["heads"])))
    return pd.DataFrame(found, columns=["sentence", "score", "weight"])
