"""What a report is made of: sections, and what was left out of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from fastmask.analysis.result import Result

__all__ = ["Section", "SkipError", "Skipped", "file_name"]


@dataclass(frozen=True)
class Section:
    """One analysis of something, drawn: nothing in it needs the model any more, so it passes between processes.

    Attributes:
        title: what was analysed.
        name: of its files; those of further tables begin with it.
        caption: what was computed, on what, with which n, and against which control.
        tables: file name without ending -> table.
        pictures: "png", "svg" -> the file's content.
        folded: shown only when it is opened: more of the same, such as another seed.
    """

    title: str
    name: str
    caption: str
    tables: Mapping[str, pd.DataFrame]
    pictures: Mapping[str, bytes]
    folded: bool = False

    @classmethod
    def of(cls, result: Result, title: str, *parts: str, note: str = "", folded: bool = False) -> Section:
        """Draw a result.

        Args:
            result: of an analysis.
            title: what was analysed.
            parts: what the files are named after, beside the analysis.
            note: what the caption must add.
            folded: see the class.
        """
        named = dataclasses.replace(result, name=file_name(result.name, *parts))
        caption = f"{result.caption} {note}".rstrip()
        return cls(title, named.name, caption, named.tables(), named.pictures(), folded)

    @property
    def files(self) -> dict[str, bytes]:
        """File name -> content."""
        tables = {f"{name}.csv": table.to_csv(index=False).encode() for name, table in self.tables.items()}
        return tables | {f"{self.name}.{kind}": content for kind, content in self.pictures.items()}


@dataclass(frozen=True)
class Skipped:
    """What could not be done: the analysis, what of it ("" for all), and why."""

    analysis: str
    part: str
    why: str

    def __str__(self) -> str:
        return f"{self.analysis}{f' ({self.part})' if self.part else ''}: {self.why}"


class SkipError(ValueError):
    """An analysis does not apply; the message says why."""


def file_name(*parts: str) -> str:
    """A name for files, of lower-case letters, digits and hyphens, up to 60 of each part; others may have the same."""
    slugs = (re.sub(r"[^a-z0-9]+", "-", part.lower())[:60].strip("-") for part in parts)
    return "-".join(filter(None, slugs))
