"""How the tiny runs of this folder are made."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastmask.cli.report import examples_of, scored
from fastmask.compare.plan import CompareConfig, Plan, do
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.config import TrainConfig
from fastmask.training.loop import train

TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 6,
    "density": 0.5,
    "score_sentences": 8,
    "dev_sentences": 4,
    "eval_every": 0,
    "threads": 1,
    "discover_at": 0.5,
    "update_every": 1,
    "update_sentences": 2,
    "lr": 0.003,
}
COMPARISON = {
    "train": "qaa,qab,qac",
    "unseen": "qad,qag,qah",
    "shots": 4,
    "support_sets": 2,
    "adapt_steps": 1,
    "adapt_lr": 1e-3,
    "adapt_encoder_lr": 1e-3,
    "test_sentences": 6,
    "seeds": 2,
}
ARMS = {"full": {"method": "full"}, "static": {}}


def make_run(out: Path, data: Path, method: str, **settings: Any) -> Path:
    """A finished training run on three languages; returns its folder."""
    given = {**TRAINING, "languages": "qaa,qab,qac", "checkpoint_every": 2, **settings}
    given.setdefault("model", str(data.parent / "encoder"))
    config = TrainConfig(data=str(data), method=method, out=str(out), **given)
    datasets = Parsing.load(data, config.language_list, config.task_settings, optional=("dev", "test"))
    done = train(Parsing.build(config, datasets), datasets, config, progress=False)
    rows = scored(done.task, done.subnetworks, examples_of(done.task, datasets, "test"))
    (out / "results.json").write_text(json.dumps({"test": [dataclasses.asdict(row) for row in rows]}))
    return out


def make_comparison(out: Path, data: Path, settings: dict[str, Any], training: dict[str, Any]) -> Path:
    """A comparison that is done, of encoders from scratch, smaller than the small one; returns its folder."""
    plan = Plan(out, str(data), CompareConfig(**settings), training, ARMS)
    plan.open()
    with pytest.MonkeyPatch.context() as patched:
        smaller = partial(Parser.small, layers=2, heads=4, head_size=4, ffn=16, buckets=64)
        patched.setattr(Parser, "small", smaller)
        for job in plan.jobs:
            do(plan, job)
    return out
