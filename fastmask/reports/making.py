"""The whole of a report: plan every analysis of every study, do the jobs, write the files and the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from fastmask.reports.analyses import Analysis, chosen
from fastmask.reports.folders import Study, studies_of
from fastmask.reports.jobs import EXPECTED, Done, Job, Options, Plan, do_all
from fastmask.reports.page import Part, page
from fastmask.reports.sections import Section, Skipped, file_name
from fastmask.reports.writing import REPORT, check_folder, write_files

__all__ = ["FOLDER", "Made", "Progress", "make_report"]

FOLDER = "analysis"  # of the report, in that of the run


@dataclass(frozen=True)
class Made:
    """A report that was written.

    Attributes:
        report: the page.
        sections: how many it has.
        skipped: what is not in it, and why.
        seconds: analysis -> seconds of work, of all processes together.
    """

    report: Path
    sections: int
    skipped: list[Skipped]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """A job that was done: its place among all, how long it took, and about how many seconds are left for the rest."""

    job: Job
    done: Done
    number: int
    total: int
    left: float


def make_report(
    folders: Sequence[str | PathLike[str]],
    what: Sequence[str] | None = None,
    out: str | PathLike[str] | None = None,
    options: Options | None = None,
    *,
    workers: int = 1,
    command: str | None = None,
    on_job: Callable[[Progress], None] | None = None,
    strict: bool = False,
) -> Made:
    """Analyse runs and comparisons, and write ``report.html`` with every table and picture beside it.

    All files are written at the end, each replaced at once, and those of a report that was there before are removed.

    Args:
        folders: of runs, which are put side by side, and of comparisons.
        what: names of analyses (`analyses.ANALYSES`); None: all.
        out: folder of the report; with a single run or comparison by default ``analysis`` in its folder.
        options: what holds for every analysis.
        workers: processes.
        command: that the page shows to make it again.
        on_job: called after each job.
        strict: an error in an analysis ends everything, instead of being listed among what was skipped.

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

    planned: list[tuple[Study, Analysis, Plan]] = []
    skipped = [
        Skipped("comparison", name, "this cell is not done yet") for study in studies for name in study.unfinished
    ]
    for study in studies:
        for analysis in analyses:
            for plan_of in analysis.plans:
                try:
                    plan = plan_of(study, options)
                except EXPECTED as error:
                    if strict and not isinstance(error, ValueError):
                        raise
                    skipped.append(Skipped(analysis.name, _named(plan_of), str(error)))
                    continue
                skipped += plan.skipped
                planned.append((study, analysis, plan))
    outcomes = _outcomes([job for _, _, plan in planned for job in plan.jobs], workers, on_job, strict)

    parts: list[Part] = []
    seconds: dict[str, float] = {}
    first = 0
    for study, analysis, plan in planned:
        mine = list(zip(plan.jobs, outcomes[first : first + len(plan.jobs)], strict=True))
        first += len(plan.jobs)
        skipped += [Skipped(analysis.name, job.name, done.error) for job, done in mine if done.error is not None]
        seconds[analysis.name] = seconds.get(analysis.name, 0.0) + sum(done.seconds for _, done in mine)
        answers = [done.answer for _, done in mine if done.error is None]
        try:
            sections = plan.finish(answers) if answers else []
        except EXPECTED as error:
            if strict:
                raise
            skipped.append(Skipped(analysis.name, "", str(error)))
            continue
        parts.append(Part(study, analysis, sections))
    skipped = list(dict.fromkeys(skipped))
    parts = [part for part in _joined(parts) if part.sections]
    if not parts:
        raise ValueError("nothing could be analysed:\n" + "\n".join(f"  {reason}" for reason in skipped))
    parts = _distinct(parts, studies)
    files = {name: content for part in parts for section in part.sections for name, content in section.files.items()}
    files[REPORT] = page(studies, parts, skipped, command).encode()
    write_files(target, files)
    return Made(target / REPORT, sum(len(part.sections) for part in parts), skipped, seconds)


def _named(plan_of: Callable[..., Plan]) -> str:
    """Which part of an analysis a plan is for, where it has several."""
    return "along checkpoints" if plan_of.__name__ == "along" else ""


def _outcomes(jobs: Sequence[Job], workers: int, on_job: Callable[[Progress], None] | None, strict: bool) -> list[Done]:
    """The outcome of every job, in their order."""
    found: dict[int, Done] = {}
    began, cost, total = time.perf_counter(), 0.0, sum(job.cost for job in jobs)
    for at, done in do_all(jobs, workers, strict):
        found[at] = done
        cost += jobs[at].cost
        if on_job is not None:
            left = (time.perf_counter() - began) / cost * (total - cost)
            on_job(Progress(jobs[at], done, len(found), len(jobs), left))
    return [found[at] for at in range(len(jobs))]


def _joined(parts: Sequence[Part]) -> list[Part]:
    """One part for each study and analysis."""
    found: dict[tuple[int, str], Part] = {}
    for part in parts:
        key = (id(part.study), part.analysis.name)
        before = found[key].sections if key in found else []
        found[key] = Part(part.study, part.analysis, [*before, *part.sections])
    return list(found.values())


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

    stems = {
        id(study): f"{file_name(str(number), study.title)[:40]}-" if len(studies) > 1 else ""
        for number, study in enumerate(studies, start=1)
    }
    return [
        Part(part.study, part.analysis, [renamed(section, stems[id(part.study)]) for section in part.sections])
        for part in parts
    ]
