"""The cases under pytest-benchmark, at small sizes: `pytest benchmarks --benchmark-only`.

One group for each case and part, one test for each implementation, proven equal before it is timed. Sides run one
after the other here, so that a machine whose speed moves shows in the differences; `python -m benchmarks` takes turns.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import Case, case_of
from benchmarks.setting import Setting

SETTINGS = [
    Setting("op", shape="small", unit="neurons"),
    Setting("op", shape="small", unit="blocks32"),
    Setting("op", shape="small", unit="weights"),
    Setting("attention", shape="small", unit="heads", present=8),
    Setting("encoder", shape="small", layers=2),
    Setting("encoder", shape="small", layers=2, present=8),
    Setting("inference", shape="small", layers=2, present=8),
    Setting("step", shape="small", layers=2, languages=8, present=8, batch=16, tokens=24),
    Setting("optimizer", shape="small", layers=2),
]


@cache
def proven(setting: Setting) -> Case:
    """The case, built and checked once."""
    torch.set_num_threads(setting.threads)
    case = case_of(setting.case)(setting)
    case.check()
    return case


def runs() -> list[pytest.param]:  # type: ignore[valid-type]
    """Every implementation of every part that applies, without building anything."""
    found = []
    for setting in SETTINGS:
        kind = case_of(setting.case)
        for part in kind.parts:
            for name in kind.implementations:
                if kind.why_not(setting, name) is None and not (name == "bsr" and part != "forward"):
                    found.append(pytest.param(setting, part, name, id=f"{setting.words()}, {part}, {name}"))
    return found


@pytest.mark.parametrize(("setting", "part", "name"), runs())
def test_speed(benchmark, setting, part, name):  # type: ignore[no-untyped-def]
    """Times one implementation; fails where it computes something else."""
    benchmark.group = f"{setting.words()}, {part}"
    side = proven(setting).sides(part)[name]
    benchmark.pedantic(side.run, setup=side.reset, rounds=15, warmup_rounds=3)
    side.reset()
