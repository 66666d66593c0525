"""One report from finished runs: every analysis of `fastmask.analysis` over training runs and comparisons.

`runs` says what the given folders are and loads models and sentences, `analyses` has a function for each analysis, and
`page` makes ``report.html``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastmask.analysis.result import write_files
from fastmask.errors import unknown
from fastmask.files import StrPath, is_leftover, read_json, write_text
from fastmask.reports.analyses import ANALYSES
from fastmask.reports.page import Part, Skipped, file_name, render
from fastmask.reports.runs import Options, studies_of

__all__ = ["Made", "Options", "make_report"]

FOLDER = "analysis"  # of the report, in that of the run
CONTENTS = "contents.json"  # the names of the files that belong to the report


class Made(NamedTuple):
    """A report that was written: the page, how many sections it has, and what is not in it, and why."""

    report: Path
    sections: int
    skipped: list[Skipped]


def make_report(
    folders: Sequence[StrPath],
    what: Sequence[str] | None = None,
    out: StrPath | None = None,
    options: Options | None = None,
    *,
    command: str | None = None,
    on_part: Callable[[Part], None] | None = None,
) -> Made:
    """Analyse runs and comparisons, and write ``report.html`` with every table and picture beside it.

    All files are written at the end, each replaced at once, and those of a report that was there before are removed.

    Args:
        folders: of finished runs, which are put side by side, and of comparisons.
        what: names of `ANALYSES`; None: all.
        out: folder of the report; with a single run or comparison by default ``analysis`` in its folder.
        options: what holds for every analysis.
        command: that the page shows to make it again.
        on_part: called after each analysis of each study.

    Raises:
        FileNotFoundError: a folder that is no finished run or comparison.
        FastmaskKeyError: an unknown analysis.
        ValueError: several folders and no `out`, a folder that holds something else, or nothing that could be done.
    """
    for name in what or ():
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
    studies = studies_of(folders)
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} folders were given (expected --out, the folder of the report)")
    target = Path(folders[0], FOLDER) if out is None else Path(out)
    names = os.listdir(target) if target.is_dir() else []
    if target.is_file() or (not all(map(is_leftover, names)) and CONTENTS not in names):
        raise ValueError(f"{target} is there already and holds no report (expected a new or an empty folder)")

    parts: list[Part] = []
    taken: set[str] = set()
    skipped = [Skipped("comparison", name, why) for study in studies for name, why in study.missing.items()]
    for number, study in enumerate(studies, start=1):
        stem = f"{file_name(str(number), study.title)[:40]}-" if len(studies) > 1 else ""
        for name in ANALYSES if what is None else [name for name in ANALYSES if name in what]:
            part = Part(study, name, options or Options(), stem, taken)
            _fill(part)
            skipped += part.skipped
            if part.sections:
                parts.append(part)
            if on_part is not None:
                on_part(part)
    skipped = list(dict.fromkeys(skipped))
    if not parts:
        raise ValueError("nothing could be analysed:\n" + "\n".join(f"  {reason}" for reason in skipped))
    sections = [section for part in parts for section in part.sections]
    files = {name: content for each in sections for name, content in each.result.files(each.pictures).items()}
    _replace_files(target, {**files, "report.html": render(studies, parts, skipped, command).encode()})
    return Made(target / "report.html", len(sections), skipped)


def _fill(part: Part) -> None:
    began = time.perf_counter()
    with part.attempt(""):
        ANALYSES[part.analysis](part)
    part.draw()
    part.seconds = time.perf_counter() - began


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, the page last, then remove those of the report before."""
    contents = folder / CONTENTS
    before: list[str] = read_json(contents, list[str]) if contents.is_file() else []
    # Until all is in place both belong to the report: interrupted, it leaves nothing that would stay for ever.
    write_text(contents, json.dumps(sorted({*before, *files}), indent=1))
    write_files(folder, files)
    for name in set(before) - set(files):
        (folder / Path(name).name).unlink(missing_ok=True)
    write_text(contents, json.dumps(sorted(files), indent=1))
