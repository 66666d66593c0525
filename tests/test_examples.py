"""What the README and `examples/` show runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_readme_python_example(tmp_path):
    """The first thing a reader copies does not run."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(name, tmp_path):
    """An example script does not run."""
    subprocess.run([sys.executable, ROOT / "examples" / name], cwd=tmp_path, check=True, capture_output=True)


def test_readme_commands_exist():
    """The README names an option that the command does not have."""
    from fastmask.cli import _parser

    commands = re.findall(r"^fastmask (\w+) ([^#\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 8
    for command, rest in commands:
        arguments = [word for word in rest.split() if word != "..."]
        _parser().parse_args([command, *arguments])
