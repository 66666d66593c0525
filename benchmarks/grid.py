"""Sweeps: the product of the settings given on the command line, for each of the cases named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from benchmarks.cases import case_of
from benchmarks.running import Job, see
from benchmarks.setting import DoesNotFitError, Setting

__all__ = ["SWEPT", "jobs_of", "values_of"]

# The fields of a setting that a sweep can run over.
SWEPT = ("shape", "layers", "unit", "density", "languages", "present", "batch", "tokens", "dtype")
_KINDS = get_type_hints(Setting)


def values_of(name: str, text: str) -> list[Any]:
    """The values of an option, as in "1,0.75,0.5".

    Raises:
        ValueError: one that is not a number where one is expected, or none at all.
    """
    kind, found = _KINDS[name], []
    for item in (part.strip() for part in text.split(",")):
        try:
            found.append(kind(item))
        except ValueError:
            expected = "a number" if kind is float else "a whole number"
            raise ValueError(f"--{name} {text}: {item!r} is not {expected}") from None
        if item == "":
            raise ValueError(f"--{name} {text!r} has an empty entry (expected values with commas between them)")
    return found


def jobs_of(
    cases: Sequence[str],
    swept: Mapping[str, Sequence[Any]],
    fixed: Mapping[str, Any],
    names: tuple[str, ...] | None,
    parts: tuple[str, ...] | None,
    peaks: bool,
) -> tuple[list[Job], list[str]]:
    """Every combination of the settings for every case, in order, and a line on each that was left out.

    A combination whose parts do not go together (more languages in a batch than examples, blocks that do not divide,
    too little memory) is left out as long as another one remains.

    Args:
        cases: names of cases.
        swept: values by field of the setting; a field that is not given has the case's default.
        fixed: what is the same for all: threads, device, compiled.
        names: implementations; None: all that apply.
        parts: of the cases; None: all.
        peaks: see `Job`.

    Raises:
        KeyError, ValueError: an unknown name, a number out of range, or nothing that goes together.
    """
    found: list[Job] = []
    left_out: list[str] = []
    for case in cases:
        given: dict[str, list[Any]] = {field.name: [field.default] for field in fields(Setting) if field.name in SWEPT}
        given |= {name: [value] for name, value in case_of(case).defaults.items()}
        given |= {name: list(values) for name, values in swept.items()}
        for values in itertools.product(*given.values()):
            try:
                setting = Setting(case, **dict(zip(given, values, strict=True)), **fixed)
                job = Job(setting, names, parts, peaks)
                see(job)
            except DoesNotFitError as error:
                left_out.append(f"left out: {error}")
                continue
            found.append(job)
    if not found:
        raise DoesNotFitError(left_out[0].removeprefix("left out: "))
    return found, left_out
