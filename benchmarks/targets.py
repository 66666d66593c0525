"""What the measurements must show, as numbers: `python -m benchmarks targets` fails where one is missed.

The first fourteen are of float32 on two cores; what a machine with more cores reaches is its own matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import NOISY
from benchmarks.row import Row
from benchmarks.running import Job, Measured
from benchmarks.setting import SHAPES, Setting

__all__ = ["GROWTHS", "TARGETS", "Growth", "Reading", "Target", "reading_of_rows"]

BOTH_WAYS = "forward+backward"
MASKED = ("dense", "fastmask", "full")
DENSE = ("dense", "full")


@dataclass(frozen=True)
class Reading:
    """A measured value and its quartiles, which are None for what is counted, not timed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether the quartiles lie too far apart to conclude."""
        return self.low is not None and self.high is not None and self.high - self.low > NOISY * self.value


@dataclass(frozen=True)
class Target:
    """One number to be reached.

    Attributes:
        what: it is, in a few words.
        job: what is measured.
        part: of the case.
        metric: "speed", ratio to `against` (the least of them, if these are several; default: to the baseline);
            "share", of the FLOP-ideal; "time", the inverse of speed; "saved" and "peak", bytes over the baseline's.
            Shares and times are held against the faster of two dense models: PyTorch's, and the full network through
            the library, which may multiply matrices faster than PyTorch does.
        bound: the value asked for: at least, or at most for time and bytes.
        of: the implementation.
        against: see `metric`.
    """

    what: str
    job: Job
    part: str
    metric: str
    bound: float
    of: str = "fastmask"
    against: tuple[str, ...] = ()

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.metric in ("speed", "share")

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What must be measured for it."""
        return (self.job,)

    def is_in(self, found: Measured) -> bool:
        """Whether rows of all that it compares are there."""
        return found.has((self.of, *self.against), self.part)

    def reached(self, reading: Reading) -> bool:
        """Whether a value is as asked for."""
        return reading.value >= self.bound if self.at_least else reading.value <= self.bound

    def reading(self, measured: Sequence[Measured]) -> Reading:
        """The value, of what was measured."""
        (found,) = measured
        if not self.against or not found.times:  # stored rows have none
            return reading_of_rows(self, found.rows)
        ratios = [found.ratio(self.of, other, self.part) for other in self.against]
        least = min(ratios, key=lambda ratio: ratio.median)
        if self.metric == "time":
            return Reading(1 / least.median, 1 / least.high, 1 / least.low)
        scale = (found.row(self.of, self.part).ideal or 1.0) if self.metric == "share" else 1.0
        return Reading(least.median / scale, least.low / scale, least.high / scale)


def reading_of_rows(target: Target, rows: Sequence[Row]) -> Reading:
    """The value of a target, of the rows of its job.

    Against something else than the baseline it has no quartiles: rows do not say how far two ratios moved together.
    """
    own, base = (
        next(row for row in rows if row.implementation == name and row.part == target.part)
        for name in (target.of, rows[0].baseline)
    )
    if target.metric in ("saved", "peak"):
        ours, theirs = (getattr(row, f"{target.metric}_mib") for row in (own, base))
        return Reading(ours / theirs)
    others = [row.ratio for row in rows if row.part == target.part and row.implementation in target.against]
    fastest = max(others, default=1.0)
    scale = own.ideal if target.metric == "share" and own.ideal is not None else 1.0

    def value(ratio: float) -> float:
        return 1 / ratio if target.metric == "time" else ratio / scale

    if fastest != 1.0:
        return Reading(value(own.ratio / fastest))
    return Reading(value(own.ratio), *sorted((value(own.ratio_low), value(own.ratio_high))))


@dataclass(frozen=True)
class Growth:
    """How our time over the baseline's, or our bytes, grow with a size: at most like its power `bound`.

    Attributes:
        what: it is, in a few words.
        jobs: the same at several sizes, smallest first.
        sizes: of each job.
        part: of the case.
        metric: "time", relative to the baseline's at the same size; "masks" or "saved", bytes.
        bound: the exponent asked for, at most; 1 is linear, 0 does not grow.
    """

    what: str
    jobs: tuple[Job, ...]
    sizes: tuple[float, ...]
    part: str
    metric: str
    bound: float

    @property
    def at_least(self) -> bool:
        """Less is better."""
        return False

    def is_in(self, found: Measured) -> bool:
        """Whether our row is there."""
        return found.has(("fastmask",), self.part)

    def reached(self, reading: Reading) -> bool:
        """Whether an exponent is as asked for."""
        return reading.value <= self.bound

    def reading(self, measured: Sequence[Measured]) -> Reading:
        """The exponent between the smallest and the largest size."""
        first, last = (self._values(found) for found in (measured[0], measured[-1]))
        scale = math.log(self.sizes[-1] / self.sizes[0])
        exponents = [math.log(b / a) / scale for a, b in zip(first, last, strict=True)]
        return Reading(*exponents)

    def _values(self, found: Measured) -> tuple[float, ...]:
        row = found.row("fastmask", self.part)
        if self.metric == "time":
            return (1 / row.ratio,)
        size = row.masks_mib if self.metric == "masks" else row.saved_mib
        assert size is not None
        return (size,)


def encoder(density: float, present: int = 1, batch: int = 8, names: tuple[str, ...] = MASKED, **more: Any) -> Job:
    """An encoder of BERT-base shape and 4 layers that holds 8 languages (or as many as the batch has)."""
    sizes: dict[str, Any] = {"density": density, "languages": max(8, present), "present": present, "batch": batch}
    return Job(Setting("encoder", **sizes, **more), names)


def op(unit: str, density: float, present: int = 1, parts: tuple[str, ...] | None = None, **more: Any) -> Job:
    """The up projection of BERT-base on 8 x 128 tokens."""
    return Job(Setting("op", unit=unit, density=density, languages=8, present=present), MASKED, parts, **more)


def _bits(density: float) -> Job:
    return op("weights", density, parts=(BOTH_WAYS,))


def _twice(what: str, job: Job, metric: str, bound: float, part: str = BOTH_WAYS) -> list[Target]:
    """Against the dense model as PyTorch runs it, and against the faster of that and ours without masks.

    The first is what a user gains; the second leaves out what faster products give, and keeps what masks give.
    """
    return [
        Target(f"{what}; over dense", job, part, metric, bound),
        Target(f"{what}; over the faster of dense and full", job, part, metric, bound, against=DENSE),
    ]


def _shares(name: str, bounds: dict[float, float], **sizes: Any) -> list[Target]:
    return [
        target
        for density, bound in bounds.items()
        for target in _twice(f"{name}, {density:.0%}", encoder(density, **sizes), "share", bound)
    ]


_MIXED: dict[str, Any] = {"present": 8, "batch": 16}
_OF_32 = Job(Setting("encoder", languages=32, present=32, batch=32), ("dense", "fastmask", "loop", "gating"))
_STEP = Job(Setting("step", languages=8, present=8, batch=32, tokens=24), ("dense", "fastmask", "full", "data"))
_EPISODE = Job(Setting("episode", languages=2, present=2, batch=20, tokens=32), peaks=True)
_FINETUNED: dict[str, dict[str, Any]] = {
    "10% of heads and neurons, one language": {"density": 0.1},
    "10% of heads and neurons, 8 languages": {"density": 0.1, **_MIXED},
    "5% of single weights, one language": {"unit": "weights", "density": 0.05},
    "5% of single weights, 8 languages": {"unit": "weights", "density": 0.05, **_MIXED},
}
_MIXED_BITS = op("weights", 0.5, 8, (BOTH_WAYS,), peaks=True)

TARGETS: list[Target] = [
    *_shares("encoder, one language", {0.75: 0.97, 0.5: 0.96, 0.25: 0.93, 0.1: 0.85}),
    *_shares("encoder, 8 languages, 16 x 128", {0.75: 0.88, 0.5: 0.86, 0.25: 0.80, 0.1: 0.65}, **_MIXED),
    *_shares("encoder, 8 languages, 32 x 128", {0.75: 0.95, 0.5: 0.94, 0.25: 0.90, 0.1: 0.78}, present=8, batch=32),
    Target(
        "encoder, 32 languages, one example each: against the better of loop and gating",
        _OF_32,
        BOTH_WAYS,
        "speed",
        1.2,
        against=("loop", "gating"),
    ),
    *(
        target
        for part in ("forward", "dX", "dW", BOTH_WAYS)
        for target in _twice(f"blocks of 64 at 80%, {part}", op("blocks64", 0.8), "speed", 1.0, part)
    ),
    *(
        target
        for density in (0.9, 0.5, 0.1)
        for target in _twice(
            f"single weights at {density:.0%}", op("weights", density, parts=(BOTH_WAYS,)), "time", 1.08
        )
    ),
    *_twice("single weights at 50%, 8 languages mixed", _MIXED_BITS, "time", 1.25),
    # Dense takes 24 MiB (x, y, their gradients, dW); with 8 copies of the weight it would be four times as much.
    Target("the same: most memory at once over dense", _MIXED_BITS, BOTH_WAYS, "peak", 2.0),
    *_twice("compiled encoder, one language, 50%", encoder(0.5, compiled=True), "share", 0.96),
    *_twice("compiled encoder, 8 languages, 50%", encoder(0.5, compiled=True, **_MIXED), "share", 0.86),
    *_twice("bfloat16 encoder, one language, 50%", encoder(0.5, dtype="bfloat16"), "share", 0.96),
    *_twice("bfloat16 encoder, 8 languages, 50%", encoder(0.5, dtype="bfloat16", **_MIXED), "share", 0.86),
    *_twice("training step of the parser, 50%", _STEP, "speed", 1.6, "ten steps"),
    Target("the same: step over what its data take", _STEP, "ten steps", "speed", 10, of="data", against=("fastmask",)),
    # A published script calls `loss.backward()`, which computes every gradient; "multiply" in the table does not.
    Target(
        "discovery of 8 languages, against multiplying by zero and a plain backward pass",
        Job(Setting("discovery", shape="small", density=0.35, batch=32, tokens=20)),
        "rounds",
        "speed",
        2.0,
        against=("multiply-all",),
    ),
    Target("FOMAML episode, 2 languages", _EPISODE, "episode", "speed", 2.0),
    Target("the same: most memory at once", _EPISODE, "episode", "peak", 0.5),
    *(
        Target(f"step of sparse fine-tuning, {what}", Job(Setting("finetune", **sizes)), "step", "speed", 1.25)
        for what, sizes in _FINETUNED.items()
    ),
    Target("optimiser step, one language, 50%", Job(Setting("optimizer")), "step", "time", 1.3),
    # What the README has shown so far.
    Target("encoder at 50%, one language: speed", encoder(0.5), BOTH_WAYS, "speed", 1.9),
    Target("encoder at 25%, one language: speed", encoder(0.25), BOTH_WAYS, "speed", 3.5),
    Target("encoder at 50%, 8 languages, 16 x 128: speed", encoder(0.5, **_MIXED), BOTH_WAYS, "speed", 1.55),
    Target("encoder at 50%, one language: memory kept for backward", encoder(0.5), BOTH_WAYS, "saved", 0.62),
]


HELD = (1, 8, 32, 100)
LENGTHS = (16, 32, 64, 128, 256, 512)
WIDTHS = ("small", "bert-base", "xlmr-large", "7b")


def _grown(what: str, settings: Sequence[Setting], sizes: Sequence[float], metric: str, bound: float) -> Growth:
    jobs = tuple(Job(setting, MASKED, (BOTH_WAYS,)) for setting in settings)
    return Growth(what, jobs, tuple(map(float, sizes)), BOTH_WAYS, metric, bound)


def _held(unit: str) -> list[Setting]:
    return [Setting("op", unit=unit, languages=held) for held in HELD]


# Time is relative to dense at the same size, so 0 is linear where dense is. A tenth is left for noise.
GROWTHS: list[Growth] = [
    _grown("time over languages held, one in the batch", _held("neurons"), HELD, "time", 0.1),
    _grown(
        "time over languages of the batch, one example each",
        [Setting("op", unit="neurons", languages=n, present=n, batch=n) for n in HELD], HELD, "time", 0.1,
    ),
    _grown(
        "time over tokens of an example, 8 languages",
        [Setting("op", unit="neurons", present=8, tokens=n) for n in LENGTHS], LENGTHS, "time", 0.1,
    ),
    _grown(
        "time over the width of the model",
        [Setting("op", unit="neurons", shape=name) for name in WIDTHS],
        [SHAPES[name].hidden for name in WIDTHS], "time", 0.1,
    ),
    _grown("bytes of masks over languages held, neurons", _held("neurons"), HELD, "masks", 1.05),
    _grown("bytes of masks over languages held, single weights", _held("weights"), HELD, "masks", 1.05),
]  # fmt: skip
