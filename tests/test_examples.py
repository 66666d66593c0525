"""What the README and `examples/` show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import run_script

import fastmask as fm
from fastmask.tasks.data.synthetic import write_treebanks
from tests.compare.tiny_encoder import tiny_encoder

ROOT = Path(__file__).resolve().parent.parent


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_python_examples(number, tmp_path):
    """The first thing a reader copies does not run."""
    (tmp_path / "example.py").write_text(SNIPPETS[number], encoding="utf-8")
    run_script(tmp_path / "example.py", tmp_path)


ON_DATA = ("plain_loop.py", "trainer.py")
ALONE = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in (*ON_DATA, "own_task.py"))


@pytest.mark.parametrize("name", ALONE)
def test_examples_run(name, tmp_path):
    """An example script does not run."""
    run_script(ROOT / "examples" / name, tmp_path)


@pytest.mark.parametrize("name", ON_DATA)
def test_examples_on_data_run(name, tmp_path):
    """An example on small treebanks and a tiny encoder ends as on real ones, and saves its masks."""
    write_treebanks(tmp_path / "ud", sentences={"train": 12, "dev": 2, "test": 24})
    text = "".join(path.read_text() for path in (tmp_path / "ud").glob("UD_*/*.conllu"))
    tiny_encoder(tmp_path / "encoder", text)
    options = ["--languages", "qaa,qac", "--steps", "4", *(["--unseen", "qad"] if name == "plain_loop.py" else [])]
    run_script(ROOT / "examples" / name, tmp_path, str(tmp_path / "ud"), str(tmp_path / "encoder"), *options)
    folder, unseen = ("tagger", ["qad"]) if name == "plain_loop.py" else ("trainer-run", [])
    assert list(fm.Subnetworks.load(tmp_path / folder).languages) == ["qaa", "qac", *unseen]


def test_readme_commands_exist():
    """The README names an option that the command does not have."""
    from fastmask.cli import _parser

    commands = re.findall(r"^fastmask (\w+) ([^#\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 8
    for command, rest in commands:
        arguments = [word for word in rest.split() if word != "..."]
        _parser([command, *arguments]).parse_args([command, *arguments])
