"""The whole of a report: every analysis of every study, in several processes; the files and the page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from fastmask.reports.analyses import Analysis, chosen
from fastmask.reports.folders import Study, studies_of
from fastmask.reports.page import Part, page
from fastmask.reports.sections import Gathered, Options, Section, Skipped, file_name
from fastmask.reports.writing import REPORT, check_folder, write_files
from fastmask.workers import processes

__all__ = ["FOLDER", "Made", "make_report"]

FOLDER = "analysis"  # of the report, in that of the run
Found = tuple[list[Section], list[Skipped], float]
LONG = ("cross", "conflict", "ablation")  # which run models: begun first


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
    workers: int = 1,
    command: str | None = None,
    on_part: Callable[[Part, int, int], None] | None = None,
) -> Made:
    """Analyse runs and comparisons, and write ``report.html`` with every table and picture beside it.

    All files are written at the end, each replaced at once, and those of a report that was there before are removed.

    Args:
        folders: of runs, which are put side by side, and of comparisons.
        what: names of analyses (`analyses.ANALYSES`); None: all.
        out: folder of the report; with a single run or comparison by default ``analysis`` in its folder.
        options: what holds for every analysis.
        workers: processes; each does one analysis of one study at a time.
        command: that the page shows to make it again.
        on_part: called after each analysis of each study, with how many are done and how many there are.

    Raises:
        FileNotFoundError: a folder that is no finished run or comparison.
        FastmaskKeyError: an unknown analysis.
        ValueError: several folders and no `out`, a folder that holds something else, or nothing that could be done.
    """
    analyses, options = chosen(what), options or Options()
    studies = studies_of(folders)
    if out is None and len(folders) > 1:
        raise ValueError(f"{len(folders)} folders were given (expected --out, the folder of the report)")
    target = Path(folders[0], FOLDER) if out is None else Path(out)
    if out is None and target.is_symlink():  # a run may come from somebody else
        raise ValueError(f"{target} is a link (expected --out, to write the report where it leads)")
    check_folder(target)

    tasks = [(study, analysis, options) for study in studies for analysis in analyses]
    done: dict[int, Part] = {}
    for at, (sections, lacking, seconds) in _all_done(tasks, workers):
        done[at] = Part(tasks[at][0], tasks[at][1], sections, lacking, seconds)
        if on_part is not None:
            on_part(done[at], len(done), len(tasks))
    parts = [done[at] for at in range(len(tasks))]
    skipped = [
        Skipped("comparison", name, "this cell is not done yet") for study in studies for name in study.unfinished
    ]
    skipped = list(dict.fromkeys([*skipped, *(reason for part in parts for reason in part.skipped)]))
    parts = _distinct([part for part in parts if part.sections], studies)
    if not parts:
        raise ValueError("nothing could be analysed:\n" + "\n".join(f"  {reason}" for reason in skipped))
    files = {name: content for part in parts for section in part.sections for name, content in section.files.items()}
    files[REPORT] = page(studies, parts, skipped, command).encode()
    write_files(target, files)
    return Made(target / REPORT, sum(len(part.sections) for part in parts), skipped)


def _found(study: Study, analysis: Analysis, options: Options) -> Found:
    """One analysis of one study: its sections, what could not be done, and how many seconds it took."""
    began, found = time.perf_counter(), Gathered(analysis.name, options)
    with found.attempt(""):
        analysis.gather(study, found)
    return found.sections(), found.skipped, time.perf_counter() - began


def _all_done(tasks: Sequence[tuple[Study, Analysis, Options]], workers: int) -> Iterator[tuple[int, Found]]:
    """Position and outcome of each task, as it is done; with one worker this process does the work."""
    order = sorted(range(len(tasks)), key=lambda at: tasks[at][1].name not in LONG)
    workers = min(workers, len(tasks))
    if workers <= 1:
        for at in order:
            yield at, _found(*tasks[at])
        return
    with processes(workers, max(1, (os.cpu_count() or 1) // workers)) as pool:
        waiting = {pool.submit(_found, *tasks[at]): at for at in order}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _distinct(parts: Sequence[Part], studies: Sequence[Study]) -> list[Part]:
    """No two sections have files of one name; with several studies, names begin with the study's."""
    taken: set[str] = set()

    def renamed(section: Section, stem: str) -> Section:
        wanted = name = f"{stem}{section.name}"
        number = 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name)
        tables = {f"{name}{key.removeprefix(section.name)}": table for key, table in section.tables.items()}
        return replace(section, name=name, tables=tables)

    found = []
    for part in parts:
        number = 1 + [study is part.study for study in studies].index(True)
        stem = f"{file_name(str(number), part.study.title)[:40]}-" if len(studies) > 1 else ""
        found.append(replace(part, sections=[renamed(section, stem) for section in part.sections]))
    return found
