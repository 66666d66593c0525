"""One masked weight: forward, dX and dW, apart and together, as an attached model runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import BASELINES, Task, why_not
from benchmarks.cases.case import DENSE, Case
from benchmarks.measure import Side
from benchmarks.setting import BLOCKS, Setting
from fastmask.masks import UNPACKED
from fastmask.operators import compute
from fastmask.torch_path.naive import masked_linear_naive

__all__ = ["PARTS", "Op", "kind_of", "mask_of", "mask_over", "unit_of", "weight_shape"]

PARTS = ("forward", "dX", "dW", "forward+backward")
PACKED = ("fastmask", "packed")  # what runs on operands as the layer before, or behind, leaves them
MOST_COPIES, CACHE = 8, 128 * 2**20  # operands take turns, so that no run finds its own in a cache of so many bytes
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Op(Case):
    """One projection; masks over rows and columns run packed.

    Neurons are rows of the up projection [ffn, hidden], as blocks and weights are masked there; "neuron-inputs" are
    columns of the down projection. Heads are rows of a square projection, "head-inputs" the columns that take them.
    """

    name = "op"
    units = ("neurons", "neuron-inputs", "heads", "head-inputs", *BLOCKS, "weights")
    parts = PARTS
    implementations = (*DENSE, "fastmask", "multiply", "loop", "gating", "packed", "bsr")
    results_are = ("y", "dX", "dW", "db")
    defaults: ClassVar[dict[str, Any]] = {"unit": "neurons"}
    can = ("compiled", "bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        super().__init__(setting, names)
        self.mask, self.ids = mask_of(setting).to(setting.device), setting.ids()
        self.masks = {"": self.mask}
        self.width = max(self.mask.live_counts()) if self.mask.kind in ("rows", "columns") else UNPACKED
        self.task = Task(self.mask, self.ids)
        N, K = weight_shape(setting)
        copies = 1 + 2 * CACHE // (4 * (self.tokens * (N + K) + N * K))
        self.operands = [self._operands() for _ in range(min(MOST_COPIES, copies))]
        self.functions = {name: self.as_timed(self.function(name)) for name in self.chosen}

    @classmethod
    def refuse(cls, setting: Setting, names: Sequence[str] = (), parts: Sequence[str] = ()) -> None:
        super().refuse(setting, names, parts)
        shape, side = weight_shape(setting), unit_of(setting) if setting.unit in BLOCKS else 1
        if any(size % side for size in shape):
            raise ValueError(f"{setting.unit} do not divide a weight of {shape} (shape {setting.shape})")

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        return why_not(name, kind_of(setting.unit), setting.present, setting.dtype, setting.compiled)

    def _operands(self) -> list[Tensor]:
        """Random x, weight, bias and upstream gradient."""
        (N, K), setting = weight_shape(self.setting), self.setting
        shapes = (setting.batch, setting.tokens, K), (N, K), (N,), (setting.batch, setting.tokens, N)
        x, weight, *others = (torch.randn(*shape, device=setting.device, dtype=setting.parameters) for shape in shapes)
        return [x, weight / K**0.5, *others]

    def _of(self, name: str, operands: list[Tensor]) -> list[Tensor]:
        """The operands as an implementation takes them: live units only, where it takes x or makes y packed."""
        x, weight, bias, dy = operands
        if name in PACKED and self.mask.kind == "columns":
            x = x.take_along_dim(self._live(), 2)
        if name in PACKED and self.mask.kind == "rows":
            dy = dy.take_along_dim(self._live(), 2)
        return [x, weight, bias, dy]

    def _live(self) -> Tensor:
        """The units of each example's language, int64 [B, 1, width]: all languages own equally many."""
        return self.mask.index[self.ids, None, : self.width]

    def function(self, name: str) -> Function:
        """An implementation, of (x, weight, bias)."""
        mask, width, ids, none = self.mask, self.width, self.ids, torch.full_like(self.ids, -1)
        if name == "fastmask":  # the library's function for layers that were checked once
            return lambda x, weight, bias: compute(x, weight, mask, ids, bias, width)
        if name == "full":
            return lambda x, weight, bias: compute(x, weight, mask, none, bias, UNPACKED)
        if name == "naive":  # the definition of a masked layer, too slow to time
            return lambda x, weight, bias: masked_linear_naive(x, weight, mask, ids, bias)
        baseline, task = BASELINES[name], self.task
        return lambda x, weight, bias: baseline(x, weight, task, bias)

    def references(self, name: str) -> tuple[str, str]:
        return ("dense", "dense") if name in DENSE else ("naive", "loop")

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        function = self.functions[name] if dtype is None else self.as_timed(self.function(name), eager=True)
        *leaves, dy = (t.detach().to(dtype or t.dtype) for t in self._of(name, self.operands[0]))
        y = function(*(leaf.requires_grad_() for leaf in leaves))
        if name == "bsr":  # which has no backward pass
            return [y.detach()]
        y, dx, *others = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
        if name in PACKED and self.mask.kind == "rows":
            y = self._spread(y)
        if name in PACKED and self.mask.kind == "columns":
            dx = self._spread(dx)
        return [y, dx, *others]

    def _spread(self, packed: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, N or K], zeros where an example owns nothing."""
        size = self.mask.out_features if self.mask.kind == "rows" else self.mask.in_features
        full = packed.new_zeros(*packed.shape[:-1], size)
        return full.scatter(2, self._live().expand(packed.shape), packed)

    def sides(self, part: str) -> dict[str, Side]:
        return {name: self._side(part, name) for name in self.chosen if part == "forward" or name != "bsr"}

    def _side(self, part: str, name: str) -> Side:
        in_turn = itertools.cycle([self._run(part, name, operands) for operands in self.operands])
        return Side(lambda: next(in_turn)())

    def _run(self, part: str, name: str, operands: list[Tensor]) -> Callable[[], object]:
        x, weight, bias, dy = (tensor.detach() for tensor in self._of(name, operands))
        function = self.functions[name]
        if part == "forward":
            return torch.no_grad()(partial(function, x, weight, bias))
        leaves = {"dX": [x], "dW": [weight]}.get(part, [x, weight, bias])
        for leaf in leaves:
            leaf.requires_grad_()
        if part != PARTS[-1]:
            y = function(x, weight, None)
            return partial(torch.autograd.grad, y, leaves, dy.to(y.dtype), retain_graph=True)

        def both() -> object:
            y = function(x, weight, bias)
            return torch.autograd.grad(y, leaves, dy.to(y.dtype))

        return both

    def ideal(self, name: str) -> float:
        """Dense FLOPs over live ones; 1 for single weights, whose product stays dense."""
        dense = name in DENSE or self.setting.unit == "weights"
        return 1.0 if dense else 1 / self.mask.density[self.ids].mean().item()


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
    """Random masks of all languages, which own equally many units."""
    kind, L, generator = kind_of(setting.unit), setting.languages, torch.Generator().manual_seed(0)

    def flags(*shape: int) -> Tensor:
        random = torch.rand(L, *shape, generator=generator)
        if kind == "weights":
            return random < setting.density
        rank = random.flatten(1).argsort(1).argsort(1).view(random.shape)
        return rank < max(1, round(setting.density * rank[0].numel()))

    return mask_over(kind, unit_of(setting), *weight_shape(setting), flags)


def mask_over(kind: str, unit: int, N: int, K: int, flags: Callable[..., Tensor]) -> fm.Mask:
    """A mask over units of so many rows or columns, or blocks of unit x unit; `flags(...)` are bool [L, ...]."""
    if kind == "rows":
        return fm.Mask.rows(flags(N // unit).repeat_interleave(unit, 1), K)
    if kind == "columns":
        return fm.Mask.columns(flags(K // unit).repeat_interleave(unit, 1), N)
    if kind == "blocks":
        return fm.Mask.blocks(flags(N // unit, K // unit), (unit, unit))
    return fm.Mask.weights(flags(N, K))
