"""Names as they are, wherever they are shown: nothing in them is markup, or a command to whatever shows them.

Names of languages, treebanks, relations and files are other people's. Terminals get them through `terminal`, pictures
through `analysis.drawing.new_figure`, the page of a report through a template that escapes, Markdown through here. CSV
files hold them as they are: they are data to be read again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

__all__ = ["fenced", "is_plain", "markdown_table", "one_line", "printable", "say"]

# They turn the direction of the text that follows, so that it reads as something else.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""The text with control characters, but for ``\n`` and ``\t``, written out: ``\x1b`` for the one of escape codes.

    So are halves of surrogate pairs, which cannot be encoded, and characters that turn the direction of the text.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_written, text))


def one_line(text: str) -> str:
    """`printable`, with line ends and tabs written out, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def is_plain(text: str) -> bool:
    """Whether a text is one line that shows as it is."""
    return one_line(text) == text


def _written(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table in which every cell reads as it is."""
    lines = [f"| {' | '.join(map(_cell, header))} |", f"|{' --- |' * len(header)}"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", printable(text)).replace("\n", " ").replace("\t", " ")


def fenced(text: str) -> list[str]:
    """The lines of a Markdown block of code, whatever backticks the text has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence, printable(text), fence]


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line (to standard output if no file is given) in which names come out as they are."""
    print(printable(text), file=file)
