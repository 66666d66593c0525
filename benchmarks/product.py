"""One masked weight, its batch, and what each implementation computes with it: forward, dX, dW, apart and together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import BASELINES, Task
from benchmarks.checking import check_all, check_baseline
from benchmarks.measure import Side
from fastmask.masks import UNPACKED
from fastmask.operators import compute

__all__ = ["PARTS", "Product", "gathered", "units_of"]

PARTS = ("forward", "dX", "dW", "forward+backward")
PACKED = ("fastmask", "packed")  # what runs on operands as the layer before, or behind, leaves them
_LEAVES = {"dX": [0], "dW": [1], PARTS[-1]: [0, 1, 2]}  # of x, weight, bias: those that have gradients
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Operands:
    """Random tensors of one run."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


class Product:
    """A random layer with masks, its batch, and how each side runs on it.

    Args:
        mask: over [N, K]; masks over rows and columns run packed, as in an attached model.
        ids: language of each example, int64 [B].
        tokens: of each example.
        device, dtype: of all operands.
        autocast: the context that forward passes run in.
        compiled: whether all sides run under `torch.compile`.
        copies: how many sets of operands there are; runs take them in turn, so that none finds its own in the cache.
    """

    def __init__(
        self,
        mask: fm.Mask,
        ids: Tensor,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compiled: bool = False,
        copies: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.tokens, self.autocast, self.compiled = device, dtype, tokens, autocast, compiled
        self.mask, self.ids = mask.to(device), ids.to(device)
        self.width = max(mask.live_counts()) if mask.kind in ("rows", "columns") else UNPACKED
        self.task = Task(self.mask, self.ids)
        self.operands = [self._operands() for _ in range(copies)]
        self._packed = [self._as_packed(own) for own in self.operands]
        density = (self.mask.density[self.ids.clamp(min=0)]).mean().item()
        self.dense_flops = 2.0 * len(ids) * tokens * mask.out_features * mask.in_features
        self.flops = self.dense_flops * density  # of each of forward, dX and dW
        self._truth: list[Tensor] = []

    def _operands(self) -> Operands:
        B, T, N, K = len(self.ids), self.tokens, self.mask.out_features, self.mask.in_features
        shapes = ((B, T, K), (N, K), (N,), (B, T, N))
        x, weight, bias, dy = (torch.randn(shape, device=self.device, dtype=self.dtype) for shape in shapes)
        return Operands(x, weight / K**0.5, bias, dy)

    def _as_packed(self, own: Operands) -> Operands:
        if self.mask.kind == "columns":
            return replace(own, x=gathered(own.x, self.mask, self.ids, self.width))
        return replace(own, dy=gathered(own.dy, self.mask, self.ids, self.width)) if self.mask.kind == "rows" else own

    def function(self, name: str) -> Function:
        """An implementation, of (x, weight, bias): "fastmask", "full" or a name of `BASELINES`."""
        mask, width, ids, none = self.mask, self.width, self.ids, torch.full_like(self.ids, -1)
        if name == "fastmask":  # the library's function for layers that were checked once
            return lambda x, weight, bias: compute(x, weight, mask, ids, bias, width)
        if name == "full":
            return lambda x, weight, bias: compute(x, weight, mask, none, bias, UNPACKED)
        baseline, task = BASELINES[name], self.task
        return lambda x, weight, bias: baseline(x, weight, task, bias)

    def side(self, part: str, name: str = "fastmask") -> Side:
        """One of `PARTS` of an implementation, with one set of operands after the other."""
        function = self._as_timed(name)
        runs = [self._run(part, function, own) for own in (self._packed if name in PACKED else self.operands)]
        in_turn = itertools.cycle(runs)
        return Side(lambda: next(in_turn)())

    def _as_timed(self, name: str) -> Function:
        function = self.function(name)
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function

    def _run(self, part: str, function: Function, own: Operands) -> Callable[[], object]:
        if part == "forward":

            def forward() -> object:
                with torch.no_grad():
                    return self._y(function, own.x, own.weight, own.bias)

            return forward
        wanted = _LEAVES[part]
        every = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((own.x, own.weight, own.bias))]
        leaves = [every[i] for i in wanted]
        if part != PARTS[-1]:
            y = self._y(function, every[0], every[1], None)
            upstream = own.dy.to(y.dtype)
            return lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True)

        def both() -> object:
            y = self._y(function, *every)
            return torch.autograd.grad(y, leaves, own.dy.to(y.dtype))

        return both

    def _y(self, function: Function, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with self.autocast():
            return function(x, weight, bias)

    # ---- proof

    def check(self) -> list[Tensor]:
        """y, dX, dW and db of ours against float64 and plain PyTorch in the same dtype, once; returns float64's.

        Raises:
            RuntimeError: a result is wrong.
        """
        if not self._truth:
            truth, plain = self.results("loop", exact=True), self.results("loop")
            what = f"{self.mask.kind} {self.mask.out_features} x {self.mask.in_features}"
            ours = self.results("fastmask")
            check_all(what, ("y", "dX", "dW", "db"), ours, self._results_packed(truth), self._results_packed(plain))
            self._truth = truth
        return self._truth

    def check_against(self, name: str) -> None:
        """See that a rival computes the same, and `full` the same as `dense`.

        Raises:
            RuntimeError: it does not.
        """
        if name == "bsr":  # which has no backward pass
            found = self._y(self.function(name), *(getattr(self.operands[0], leaf) for leaf in ("x", "weight", "bias")))
            check_baseline(name, [found], self.check()[:1])
        else:
            truth = self.results("dense", exact=True) if name == "full" else self.check()
            check_baseline(name, self.results(name), self._results_packed(truth) if name in PACKED else truth)

    def results(self, name: str, exact: bool = False) -> list[Tensor]:
        """y, dX, dW and db of an implementation on the first operands; `exact`: in float64."""
        own = (self._packed if name in PACKED else self.operands)[0]
        dtype = torch.float64 if exact else self.dtype
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (own.x, own.weight, own.bias)]
        with nullcontext() if exact else self.autocast():
            y = (self.function if exact else self._as_timed)(name)(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, own.dy.to(y.dtype))]

    def _results_packed(self, results: list[Tensor]) -> list[Tensor]:
        """Results with y or dX packed as ours are."""
        y, dx, dw, db = results
        if self.mask.kind == "rows":
            y = gathered(y, self.mask, self.ids, self.width)
        elif self.mask.kind == "columns":
            dx = gathered(dx, self.mask, self.ids, self.width)
        return [y, dx, dw, db]


def gathered(full: Tensor, mask: fm.Mask, ids: Tensor, width: int) -> Tensor:
    """[B, T, size] -> [B, T, width]: each example's live units to the front, zeros behind."""
    packed, counts = full.new_zeros(*full.shape[:-1], width), mask.live_counts()
    for b, language in enumerate(ids.tolist()):
        live = full[b] if language < 0 else full[b].index_select(-1, mask.index[language, : counts[language]])
        packed[b, :, : live.shape[-1]] = live
    return packed


def units_of(languages: int, size: int, unit: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """Random bool [L, size]: every language owns `density` of the units of `unit` neighbours."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(languages, size // unit, generator=generator).argsort(1).argsort(1)
    return (rank < round(density * (size // unit))).repeat_interleave(unit, 1)
