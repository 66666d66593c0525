"""A finished run as small as one can be, for tests that damage its files or write beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastmask.tasks.data.synthetic import write_treebanks
from fastmask.tasks.parsing.parser import Parser, ParserConfig
from fastmask.tasks.parsing.task import Parsing, ParsingSettings
from fastmask.tasks.parsing.vocabulary import Vocabulary
from fastmask.tasks.task import Splits
from fastmask.training.config import TrainConfig
from fastmask.training.loop import train

LANGUAGES = "qaa,qac"
SENTENCES = {"train": 12, "dev": 3, "test": 3}


def small_task(datasets: Splits) -> Parsing:
    """Two layers of two heads, 20 KB of weights."""
    torch.manual_seed(0)
    rows = [row for splits in datasets.values() for row in splits["train"]]
    config = ParserConfig(arc_size=8, label_size=4, dropout=0.1)
    return Parsing(Parser.small(Vocabulary.build(rows), 2, 2, 4, 16, buckets=64, max_positions=64, config=config))


def small_config(out: Path, data: Path, **changes: Any) -> TrainConfig:
    """Six steps, with subnetworks from the fourth on, and checkpoints every two."""
    given: dict[str, Any] = {
        "data": str(data), "languages": LANGUAGES, "method": "static", "out": str(out), "steps": 6, "batch_size": 4,
        "density": 0.5, "score_sentences": 4, "dev_sentences": 2, "eval_every": 0, "checkpoint_every": 2,
        "discover_at": 0.5, "threads": 1, "lr": 3e-3, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


def write_data(folder: Path) -> Path:
    """Treebanks of a few sentences."""
    write_treebanks(folder, sentences=SENTENCES)
    return folder


def load_small(data: Path) -> Splits:
    """The rows of these treebanks."""
    return Parsing.load(data, LANGUAGES, ParsingSettings(), optional=("dev", "test"))


def make_run(out: Path, data: Path, **changes: Any) -> Path:
    """Train, and return the folder of the run."""
    config = small_config(out, data, **changes)
    datasets = load_small(data)
    train(small_task(datasets), datasets, config, progress=False)
    return out
