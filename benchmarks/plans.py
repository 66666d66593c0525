"""Named lists of measurements: `quick` for every machine and the README, `targets`, `growth`, and `full` (hours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.cases import CASES
from benchmarks.grid import jobs_of
from benchmarks.running import Job
from benchmarks.setting import DTYPES, DoesNotFitError, Setting
from benchmarks.targets import BOTH_WAYS, GROWTHS, LENGTHS, MASKED, TARGETS, WIDTHS, encoder

__all__ = ["PLANS", "placed"]

DENSITIES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05)
HELD_AND_PRESENT = ((1, 1), (8, 8), (32, 32), (100, 1))


def quick() -> list[Job]:
    """What the README shows."""
    one, mixed = (*MASKED, "multiply", "gating", "compact"), (*MASKED, "loop", "gating")
    weights = Setting("op", unit="weights", languages=8)
    return [
        encoder(0.5, names=one),
        encoder(0.25),
        encoder(0.5, present=8, batch=16, names=mixed),
        Job(weights, (*MASKED, "multiply"), (BOTH_WAYS,)),
        Job(replace(weights, unit="blocks64"), (*MASKED, "multiply"), (BOTH_WAYS,)),
    ]


def targets() -> list[Job]:
    """What every target and every growth needs, each once."""
    return list(dict.fromkeys(job for wanted in (TARGETS, GROWTHS) for target in wanted for job in target.jobs))


def growth() -> list[Job]:
    """Time and bytes against languages, tokens and width."""
    return list(dict.fromkeys(job for grown in GROWTHS for job in grown.jobs))


def full() -> list[Job]:
    """Every case over density, languages and units, then over tokens, shapes and dtypes at 50%; takes hours."""
    found: list[Job] = []
    units = {
        "op": CASES["op"].units,
        "layer": ("neurons",),
        "attention": ("heads",),
        "encoder": ("both", "heads", "neurons"),
        "inference": ("both",),
    }
    for case, own in units.items():
        for held, present in HELD_AND_PRESENT:
            sizes = {"languages": [held], "present": [present], "batch": [max(8, present)]}
            found += _fitting(case, {"unit": own, "density": DENSITIES, **sizes})
        mixed: dict[str, Sequence[Any]] = {"unit": own, "languages": [8], "present": [8]}
        for name, values in (("tokens", LENGTHS), ("shape", WIDTHS), ("dtype", DTYPES)):
            found += _fitting(case, {**mixed, name: values})
    for case in ("step", "discovery", "episode", "optimizer"):
        found += _fitting(case, {})
    return list(dict.fromkeys(found))


def _fitting(case: str, swept: Mapping[str, Sequence[Any]]) -> list[Job]:
    """The jobs of a sweep that go together and fit into this machine's memory."""
    try:
        jobs, _ = jobs_of([case], swept, {}, None, None, False)
    except DoesNotFitError:
        return []
    return jobs


PLANS: dict[str, Callable[[], list[Job]]] = {"quick": quick, "targets": targets, "growth": growth, "full": full}


def placed(job: Job, threads: int, device: str) -> Job:
    """A plan's job on this machine."""
    return replace(job, setting=replace(job.setting, threads=threads, device=device))
