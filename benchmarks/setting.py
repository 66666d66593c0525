"""`Setting`: one point of a sweep, checked before anything is built."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastmask.errors import unknown

__all__ = ["BLOCKS", "SHAPES", "UNITS", "Setting", "Shape"]


class Shape(NamedTuple):
    """One Transformer layer: width of the residual stream, neurons, heads."""

    hidden: int
    ffn: int
    heads: int


SHAPES = {
    "toy": Shape(32, 64, 4),  # for tests
    "small": Shape(256, 1024, 8),  # the parser that `fastmask train` makes from scratch
    "minilm": Shape(384, 1536, 12),  # multilingual MiniLM and E5 small
    "bert-base": Shape(768, 3072, 12),
    "xlmr-large": Shape(1024, 4096, 16),
    "7b": Shape(4096, 11008, 32),  # a layer of a decoder of 7 billion parameters
    "square": Shape(4096, 4096, 32),  # one weight that fills a GPU
}
BLOCKS = {"blocks16": 16, "blocks32": 32, "blocks64": 64}  # the side of a block
UNITS = ("both", "heads", "head-inputs", "neurons", "neuron-inputs", *BLOCKS, "weights")
_CHOICES = {
    "shape": SHAPES,
    "unit": UNITS,
    "dtype": ("float32", "bfloat16", "bfloat16-parameters"),
    "device": ("cpu", "cuda"),
}
_WORDS = {"both": "heads + neurons", "weights": "single weights"}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        case: what runs; a name of `benchmarks.cases.CASES`.
        shape: a name of `SHAPES`.
        layers: of the model; one weight has no use for it.
        unit: what lives and dies as one; "both" is heads and neurons. Of one weight, "neurons" are rows, and
            "neuron-inputs" the columns that consume them; so with heads.
        density: share of the units that every language owns.
        languages: masks held.
        present: languages of the batch, in equal shares, sorted.
        batch: examples.
        tokens: of each example.
        dtype: of the products: float32, bfloat16 by autocast (parameters stay float32), or "bfloat16-parameters": all.
        compiled: whether every implementation runs under `torch.compile`.
        threads: of the CPU.
        device: "cpu" or "cuda".

    Raises:
        ValueError, KeyError: a number out of range, an unknown name.
    """

    case: str
    shape: str = "bert-base"
    layers: int = 4
    unit: str = "both"
    density: float = 0.5
    languages: int = 8
    present: int = 1
    batch: int = 8
    tokens: int = 128
    dtype: str = "float32"
    compiled: bool = False
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density:g} (expected above 0 and at most 1)")
        for name in ("layers", "languages", "present", "batch", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} (expected at least 1)")
        for name, what in (("languages", "the languages that masks are held for"), ("batch", "the examples")):
            if self.present > getattr(self, name):
                raise ValueError(f"present is {self.present} (expected at most {what}, {getattr(self, name)})")

    @property
    def sizes(self) -> Shape:
        """The sizes of a layer."""
        return SHAPES[self.shape]

    @property
    def parameters(self) -> torch.dtype:
        """The dtype of parameters, and of activations outside of autocast."""
        return torch.bfloat16 if self.dtype == "bfloat16-parameters" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward passes run in; it leaves float64 alone."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def ids(self) -> torch.Tensor:
        """The languages of the examples, int64 [batch], on the device."""
        return (torch.arange(self.batch) * self.present // self.batch).to(self.device)

    def words(self) -> str:
        """The setting in one line, as tables and errors name it."""
        mixed = "one language" if self.present == 1 else f"{self.present} languages in one batch"
        unit = _WORDS.get(self.unit, self.unit)
        parts = [f"{self.case} {self.shape}", f"{unit} at {self.density:.0%}", mixed]
        parts += [f"{self.batch} x {self.tokens} tokens", self.dtype, *(["compiled"] if self.compiled else [])]
        return ", ".join(parts)
