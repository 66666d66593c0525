"""The tables that commands print: through a console that takes nothing in a text for markup, emoji or escape codes."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from fastmask.literal import printable

__all__ = ["WIDTH", "LiteralConsole", "console_of"]

WIDTH = 130  # of tables that do not go to a terminal


class LiteralConsole(Console):
    """A console of rich on which every text comes out as it is, in tables, titles and lines."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `rich.console.Console`."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a line or a cell of a text; rich calls it for each one that it is given."""
        return super().render_str(printable(text), **options)


def console_of(file: TextIO) -> LiteralConsole:
    """Where tables go: as wide as the terminal, or `WIDTH` columns in a file or a pipe."""
    return LiteralConsole(file=file) if file.isatty() else LiteralConsole(file=file, width=WIDTH)
