"""A task of somebody else: one short file, and every command takes it; what docs/tasks.md shows can be typed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import run_script
from tiny_tasks import save_bert, write_rows
from typed_command import failure_of, output_of

import fastmask as fm
from fastmask.cli import _parser
from fastmask.tasks import task_class
from fastmask.tasks.task import Task

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--steps", "4", "--batch-size", "4", "--density", "0.5", "--score-sentences", "4", "--threads", "1"]


def pairs_of(language, count):
    """Random pairs of words that the tokenizer of `save_bert` knows."""
    random = np.random.default_rng(ord(language[0]))
    pairs = [[f"{language}{n}" for n in random.integers(8, size=2)] for _ in range(count)]
    return [{"language": language, "first": a, "second": b, "similarity": float(a < b)} for a, b in pairs]


@pytest.fixture
def given(tmp_path):
    """A model and data in three languages, as options of the command."""
    for split in ("train", "dev", "test"):
        rows = [row for name in ("aa", "bb", "cc") for row in pairs_of(name, 12)]
        write_rows(tmp_path / "pairs" / f"{split}.jsonl", rows)
    save_bert(tmp_path / "model")
    return ["--model", tmp_path / "model", "--data", tmp_path / "pairs", "--languages", "aa,bb"]


@pytest.mark.usefixtures("datasets_cache")
def test_every_command_takes_a_task_of_ones_own(given, tmp_path, monkeypatch, capsys):
    """Every command works with a class given as module:Class."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    run, asked = tmp_path / "run", ["train", "--task", "own_task:Similarity", *given]
    assert "correlation" in output_of(capsys, *asked, *SHORT, "--first-column", "first", "--out", run)
    assert "correlation" in output_of(capsys, "evaluate", run)
    source = write_rows(tmp_path / "in.jsonl", [{"first": "aa1", "second": "aa2"}])
    output_of(capsys, "predict", run, source, tmp_path / "out.jsonl")
    assert isinstance(json.loads((tmp_path / "out.jsonl").read_text())["prediction"], float)
    support = write_rows(tmp_path / "support.jsonl", pairs_of("cc", 3))
    few = ["--language", "cc", "--support", support, "--choose", "best", "--steps", "1", "--data", tmp_path / "pairs"]
    output_of(capsys, "adapt", run, *few, "--out", tmp_path / "adapted")
    said = failure_of(capsys, *asked, "--first-column", "frist", "--out", tmp_path / "no")
    assert "unknown column 'frist'; did you mean 'first'" in said


INSTALLED = """
import sys
sys.path.insert(0, sys.argv.pop(1))  # as a folder of installed packages is there
from fastmask.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_package_offers_a_task_by_name(given, tmp_path, monkeypatch):
    """A task that an installed package declares as an entry point is trained and loaded by its name."""
    site = tmp_path / "site"
    metadata = site / "somebodys_tasks-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "own_task.py", site / "somebodys_tasks.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-tasks\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[fastmask.tasks]\nsimilar = somebodys_tasks:Similarity\n")
    (tmp_path / "script.py").write_text(INSTALLED)

    def command(*arguments):
        run_script(tmp_path / "script.py", tmp_path, *map(str, (site, *arguments)))

    command("train", "--task", "similar", *given, *SHORT, "--first-column", "first", "--out", "run")
    assert "task: similar\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert fm.Subnetworks.load(tmp_path / "run").languages == ("aa", "bb")
    command("evaluate", "run", "--json", "scores.json")
    assert all("correlation" in row["own"] for row in json.loads((tmp_path / "scores.json").read_text()))
    with pytest.raises(KeyError, match="unknown task 'similar'"):  # not installed in this process
        task_class("similar")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(KeyError, match="unknown task 'simlar'; did you mean 'similar'"):
        task_class("simlar")


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


def test_the_page_shows_the_example():
    """The class on the page is that of the example, which runs and is short: copy what changed from there."""
    text = (ROOT / "examples" / "own_task.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    code = text[text.index("from __future__") : text.index("def tiny_data_and_model")].rstrip()
    assert f"```python\n{code}\n```\n" in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_commands_of_the_documentation_exist(monkeypatch):
    """Every option and task that docs/tasks.md names exists."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    commands = re.findall(r"^fastmask ([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        common = re.search(r'^COMMON="(.*)"$', text, re.MULTILINE)
        arguments = command.replace("$M", "model").replace("$COMMON", common[1]).split()
        _parser(arguments).parse_args(arguments)
