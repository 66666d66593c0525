"""What the README and `examples/` show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import run_script

ROOT = Path(__file__).resolve().parent.parent


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_python_examples(number, tmp_path):
    """The first thing a reader copies does not run."""
    (tmp_path / "example.py").write_text(SNIPPETS[number], encoding="utf-8")
    run_script(tmp_path / "example.py", tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(name, tmp_path):
    """An example script does not run."""
    run_script(ROOT / "examples" / name, tmp_path)


def test_readme_commands_exist():
    """The README names an option that the command does not have."""
    from fastmask.cli import _parser

    commands = re.findall(r"^fastmask (\w+) ([^#\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 8
    for command, rest in commands:
        arguments = [word for word in rest.split() if word != "..."]
        _parser().parse_args([command, *arguments])
