"""The cases under pytest-benchmark, at small sizes, each proven equal first: `pytest benchmarks --benchmark-only`.

Sides run one after the other here, so a machine whose speed moves shows in the differences.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import CASES
from benchmarks.row import Setting

SETTINGS = [
    *(Setting("op", shape="small", unit=unit, threads=1) for unit in ("neurons", "blocks32", "weights")),
    *(Setting(case, shape="small", layers=2, present=8, threads=1) for case in ("encoder", "step")),
]


@cache
def proven(setting):  # type: ignore[no-untyped-def]
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
    benchmark.group = f"{setting.words()}, {part}"
    side = proven(setting).sides(part)[name]
    benchmark.pedantic(side.run, setup=side.reset, rounds=15, warmup_rounds=3)
    side.reset()
