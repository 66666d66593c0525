"""Where and at which sizes the measurements run: the real ones on a GPU, tiny ones to try the code out on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.report import Row

__all__ = ["REAL", "TINY", "Measurement", "Setup", "has_grouped"]


@dataclass(frozen=True)
class Setup:
    """Sizes of all measurements; one layer is [width, width] on `examples` x `tokens` tokens."""

    device: torch.device
    dtype: torch.dtype
    seconds: float  # for one comparison
    languages: int
    examples: int
    tokens: int
    width: int
    head: int  # units of a head in the layer rows
    block: int
    sparsities: tuple[float, ...]
    encoder_examples: int
    encoder_tokens: int
    hidden: int
    ffn: int
    heads: int
    encoder_layers: int
    compiler: str  # of torch.compile
    ceiling: int  # sides of the largest product
    copied: int  # bytes
    layout_languages: int
    sweep_seconds: float


REAL = Setup(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    seconds=0.6,
    languages=8,
    examples=32,
    tokens=512,
    width=4096,
    head=128,
    block=64,
    sparsities=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9),
    encoder_examples=64,
    encoder_tokens=128,
    hidden=768,
    ffn=3072,
    heads=12,
    encoder_layers=4,
    compiler="inductor",
    ceiling=8192,
    copied=2**30,
    layout_languages=100,
    sweep_seconds=85,
)

TINY = Setup(
    device=torch.device("cpu"),
    dtype=torch.float32,
    seconds=0.01,
    languages=3,
    examples=4,
    tokens=4,
    width=64,
    head=16,
    block=32,
    sparsities=(0.0, 0.5, 0.9),
    encoder_examples=3,
    encoder_tokens=4,
    hidden=32,
    ffn=48,
    heads=4,
    encoder_layers=1,
    compiler="eager",
    ceiling=64,
    copied=2**10,
    layout_languages=3,
    sweep_seconds=1,
)


@dataclass(frozen=True)
class Measurement:
    """One thing to measure, by name; running it gives rows, and it may fail without harm to the others."""

    name: str
    run: Callable[[], list[Row]]


def has_grouped(setup: Setup) -> bool:
    """Whether this PyTorch has the vendor's grouped product, which has a fast path for bfloat16 only."""
    return hasattr(torch.nn.functional, "grouped_mm") and setup.dtype == torch.bfloat16
