"""A command as a person types it, and what it prints."""

from __future__ import annotations

from typing import Any

from fastmask.cli import main


def output_of(capsys: Any, *arguments: object, code: int = 0) -> str:
    """Run the command, see that it exits with `code`, and return what it printed: to stderr where it failed."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    printed: str = captured.err if code else captured.out
    return printed


def failure_of(capsys: Any, *arguments: object) -> str:
    """Run a command that fails as it should: exit code 1 and one line on stderr, which is returned."""
    said = output_of(capsys, *arguments, code=1)
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    assert "unexpected" not in said
    assert "this is a bug" not in said
    return said[:-1]


def errors_of(printed: str) -> list[str]:
    """The lines of stderr, without the warnings and the progress of a command that goes well."""
    return [line for line in printed.splitlines() if ": warning: " not in line]
