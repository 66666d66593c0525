"""One masked weight: forward, dX and dW, apart and together, as an attached model runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

import fastmask as fm
from benchmarks.baselines import why_not
from benchmarks.cases.case import DENSE, Case
from benchmarks.measure import Side
from benchmarks.memory import cache_bytes
from benchmarks.product import PARTS, Product, units_of
from benchmarks.setting import BLOCKS, Setting

__all__ = ["Op", "kind_of", "mask_of", "unit_of", "weight_shape"]

MOST_COPIES = 8


class Op(Case):
    """One projection; masks over rows and columns run packed.

    Neurons are rows of the up projection [ffn, hidden], as blocks and weights are masked there; "neuron-inputs" are
    columns of the down projection. Heads are rows of a square projection, "head-inputs" the columns that take them.
    """

    name = "op"
    units = ("neurons", "neuron-inputs", "heads", "head-inputs", *BLOCKS, "weights")
    parts = PARTS
    implementations = (*DENSE, "fastmask", "multiply", "loop", "gating", "packed", "bsr")
    defaults: ClassVar[dict[str, Any]] = {"unit": "neurons"}
    can = ("compiled", "bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        mask = mask_of(setting)
        N, K = mask.out_features, mask.in_features
        copies = 1 + 2 * cache_bytes(setting.torch_device) // (4 * (self.tokens * (N + K) + N * K))
        self.product = Product(
            mask, setting.ids(), setting.tokens, setting.torch_device, setting.parameters,
            autocast=setting.autocast, compiled=setting.compiled, copies=min(MOST_COPIES, copies),
        )  # fmt: skip

    @classmethod
    def refuse(cls, setting: Setting, names: Sequence[str] = (), parts: Sequence[str] = ()) -> None:
        """Blocks must divide the weight."""
        super().refuse(setting, names, parts)
        side = unit_of(setting) if setting.unit in BLOCKS else 1
        if any(size % side for size in weight_shape(setting)):
            raise ValueError(
                f"{setting.unit} do not divide a weight of {weight_shape(setting)} (shape {setting.shape})"
            )

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """By the kind of the mask."""
        return why_not(name, kind_of(setting.unit), setting.present, setting.dtype, setting.compiled)

    def check(self) -> None:
        """Ours by the rule of the tests; every rival within rounding."""
        self.product.check()
        for name in self.chosen:
            if name not in ("dense", "fastmask"):
                self.product.check_against(name)

    def sides(self, part: str) -> dict[str, Side]:
        """Block-sparse rows only run forward."""
        return {name: self.product.side(part, name) for name in self.chosen if part == "forward" or name != "bsr"}

    def ideal(self, name: str) -> float:
        """Dense FLOPs over live ones; 1 for single weights, whose product stays dense."""
        return 1.0 if name in DENSE or self.setting.unit == "weights" else self.product.dense_flops / self.product.flops

    def mask_bytes(self) -> int:
        """All languages' masks."""
        return self.product.mask.nbytes


def kind_of(unit: str) -> str:
    """The kind of `fastmask.Mask` of a unit."""
    if unit in BLOCKS or unit == "weights":
        return "blocks" if unit in BLOCKS else unit
    return "columns" if unit.endswith("inputs") else "rows"


def unit_of(setting: Setting) -> int:
    """Rows or columns that live and die together, or the side of a block."""
    head = setting.sizes.hidden // setting.sizes.heads
    return head if setting.unit.startswith("head") else BLOCKS.get(setting.unit, 1)


def weight_shape(setting: Setting) -> tuple[int, int]:
    """[N, K] of the projection that carries a unit."""
    hidden, ffn = setting.sizes.hidden, setting.sizes.ffn
    if setting.unit.startswith("head"):
        return (hidden, hidden)
    return (hidden, ffn) if setting.unit == "neuron-inputs" else (ffn, hidden)


def mask_of(setting: Setting) -> fm.Mask:
    """Random masks of all languages."""
    (N, K), L, density, kind = weight_shape(setting), setting.languages, setting.density, kind_of(setting.unit)
    side = unit_of(setting)
    if kind == "rows":
        return fm.Mask.rows(units_of(L, N, side, density), K)
    if kind == "columns":
        return fm.Mask.columns(units_of(L, K, side, density), N)
    if kind == "weights":
        return fm.Mask.weights(torch.rand(L, N, K, generator=torch.Generator().manual_seed(0)) < density)
    keep = units_of(L, N // side * (K // side), 1, density).reshape(L, N // side, K // side)
    return fm.Mask.blocks(keep, (side, side))
