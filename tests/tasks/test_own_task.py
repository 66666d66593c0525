"""A task of somebody else: one short file, and every command takes it; what docs/tasks.md shows can be typed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_tasks import save_bert, write_rows
from typed_command import failure_of, output_of

from fastmask.cli import _parser
from fastmask.tasks.task import Task

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("datasets_cache")
def test_every_command_takes_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    """Every command works with a class given as module:Class."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    random = np.random.default_rng(0)

    def rows(language, count):
        pairs = [[f"{language}{n}" for n in random.integers(8, size=2)] for _ in range(count)]
        return [{"language": language, "first": a, "second": b, "similarity": float(a < b)} for a, b in pairs]

    for split in ("train", "dev", "test"):
        write_rows(
            tmp_path / "pairs" / f"{split}.jsonl", [row for name in ("aa", "bb", "cc") for row in rows(name, 12)]
        )
    save_bert(tmp_path / "model")
    run, asked = tmp_path / "run", ["train", "--task", "own_task:Similarity", "--model", tmp_path / "model"]
    short = ["--steps", "4", "--batch-size", "4", "--density", "0.5", "--score-sentences", "4", "--threads", "1"]
    data = ["--data", tmp_path / "pairs", "--languages", "aa,bb", "--first-column", "first"]
    assert "correlation" in output_of(capsys, *asked, *short, *data, "--out", run)
    assert "correlation" in output_of(capsys, "evaluate", run)
    source = write_rows(tmp_path / "in.jsonl", [{"first": "aa1", "second": "aa2"}])
    output_of(capsys, "predict", run, source, tmp_path / "out.jsonl")
    assert isinstance(json.loads((tmp_path / "out.jsonl").read_text())["prediction"], float)
    support = write_rows(tmp_path / "support.jsonl", rows("cc", 3))
    given = ["--language", "cc", "--support", support, "--choose", "best", "--steps", "1", "--data", tmp_path / "pairs"]
    output_of(capsys, "adapt", run, *given, "--out", tmp_path / "adapted")
    column = [*data[:4], "--first-column", "frist"]
    assert "unknown column 'frist'; did you mean 'first'" in failure_of(
        capsys, *asked, *column, "--out", tmp_path / "no"
    )


@dataclass
class _Sounds:
    waves: np.ndarray


def test_other_data_have_another_digest():
    """Arrays are told apart by all of their numbers, whose text leaves out the middle of a long one."""
    array = np.zeros(5000, np.float32)
    changed = array.copy()
    changed[2500] = 1
    makers = [
        np.asarray, torch.from_numpy, _Sounds, lambda a: torch.from_numpy(a).bfloat16(), pd.Series, np.ndarray.tobytes,
        lambda a: [{"nested": a}], lambda a: a.astype(object),
    ]  # fmt: skip
    for make in makers:
        one, other, same = (Task.digest(None, [{"audio": make(of)}]) for of in (array, changed, array.copy()))
        assert one == same != other
        assert Task.words_of({"audio": make(array)}, None) != Task.words_of({"audio": make(changed)}, None)
    digests = {
        Task.digest(None, [{"x": x}])
        for x in (array, array.reshape(50, 100), array.astype(np.int32), torch.zeros(0), torch.tensor(0.0), 0.0)
    }
    assert len(digests) == 6


def test_the_example_is_short():
    """The example of a task is no longer than promised."""
    assert len((ROOT / "examples" / "own_task.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_commands_of_the_documentation_exist():
    """Every option and task that docs/tasks.md names exists."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    commands = re.findall(r"^fastmask ([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        common = re.search(r'^COMMON="(.*)"$', text, re.MULTILINE)
        arguments = command.replace("$M", "model").replace("$COMMON", common[1]).split()
        _parser(arguments).parse_args(arguments)
