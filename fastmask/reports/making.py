"""The whole of a report: every analysis of every study, the files and the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from fastmask.errors import unknown
from fastmask.files import is_leftover, read_json, replace_file, write_text
from fastmask.reports import conflicts, crossing, masks, scores
from fastmask.reports.folders import Study, studies_of
from fastmask.reports.page import Part, page
from fastmask.reports.sections import Gathered, Options, Section, Skipped, file_name

__all__ = ["ANALYSES", "Made", "make_report"]

ANALYSES: dict[str, Callable[[Study, Gathered], None]] = {
    "effect": scores.effect,
    "overlap": masks.overlap,
    "heads": masks.use,
    "conflict": conflicts.conflict,
    "cross": crossing.cross,
    "typology": scores.typology,
    "ablation": crossing.ablation,
    "dynamics": masks.dynamics,
}
"""By name, in the order of the report: adds to what was found in a study, or raises `SkipError`."""

FOLDER = "analysis"  # of the report, in that of the run
REPORT = "report.html"
CONTENTS = "contents.json"  # the names of the files that belong to the report


@dataclass(frozen=True)
class Made:
    """A report that was written.

    Attributes:
        report: the page.
        sections: how many were made.
        skipped: what is not in it, and why.
    """

    report: Path
    sections: int
    skipped: list[Skipped]


def make_report(
    folders: Sequence[str | PathLike[str]],
    what: Sequence[str] | None = None,
    out: str | PathLike[str] | None = None,
    options: Options | None = None,
    *,
    command: str | None = None,
    on_part: Callable[[Part], None] | None = None,
) -> Made:
    """Analyse runs and comparisons, and write ``report.html`` with every table and picture beside it.

    All files are written at the end, each replaced at once, and those of a report that was there before are removed.

    Args:
        folders: of runs, which are put side by side, and of comparisons.
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
    options = options or Options()
    for name in what or ():
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
    studies = studies_of(folders)
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} folders were given (expected --out, the folder of the report)")
    target = Path(folders[0], FOLDER) if out is None else Path(out)
    _check_folder(target)

    parts = []
    for study in studies:
        for name in ANALYSES if what is None else [name for name in ANALYSES if name in what]:
            parts.append(_part(study, name, options))
            if on_part is not None:
                on_part(parts[-1])
    skipped = [
        Skipped("comparison", name, "this cell is not done yet") for study in studies for name in study.unfinished
    ]
    skipped = list(dict.fromkeys([*skipped, *(reason for part in parts for reason in part.skipped)]))
    parts = _distinct([part for part in parts if part.sections], studies)
    if not parts:
        raise ValueError("nothing could be analysed:\n" + "\n".join(f"  {reason}" for reason in skipped))
    sections = [section for part in parts for section in part.sections]
    files = {name: content for each in sections for name, content in each.result.files(each.pictures).items()}
    _write_files(target, {**files, REPORT: page(studies, parts, skipped, command).encode()})
    return Made(target / REPORT, len(sections), skipped)


def _part(study: Study, name: str, options: Options) -> Part:
    began, found = time.perf_counter(), Gathered(name, options)
    with found.attempt(""):
        ANALYSES[name](study, found)
    return Part(study, name, found.sections(), found.skipped, time.perf_counter() - began)


def _distinct(parts: Sequence[Part], studies: Sequence[Study]) -> list[Part]:
    """No two sections have files of one name; with several studies, names begin with the study's."""
    taken: set[str] = set()

    def renamed(section: Section, stem: str) -> Section:
        wanted = name = f"{stem}{section.result.name}"
        number = 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name)
        return replace(section, result=replace(section.result, name=name))

    found = []
    for part in parts:
        number = 1 + [study is part.study for study in studies].index(True)
        stem = f"{file_name(str(number), part.study.title)[:40]}-" if len(studies) > 1 else ""
        found.append(replace(part, sections=[renamed(section, stem) for section in part.sections]))
    return found


# ---- the files


def _check_folder(folder: Path) -> None:
    """See that a report can go into a folder: there is none yet, or it is empty, or it holds a report."""
    names = os.listdir(folder) if folder.is_dir() else []
    if folder.is_file() or (not all(map(is_leftover, names)) and CONTENTS not in names):
        raise ValueError(f"{folder} is there already and holds no report (expected a new or an empty folder)")


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, the page last, then remove those of the report before."""
    contents = folder / CONTENTS
    before: list[str] = read_json(contents, list[str]) if contents.is_file() else []
    # Until all is in place both belong to the report: interrupted, it leaves nothing that would stay for ever.
    write_text(contents, json.dumps(sorted({*before, *files}), indent=1))
    for name, content in files.items():
        replace_file(folder / name, lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
    for name in set(before) - set(files):
        (folder / Path(name).name).unlink(missing_ok=True)
    write_text(contents, json.dumps(sorted(files), indent=1))
