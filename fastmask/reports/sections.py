"""What a report is made of: sections, and what was left out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fastmask.analysis.result import Result

__all__ = ["EXPECTED", "Gathered", "Options", "Section", "SkipError", "Skipped", "file_name"]

EXPECTED = (ValueError, KeyError, OSError, RuntimeError, ImportError, ArithmeticError)
"""What goes wrong with a run or its data; any other error is a mistake in the code."""


@dataclass(frozen=True)
class Options:
    """What holds for every analysis.

    Attributes:
        seed: of the sentences that are drawn, and of permutations and random masks.
        sentences: of each language; None: as many as each analysis takes by itself.
        data: folder of the treebanks; None: that of the run.
        device: where to compute.
        strict: an error ends everything, instead of being listed among what was skipped.
    """

    seed: int = 0
    sentences: int | None = None
    data: str | None = None
    device: str = "auto"
    strict: bool = False


@dataclass(frozen=True)
class Section:
    """One analysis of something, drawn.

    Attributes:
        title: what was analysed.
        result: its name is that of its files.
        pictures: "png", "svg" -> the file's content.
        on_page: False for more of the same, such as another seed: its files stand beside the page.
    """

    title: str
    result: Result
    pictures: Mapping[str, bytes]
    on_page: bool = True


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


@dataclass
class Gathered:
    """What one analysis of one study has found so far.

    Attributes:
        analysis: its name.
        options: what holds for it.
        results: title, result, and whether it is on the page.
        skipped: what could not be done.
    """

    analysis: str
    options: Options
    results: list[tuple[str, Result, bool]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, title: str, result: Result, *parts: str, note: str = "", on_page: bool = True) -> None:
        """Take a result; its files are named after the analysis and `parts`, and its caption ends with the note."""
        named = replace(result, name=file_name(result.name, *parts), caption=f"{result.caption} {note}".rstrip())
        self.results.append((title, named, on_page))

    def skip(self, part: str, why: str) -> None:
        """Note once what of the analysis cannot be done."""
        if (skipped := Skipped(self.analysis, part, why)) not in self.skipped:
            self.skipped.append(skipped)

    def skip_all(self, reasons: Mapping[str, str]) -> None:
        """Note what cannot be done, and why."""
        for part, why in reasons.items():
            self.skip(part, why)

    @contextmanager
    def attempt(self, part: str) -> Iterator[None]:
        """Note what goes wrong inside, and go on after it."""
        try:
            yield
        except EXPECTED as error:
            if self.options.strict and not isinstance(error, SkipError):
                raise
            self.skip(part, str(error) or type(error).__name__)

    def sections(self) -> list[Section]:
        """Draw what was found, all of it to one scale."""
        extents = [result.extent for _, result, _ in self.results if result.extent == result.extent]
        extent = max(extents, default=None)
        return [Section(title, result, result.pictures(extent), on_page) for title, result, on_page in self.results]


def file_name(*parts: str) -> str:
    """A name for files, of lower-case letters, digits and hyphens, up to 60 of each part; others may have the same."""
    slugs = (re.sub(r"[^a-z0-9]+", "-", part.lower())[:60].strip("-") for part in parts)
    return "-".join(filter(None, slugs))
