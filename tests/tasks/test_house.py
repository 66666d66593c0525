"""Where tasks may be named: the registry knows them, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

import fastmask

PACKAGE = Path(fastmask.__file__).parent


def test_nothing_outside_of_parsing_imports_it() -> None:
    """A second task must not need the parser, nor the loop know it; the registry names it as text."""
    outside = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "tasks" / "parsing" not in path.parents]
    assert len(outside) > 100
    importing = re.compile(r"^\s*(from|import) fastmask\.tasks\.parsing", re.MULTILINE)
    assert [path for path in outside if importing.search(path.read_text(encoding="utf-8"))] == []
