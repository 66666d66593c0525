"""One masked weight, its batch, and what each implementation computes with it: forward, dX and dW, apart and together.

A case of its own (`benchmarks.cases.op`), and what `benchmarks.gpu` measures layers with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import Baseline, Task, dense, loop, packed
from benchmarks.checking import check_all, check_baseline
from benchmarks.measure import Side
from fastmask.masks import UNPACKED
from fastmask.operators import compute

__all__ = ["PARTS", "Product", "gathered", "mixed_ids", "spread", "units_of"]

PARTS = ("forward", "dX", "dW", "forward+backward")
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Operands:
    """Random tensors of one run: X and dY as baselines read them, the same as ours reads them, W and b."""

    x: Tensor
    dy: Tensor
    our_x: Tensor
    our_dy: Tensor
    weight: Tensor
    bias: Tensor


class Product:
    """A random layer with masks, its batch, and how each side runs on it.

    Args:
        mask: over [N, K].
        ids: language of each example, int64 [B].
        tokens: of each example.
        device, dtype: of all operands.
        packed: whether masks over rows and columns run packed, as in an attached model.
        autocast: the context that forward passes run in.
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
        packed: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        copies: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.tokens, self.autocast = device, dtype, tokens, autocast
        self.mask, self.ids = mask.to(device), ids.to(device)
        self.packed = packed and mask.kind in ("rows", "columns")
        self.width = max(mask.live_counts()) if self.packed else UNPACKED
        self.task = Task(self.mask, self.ids)
        self.operands = [self._operands() for _ in range(copies)]
        density = (self.mask.density[self.ids.clamp(min=0)]).mean().item()
        # Of each of forward, dX and dW.
        self.flops = 2.0 * len(ids) * tokens * mask.out_features * mask.in_features * density
        self._truth: list[Tensor] = []

    def _operands(self) -> Operands:
        mask, B, T = self.mask, len(self.ids), self.tokens
        N, K = mask.out_features, mask.in_features

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        x, dy, weight, bias = randn(B, T, K), randn(B, T, N), randn(N, K) / K**0.5, randn(N)
        # The packed side as the layer before (or behind) leaves it; the other side is shared with the baselines.
        our_x = gathered(x, mask, self.ids, self.width) if self.packed and mask.kind == "columns" else x
        our_dy = gathered(dy, mask, self.ids, self.width) if self.packed and mask.kind == "rows" else dy
        return Operands(x, dy, our_x, our_dy, weight, bias)

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What is measured: through the library's function for layers that were checked once."""
        return compute(x, weight, self.mask, self.ids, bias, self.width)

    def full(self, x: Tensor, weight: Tensor, task: Task, bias: Tensor | None = None) -> Tensor:
        """The full network through the library: a dense product by whatever the library multiplies matrices with."""
        return compute(x, weight, self.mask, torch.full_like(self.ids, -1), bias, UNPACKED)

    def function(self, baseline: Baseline | None) -> Function:
        """Ours, or a baseline's, of (x, weight, bias)."""
        if baseline is None:
            return self.ours
        return lambda x, weight, bias: baseline(x, weight, self.task, bias)

    def side(
        self, part: str, baseline: Baseline | None = None, compiled: Callable[[Function], Function] | None = None
    ) -> Side:
        """Ours, or a baseline's: one of `PARTS`; `compiled` is applied to the function first."""
        function = self.function(baseline)
        call = function if compiled is None else compiled(function)

        def forward(*leaves: Tensor | None) -> Tensor:
            with self.autocast():
                return call(*leaves)  # type: ignore[arg-type]

        ours = baseline in (None, packed)
        runs = [self._run(part, forward, operands, ours) for operands in self.operands]
        in_turn = itertools.cycle(runs)
        return Side(lambda: next(in_turn)())

    def _run(self, part: str, forward: Callable[..., Tensor], operands: Operands, ours: bool) -> Callable[[], object]:
        """One run of a side on one set of operands."""
        x, dy = (operands.our_x, operands.our_dy) if ours else (operands.x, operands.dy)
        if part == "forward":

            def run() -> object:
                with torch.no_grad():
                    return forward(x, operands.weight, operands.bias)

            return run
        if part in ("dX", "dW"):
            pairs = ((x, "dX"), (operands.weight, "dW"))
            leaves = [tensor.detach().requires_grad_(part == of) for tensor, of in pairs]
            wanted, y = leaves[part == "dW"], forward(*leaves, None)
            upstream = dy.to(y.dtype)
            return lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True)
        every = _leaves(x, operands)

        def both() -> object:
            y = forward(*every)
            return torch.autograd.grad(y, every, dy.to(y.dtype))

        return both

    # ---- proof

    def check(self) -> list[Tensor]:
        """y, dX, dW and db of ours against float64 and plain PyTorch in the same dtype, once; returns float64's.

        Raises:
            RuntimeError: a result is wrong.
        """
        if not self._truth:
            found = self._packed_results(self.ours)
            truth = self.results(loop, torch.float64)
            what = f"{self.mask.kind} {self.mask.out_features} x {self.mask.in_features}"
            exact, plain = self._as_ours(truth), self._as_ours(self.results(loop))
            check_all(what, ("y", "dX", "dW", "db"), found, exact, plain)
            self._truth = truth
        return self._truth

    def check_against(self, name: str, baseline: Baseline) -> None:
        """See that a baseline computes the same; `full` the same as `dense`.

        Raises:
            RuntimeError: it does not.
        """
        if baseline is packed:
            return check_baseline(name, self._packed_results(self.function(packed)), self._as_ours(self.check()))
        truth = self.results(dense, torch.float64) if baseline == self.full else self.check()
        return check_baseline(name, self.results(baseline), truth)

    def results(self, baseline: Baseline, dtype: torch.dtype | None = None) -> list[Tensor]:
        """y, dX, dW and db of a baseline on the first operands, not packed; in another dtype without autocast."""
        operands = self.operands[0]
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in _leaves(self._full_x(), operands)]
        with self.autocast() if dtype is None else nullcontext():
            y = baseline(leaves[0], leaves[1], self.task, leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, self._full_dy().to(y.dtype))]

    def _packed_results(self, function: Function) -> list[Tensor]:
        """y, dX, dW and db of what runs as ours does, on the first operands."""
        operands = self.operands[0]
        leaves = _leaves(operands.our_x, operands)
        with self.autocast():
            y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, operands.our_dy.to(y.dtype))]

    def _as_ours(self, results: list[Tensor]) -> list[Tensor]:
        """Reference results with y or dX packed as ours are."""
        y, dx, dw, db = (result.detach() for result in results)
        if self.packed and self.mask.kind == "rows":
            y = gathered(y, self.mask, self.ids, self.width)
        elif self.packed and self.mask.kind == "columns":
            dx = gathered(dx, self.mask, self.ids, self.width)
        return [y, dx, dw, db]

    def _full_x(self) -> Tensor:
        """X as the unpacked reference reads it: no value where ours has none."""
        operands = self.operands[0]
        if not self.packed or self.mask.kind != "columns":
            return operands.x
        return spread(operands.our_x, self.mask, self.ids, self.mask.in_features)

    def _full_dy(self) -> Tensor:
        """The upstream gradient as the unpacked reference reads it."""
        operands = self.operands[0]
        if not self.packed or self.mask.kind != "rows":
            return operands.dy
        return spread(operands.our_dy, self.mask, self.ids, self.mask.out_features)


def _leaves(x: Tensor, operands: Operands) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in (x, operands.weight, operands.bias)]


def gathered(full: Tensor, mask: fm.Mask, ids: Tensor, width: int) -> Tensor:
    """[B, T, size] -> [B, T, width]: each example's live units to the front, zeros behind."""
    packed = full.new_zeros(*full.shape[:-1], width)
    for b, (language, own) in enumerate(_live_of(mask, ids)):
        live = full[b] if language < 0 else full[b].index_select(-1, own)
        packed[b, :, : live.shape[-1]] = live
    return packed


def spread(packed: Tensor, mask: fm.Mask, ids: Tensor, size: int) -> Tensor:
    """[B, T, width] -> [B, T, size]: undoes `gathered`, zeros where an example owns nothing."""
    full = packed.new_zeros(*packed.shape[:-1], size)
    for b, (language, own) in enumerate(_live_of(mask, ids)):
        if language < 0:
            full[b] = packed[b, :, :size]
        else:
            full[b].index_copy_(-1, own, packed[b, :, : len(own)])
    return full


def _live_of(mask: fm.Mask, ids: Tensor) -> list[tuple[int, Tensor]]:
    counts = mask.live_counts()
    return [(language, mask.index[language, : counts[language]]) for language in ids.tolist()]


def units_of(languages: int, size: int, unit: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """Random bool [L, size]: every language owns `density` of the units of `unit` neighbours."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(languages, size // unit, generator=generator).argsort(1).argsort(1)
    return (rank < round(density * (size // unit))).repeat_interleave(unit, 1)


def mixed_ids(examples: int, languages: int, shuffled: bool = False) -> Tensor:
    """Languages in equal shares, sorted or shuffled, int64 [B]."""
    ids = torch.arange(examples) * languages // examples
    return ids[torch.randperm(examples, generator=torch.Generator().manual_seed(1))] if shuffled else ids
