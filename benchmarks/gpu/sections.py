"""What `make gpu` measures, in the order of what it is worth, and what must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.cases.op import PARTS
from benchmarks.running import Job
from benchmarks.setting import BLOCKS, Setting
from benchmarks.targets import BOTH_WAYS, Target

__all__ = ["SECTIONS", "TARGETS", "tiny"]

GRAPH, HOST = f"{BOTH_WAYS} graph", f"{BOTH_WAYS} host-time"
RIVALS = ("fastmask", "packed", "loop", "gating")  # packed: the vendor's grouped product over each language's live rows
_COMMON: dict[str, Any] = {"present": 8, "dtype": "bfloat16-parameters"}
_SMALL: dict[str, Any] = {"shape": "small", "batch": 8, "tokens": 8}  # so small that only the host's time counts


def _op(unit: str, *parts: str, names: tuple[str, ...] = RIVALS, peaks: bool = False, **more: Any) -> Job:
    """One weight of 4096 x 4096 on 16,384 tokens of eight languages."""
    sizes = _COMMON | {"shape": "square", "batch": 32, "tokens": 512} | more
    return Job(Setting("op", unit=unit, **sizes), names, parts or (BOTH_WAYS,), peaks)


def _encoder(*parts: str, names: tuple[str, ...] = RIVALS, peaks: bool = False, **more: Any) -> Job:
    """BERT-base layers on 8,192 tokens of eight languages."""
    return Job(Setting("encoder", **(_COMMON | {"batch": 64} | more)), names, parts, peaks)


_ROWS_AND_COLUMNS = ("neurons", "neuron-inputs", "heads", "head-inputs")
UNITS = {unit: _op(unit, *(PARTS if unit == "neurons" else ())) for unit in _ROWS_AND_COLUMNS}
LAYERS = _encoder(BOTH_WAYS, GRAPH, peaks=True)
BLOCKS_LEFT = {density: _op("blocks64", *PARTS[:3], density=density, present=1) for density in (0.9, 0.7, 0.5, 0.3)}
BITS = {
    present: _op("weights", *PARTS, names=("fastmask", "multiply", "loop"), peaks=True, present=present)
    for present in (1, 8)
}
LAUNCHES = [
    _encoder(HOST, layers=1, **_SMALL),
    *(_op(unit, HOST, **_SMALL) for unit in (*_ROWS_AND_COLUMNS, "blocks64", "weights")),
]
SECTIONS: dict[str, list[Job]] = {
    "units": list(UNITS.values()),
    "encoder": [LAYERS],
    "blocks": list(BLOCKS_LEFT.values()),
    "bits": list(BITS.values()),
    "launches": LAUNCHES,
    "compiled": [
        _encoder(BOTH_WAYS, names=("fastmask", name), layers=1, compiled=True) for name in ("packed", "gating", "loop")
    ],
}
TARGETS: list[Target] = [
    *(Target(job, "over dense", 1.7) for job in UNITS.values()),
    *(Target(LAYERS, "over dense", 1.4, part) for part in (BOTH_WAYS, GRAPH)),
    *(Target(LAYERS, "speed", bound, against=(name,)) for name, bound in (("packed", 1), ("loop", 2), ("gating", 1))),
    *(Target(BLOCKS_LEFT[0.7], "over dense", 1.0, part) for part in ("forward", "dW")),
    *(Target(BITS[present], "over dense", 1 / time) for present, time in ((1, 1.15), (8, 1.25))),
    # y and dX of 128 MiB each, dW of 32 MiB, and one more copy of the weight.
    *(Target(job, "peak", 320 / 288) for job in BITS.values()),
    *(Target(job, "over dense", 0.5, HOST) for job in LAUNCHES),
]


def tiny(job: Job) -> Job:
    """A job to try the code out with, in Triton's interpreter on a CPU, which has no graphs."""
    sizes: dict[str, Any] = {"shape": "toy", "layers": 1, "languages": 2, "batch": 2, "tokens": 4, "dtype": "float32"}
    sizes |= {"present": min(job.setting.present, 2), "compiled": False}
    if job.setting.unit in BLOCKS:
        sizes["unit"] = "blocks32"
    parts = tuple(part for part in job.parts if part != GRAPH)
    return replace(job, setting=replace(job.setting, **sizes), parts=parts)
