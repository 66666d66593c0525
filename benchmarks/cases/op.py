"""One masked weight: forward, dX and dW, apart and together, as an attached model runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import BASELINES, Task
from benchmarks.cases.case import DENSE, Case, Side
from benchmarks.row import BLOCKS, Job, Setting
from fastmask.masks import UNPACKED
from fastmask.operators import run
from fastmask.torch_path.layers import Layers
from fastmask.torch_path.naive import masked_linear_naive

PARTS = ("forward", "dX", "dW", "forward+backward")
PACKED = ("fastmask", "packed")  # what runs on operands as the layer before, or behind, leaves them
MOST_COPIES, CACHE = 8, 128 * 2**20  # operands take turns, so that no run finds its own in a cache of so many bytes


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
        units = self.mask.kind in ("rows", "columns")
        self.width = max(self.mask.live_counts()) if units else UNPACKED  # all languages own equally many
        self.live = self.mask.index[self.ids, None, : self.width] if units else None  # [B, 1, width]
        self.task = Task(self.mask, self.ids)
        N, K = weight_shape(setting)
        copies = min(MOST_COPIES, 1 + 2 * CACHE // (4 * (self.tokens * (N + K) + N * K)))
        shapes = (setting.batch, setting.tokens, K), (N, K), (N,), (setting.batch, setting.tokens, N)
        options: dict[str, Any] = {"device": setting.device, "dtype": setting.parameters}
        # x, weight, bias and upstream gradient.
        self.operands = [[torch.randn(shape, **options) for shape in shapes] for _ in range(copies)]
        for _, weight, *_ in self.operands:
            weight /= K**0.5
        self.functions = {name: self.as_timed(self.function(name)) for name in self.chosen}

    @classmethod
    def refuse(cls, job: Job) -> None:
        super().refuse(job)
        setting, shape = job.setting, weight_shape(job.setting)
        if any(size % BLOCKS.get(setting.unit, 1) for size in shape):
            raise ValueError(f"{setting.unit} do not divide a weight of {shape} (shape {setting.shape})")

    def function(self, name: str) -> Callable[..., Tensor]:
        """An implementation, of (x, weight, bias)."""
        mask, width, ids = self.mask, self.width, self.ids
        if name == "fastmask":  # the library's function for layers that were checked once
            return lambda x, weight, bias: run(Layers([mask], [width]), x, [weight], [bias], ids)[0]
        if name == "full":
            none = torch.full_like(ids, -1)
            return lambda x, weight, bias: run(Layers([mask], [UNPACKED]), x, [weight], [bias], none)[0]
        if name == "naive":  # the definition of a masked layer, too slow to time
            return lambda x, weight, bias: masked_linear_naive(x, weight, mask, ids, bias)
        baseline, task = BASELINES[name], self.task
        return lambda x, weight, bias: baseline(x, weight, task, bias)

    def references(self, name: str) -> tuple[str, str]:
        return ("naive", "loop")

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        function = self.functions[name] if dtype is None else self.as_timed(self.function(name), eager=True)
        operands = [operand.to(dtype or operand.dtype) for operand in self.operands[0]]
        if name == "bsr":  # which has no backward pass
            return [function(*operands[:3])]
        found = [tensor.detach() for tensor in self._run(PARTS[-1], name, function, operands)()]
        if name in PACKED and self.live is not None:
            i, size = (0, self.mask.out_features) if self.mask.kind == "rows" else (1, self.mask.in_features)  # y or dX
            full = found[i].new_zeros(*found[i].shape[:-1], size)
            found[i] = full.scatter(2, self.live.expand(found[i].shape), found[i])
        return found

    def sides(self, part: str) -> dict[str, Side]:
        found = {}
        for name in self.chosen:
            if part == "forward" or name != "bsr":
                runs = itertools.cycle([self._run(part, name, self.functions[name], own) for own in self.operands])
                found[name] = Side(lambda runs=runs: next(runs)())
        return found

    def _run(self, part: str, name: str, function: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], Any]:
        x, weight, bias, dy = (operand.detach() for operand in operands)
        if name in PACKED and self.live is not None:  # x or dy of live units only
            if self.mask.kind == "columns":
                x = x.take_along_dim(self.live, 2)
            else:
                dy = dy.take_along_dim(self.live, 2)
        if part == "forward":
            return torch.no_grad()(partial(function, x, weight, bias))
        leaves = {"dX": [x], "dW": [weight]}.get(part, [x, weight, bias])
        for leaf in leaves:
            leaf.requires_grad_()
        if part != PARTS[-1]:
            y = function(x, weight, None)
            return partial(torch.autograd.grad, y, leaves, dy.to(y.dtype), retain_graph=True)

        def both() -> list[Tensor]:
            y = function(x, weight, bias)
            return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

        return both

    def ideal(self, name: str) -> float:
        """Dense FLOPs over live ones; 1 for single weights, whose product stays dense."""
        dense = name in DENSE or self.setting.unit == "weights"
        return 1.0 if dense else 1 / self.mask.density[self.ids].mean().item()


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
    kind, L, generator = setting.kind, setting.languages, torch.Generator().manual_seed(0)

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
