"""Analyses one after the other: all are done, and what goes wrong in one ends none of the others."""

from __future__ import annotations

import pandas as pd
import pytest

from fastmask import reports
from fastmask.analysis.drawing import new_figure
from fastmask.analysis.result import Result
from fastmask.reports.page import Part
from fastmask.reports.runs import Options, SkipError


def fail(part):
    with part.attempt("part"):
        raise ValueError("no such thing")
    raise OSError(part.study)


def break_down(part):
    raise AssertionError("a bug")


def test_what_goes_wrong_is_listed(monkeypatch):
    """An error of a run or its data is a reason; a mistake in the code is none, nor is anything where it is strict."""
    monkeypatch.setitem(reports.ANALYSES, "fail", fail)
    monkeypatch.setitem(reports.ANALYSES, "bug", break_down)
    part = Part("all", "fail")
    reports._fill(part)
    assert [str(reason) for reason in part.skipped] == ["fail (part): no such thing", "fail: all"]
    with pytest.raises(AssertionError, match="a bug"):
        reports._fill(Part("all", "bug"))
    with pytest.raises(ValueError, match="no such thing"):
        reports._fill(Part("all", "fail", Options(strict=True)))


def test_an_analysis_that_does_not_apply_is_none_that_failed():
    """Even where errors end everything, an analysis that does not apply must be listed."""
    found = Part("all", "x", Options(strict=True))
    with found.attempt(""):
        raise SkipError("not here")
    assert [str(reason) for reason in found.skipped] == ["x: not here"]


def test_pictures_of_one_analysis_have_one_scale():
    """Pictures side by side must not say different things by the same colour or length."""
    seen = []

    def draw(extent=None):
        seen.append(extent)
        return new_figure(1, 1)

    found = Part("all", "x")
    for extent in (1.0, 3.0, float("nan")):
        found.add("", Result("x", pd.DataFrame(), "", draw, extent=extent))
    found.draw()
    assert seen == [3.0, 3.0, None]
