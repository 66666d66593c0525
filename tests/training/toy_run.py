"""A tiny run on the synthetic treebanks, for the tests of this folder."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastmask.tasks.data.synthetic import SEEN, write_treebanks
from fastmask.tasks.data.treebanks import load_treebanks
from fastmask.tasks.parsing.parser import Parser, ParserConfig
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import Vocabulary
from fastmask.training.config import TrainConfig

LANGUAGES = list(SEEN)[:3]


@functools.cache
def toy_data() -> dict[str, dict[str, Any]]:
    """Three synthetic languages, 40 training and 8 dev sentences each."""
    with tempfile.TemporaryDirectory() as folder:
        write_treebanks(folder, seed=3, sentences={"train": 40, "dev": 8, "test": 8})
        loaded = load_treebanks(folder, LANGUAGES, ["train", "dev"], cache_dir=folder)
        return {
            code: {name: data.with_format(None) for name, data in splits.items()} for code, splits in loaded.items()
        }


def toy_parser(seed: int = 0, dropout: float = 0.2) -> Parser:
    """Two layers, two heads of 8, by default with dropout, so that random states matter."""
    torch.manual_seed(seed)
    rows = [row for splits in toy_data().values() for row in splits["train"]]
    config = ParserConfig(arc_size=16, label_size=8, dropout=dropout)
    vocabulary = Vocabulary.build(rows)
    return Parser.small(
        vocabulary, 2, 2, 8, 32, buckets=256, max_positions=64, encoder_dropout=dropout / 2, config=config
    )


def toy_task(seed: int = 0, dropout: float = 0.2) -> Parsing:
    """The toy parser as a task."""
    return Parsing(toy_parser(seed, dropout))


def toy_config(out: Path | str, **changes: Any) -> TrainConfig:
    """12 steps of 6 sentences, with metrics, dev scores and checkpoints at odd moments."""
    settings: dict[str, Any] = {
        "method": "full",
        "out": str(out),
        "steps": 12,
        "batch_size": 6,
        "eval_every": 5,
        "checkpoint_every": 3,
        "log_every": 2,
        "warmup": 0.2,
        "lr": 3e-3,
        "discover_at": 0.5,
        "threads": 1,
    }
    return TrainConfig(**{**settings, **changes})


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run without the one field that depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "words_per_second"} for line in lines]


def assert_same_weights(first: Parser, second: Parser) -> None:
    """Every weight is the same to the bit."""
    others = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, others[name]), name
