"""The cases under pytest-benchmark, at small sizes: `pytest benchmarks --benchmark-only`.

One group for each case and part, one test for each implementation, proven equal before it is timed. Sides run one
after the other here, so that a machine whose speed moves shows in the differences; `python -m benchmarks` takes turns.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import CASES, Case
from benchmarks.setting import Setting

SETTINGS = [
    *(Setting("op", shape="small", unit=unit, threads=1) for unit in ("neurons", "blocks32", "weights")),
    *(Setting(case, shape="small", layers=2, present=8, threads=1) for case in ("encoder", "step")),
]


@cache
def proven(setting: Setting) -> Case:
    """The case, built and checked once."""
    torch.set_num_threads(setting.threads)
    case = CASES[setting.case](setting)
    case.check()
    return case


RUNS = [
    pytest.param(setting, part, name, id=f"{setting.words()}, {part}, {name}")
    for setting in SETTINGS
    for part in CASES[setting.case].parts
    for name in CASES[setting.case].implementations
    if CASES[setting.case].why_not(setting, name) is None and not (name == "bsr" and part != "forward")
]


@pytest.mark.parametrize(("setting", "part", "name"), RUNS)
def test_speed(benchmark, setting, part, name):  # type: ignore[no-untyped-def]
    """Times one implementation; fails where it computes something else."""
    benchmark.group = f"{setting.words()}, {part}"
    side = proven(setting).sides(part)[name]
    benchmark.pedantic(side.run, setup=side.reset, rounds=15, warmup_rounds=3)
    side.reset()
