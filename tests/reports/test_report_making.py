"""Analyses in several processes: all done, the same as in one, and none left behind."""

from __future__ import annotations

import multiprocessing
import time

import pandas as pd
import pytest
from processes import fork_pools

from fastmask.analysis.drawing import new_figure
from fastmask.analysis.result import Result
from fastmask.reports import making
from fastmask.reports.analyses import ANALYSES, Analysis
from fastmask.reports.making import make_report
from fastmask.reports.sections import Gathered, Options, SkipError


def quick(study, found):
    found.skip(study, "nothing to do")


def fail(study, found):
    with found.attempt("part"):
        raise ValueError("no such thing")
    raise OSError(study)


def break_down(study, found):
    raise AssertionError("a bug")


def slow(study, found):
    time.sleep(300)


def tasks_of(*functions, strict=False):
    return [
        (str(at), Analysis(function.__name__, "", "", function), Options(strict=strict))
        for at, function in enumerate(functions)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers, monkeypatch):
    """No outcome is lost or handed to another task, and no error of one ends them all."""
    fork_pools(monkeypatch)
    found = dict(making._all_done(tasks_of(quick, fail, quick), workers))
    reasons = {at: [str(reason) for reason in skipped] for at, (_, skipped, _) in found.items()}
    assert reasons == {
        0: ["quick (0): nothing to do"],
        1: ["fail (part): no such thing", "fail: 1"],
        2: ["quick (2): nothing to do"],
    }


def test_long_tasks_come_first():
    """Analyses that run models must begin first, or the last process works alone for minutes."""
    tasks = [("", Analysis(analysis.name, "", "", quick), Options()) for analysis in ANALYSES]
    names = [ANALYSES[at].name for at, _ in making._all_done(tasks, 1)]
    assert names == ["conflict", "cross", "ablation", "effect", "overlap", "heads", "typology", "dynamics"]


def test_a_bug_is_no_reason_to_skip():
    """A mistake in the code must not look like a run that lacks something."""
    with pytest.raises(AssertionError, match="a bug"):
        list(making._all_done(tasks_of(break_down), 1))
    with pytest.raises(ValueError, match="no such thing"):
        list(making._all_done(tasks_of(fail, strict=True), 1))


def test_an_analysis_that_does_not_apply_is_none_that_failed():
    """Even where errors end everything, an analysis that does not apply must be listed."""
    found = Gathered("x", Options(strict=True))
    with found.attempt(""):
        raise SkipError("not here")
    assert [str(reason) for reason in found.skipped] == ["x: not here"]


def test_workers_end_when_interrupted(monkeypatch):
    """Ctrl-C leaves no process that works on for minutes."""
    fork_pools(monkeypatch)
    began = time.monotonic()

    def interrupted():
        for _ in making._all_done(tasks_of(quick, slow, slow), 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 100
    deadline = time.monotonic() + 20
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_pictures_of_one_analysis_have_one_scale():
    """Pictures side by side must not say different things by the same colour or length."""
    seen = []

    def draw(extent=None):
        seen.append(extent)
        return new_figure(1, 1)

    found = Gathered("x", Options())
    for extent in (1.0, 3.0, float("nan")):
        found.add("", Result("x", pd.DataFrame(), "", draw, extent=extent))
    found.sections()
    assert seen == [3.0, 3.0, None]


@pytest.mark.slow
def test_processes_make_the_same_report(static_run, tmp_path):
    """A report must not depend on how many processes made it."""
    options = Options(sentences=4)
    for workers in (1, 2):
        make_report([static_run], None, tmp_path / str(workers), options, workers=workers)
    for path in (tmp_path / "1").iterdir():
        if path.suffix == ".csv":
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
