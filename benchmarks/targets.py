"""What must hold, for `python -m benchmarks targets`; and `QUICK`, what the README shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases.op import PARTS
from benchmarks.row import Job, Row, Setting

BOTH_WAYS = PARTS[-1]
PASS = "pass"


@dataclass(frozen=True)
class Target:
    """One number to be reached.

    `metric` is at least "over dense", "over full", "share" (of the ideal, of our dense) or "speed" (over `against`); at
    most "kept" or "peak", bytes over those of `against`.
    """

    job: Job
    metric: str
    bound: float
    part: str = BOTH_WAYS
    of: str = "fastmask"  # the implementation
    against: tuple[str, ...] = ("dense",)  # the fastest (leanest) of these

    @property
    def words(self) -> str:
        """What is asked for, as a table says it."""
        rivals = f" over {' and '.join(self.against)}" if self.against != ("dense",) else ""
        return f"{self.metric}{rivals} {'<=' if self.metric in ('kept', 'peak') else '>='} {self.bound:.2f}"

    def asks(self, row: Row) -> bool:
        """Whether it is about this row, whatever it was measured on."""
        job = self.job.on(row.setting.threads, row.setting.device)
        return (job.setting, self.part, self.of) == row.key

    def verdict(self, rows: Sequence[Row]) -> tuple[float | None, str]:
        """What was reached, and whether that is enough; of several rivals the least favourable counts."""
        value = self._value(rows)
        if value is None:
            return None, "not measured"
        good = value <= self.bound if self.metric in ("kept", "peak") else value >= self.bound
        return value, PASS if good else "SHORT"

    def _value(self, rows: Sequence[Row]) -> float | None:
        ours = next((row for row in rows if self.asks(row)), None)
        if ours is None:
            return None
        if self.metric == "share":
            return ours.share
        if self.metric in ("over dense", "over full"):
            speed = ours.over_dense if self.metric == "over dense" else ours.over_full
            return speed and speed.middle
        alike = {row.implementation: row for row in rows if (row.setting, row.part) == (ours.setting, ours.part)}
        if not set(self.against) <= set(alike):
            return None
        rivals = [alike[name] for name in self.against]
        if self.metric == "speed":
            return min(row.ms.middle for row in rivals) / ours.ms.middle
        own, *others = (getattr(row, f"{self.metric}_mib") for row in (ours, *rivals))
        return None if None in (own, *others) else own / min(others)


def _encoder(density: float = 0.5, names: tuple[str, ...] = (), **more: Any) -> Job:
    return Job(Setting("encoder", density=density, **more), ("fastmask", *names))


def _op(unit: str, density: float, *parts: str, peaks: bool = False, **more: Any) -> Job:
    return Job(Setting("op", unit=unit, density=density, **more), ("fastmask",), parts or (BOTH_WAYS,), peaks)


MIXED: dict[str, Any] = {"present": 8, "batch": 16}
QUICK = [
    _encoder(names=("multiply", "gating", "packed", "compact")),
    _encoder(names=("loop", "gating", "packed"), **MIXED),
]
_MIXED_BITS = _op("weights", 0.5, present=8, peaks=True)
_EPISODE = Job(Setting("episode", languages=2, present=2, batch=20, tokens=32), ("fastmask", "multiply"), peaks=True)
_SHARES: list[tuple[dict[str, Any], dict[float, float]]] = [
    ({}, {0.75: 0.97, 0.5: 0.96, 0.25: 0.93, 0.1: 0.85}),
    (MIXED, {0.75: 0.88, 0.5: 0.86, 0.25: 0.80, 0.1: 0.65}),
    ({"present": 8, "batch": 32}, {0.75: 0.95, 0.5: 0.94, 0.25: 0.90, 0.1: 0.78}),
    ({"compiled": True}, {0.5: 0.96}),
    ({"compiled": True, **MIXED}, {0.5: 0.86}),
    ({"dtype": "bfloat16"}, {0.5: 0.96}),
    ({"dtype": "bfloat16", **MIXED}, {0.5: 0.86}),
]

TARGETS: list[Target] = [
    *(Target(_encoder(density, **more), "share", bound) for more, own in _SHARES for density, bound in own.items()),
    Target(_encoder(), "over dense", 1.9),
    Target(_encoder(), "kept", 0.62),
    Target(_encoder(0.25), "over dense", 3.5),
    Target(_encoder(**MIXED), "over dense", 1.55),
    Target(
        _encoder(names=("loop", "gating"), languages=32, present=32, batch=32), "speed", 1.2, against=("loop", "gating")
    ),
    *(Target(_op("blocks64", 0.8, *PARTS), "over full", 1.0, part) for part in PARTS),
    *(Target(_op("weights", density), "over full", 1 / 1.08) for density in (0.9, 0.5, 0.1)),
    Target(_MIXED_BITS, "over full", 1 / 1.25),
    # Dense takes 24 MiB (x, y, their gradients, dW); with 8 copies of the weight it would be four times as much.
    Target(_MIXED_BITS, "peak", 2.0),
    *(
        Target(Job(Setting("step", **sizes), ("sparse", "multiply")), "over dense", 1.25, "step", "sparse")
        for unit in ({"density": 0.1}, {"unit": "weights", "density": 0.05})
        for sizes in (unit, unit | MIXED)
    ),
    Target(Job(Setting("step", **MIXED), ("fastmask", "live")), "over dense", 1.6, "step", "live"),
    Target(_EPISODE, "speed", 2.0, "episode", against=("multiply",)),
    Target(_EPISODE, "peak", 0.5, "episode", against=("multiply",)),
]
