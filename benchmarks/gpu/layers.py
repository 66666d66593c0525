"""One linear layer under masks of each kind against one dense product, forward and backward, apart and together."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.baselines import BASELINES, Baseline, Task, dense, loop
from benchmarks.gpu.checking import check_all, check_baseline
from benchmarks.gpu.report import Row, break_even, row_of
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.gpu.timing import compare, on_gpu, peak_bytes
from benchmarks.measure import Side
from fastmask.functional import compute
from fastmask.masks import UNPACKED

__all__ = ["Layer", "bits", "blocks", "gathered", "mixed_ids", "spread", "units", "units_of"]

DENSITY = 0.5
PARTS = ("forward", "dX", "dW", "fwd + bwd")


class Layer:
    """A random layer with masks, its batch, and how each side runs on it.

    Args:
        setup: sizes, device, dtype.
        mask: over [N, K]; rows and columns run packed, as in an attached model.
        ids: language of each example.
    """

    def __init__(self, setup: Setup, mask: fm.Mask, ids: Tensor) -> None:
        torch.manual_seed(0)
        self.setup, self.device = setup, setup.device
        self.mask, self.ids = mask.to(self.device), ids.to(self.device)
        N, K, B, T = mask.out_features, mask.in_features, len(ids), setup.tokens
        self.packed = mask.kind in ("rows", "columns")
        self.width = max(mask.live_counts()) if self.packed else UNPACKED

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=setup.dtype)

        self.x, self.dy = randn(B, T, K), randn(B, T, N)
        self.weight, self.bias = randn(N, K) / K**0.5, randn(N)
        self.task = Task(self.mask, self.ids)
        # The packed side as the layer before (or behind) leaves it; the other side is shared with the baselines.
        self.our_x = gathered(self.x, self.mask, self.ids, self.width) if mask.kind == "columns" else self.x
        self.our_dy = gathered(self.dy, self.mask, self.ids, self.width) if mask.kind == "rows" else self.dy
        density = (self.mask.density[self.ids.clamp(min=0)]).mean().item()
        self.flops = 2.0 * B * T * N * K * density  # of each of forward, dX and dW
        self._truth: list[Tensor] = []
        self._right: set[str] = {"dense"}  # baselines that need no check any more

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What is measured: through the library's function for layers that were checked once."""
        return compute(x, weight, self.mask, self.ids, bias, self.width)

    def side(self, part: str, baseline: Baseline | None = None) -> Side:
        """Ours, or a baseline's: one of `PARTS`."""
        x, dy = (self.our_x, self.our_dy) if baseline is None else (self.x, self.dy)

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.ours(x, weight, bias) if baseline is None else baseline(x, weight, self.task, bias)

        if part == "forward":
            with_bias = (x, self.weight, self.bias)

            def run() -> object:
                with torch.no_grad():
                    return forward(*with_bias)

            return Side(run)
        if part in ("dX", "dW"):
            leaves = [tensor.detach().requires_grad_(part == of) for tensor, of in ((x, "dX"), (self.weight, "dW"))]
            wanted, y = leaves[part == "dW"], forward(*leaves, None)
            return Side(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True))
        every = self._leaves(x)
        return Side(lambda: torch.autograd.grad(forward(*every), every, dy))

    def _leaves(self, x: Tensor) -> list[Tensor]:
        return [tensor.detach().requires_grad_() for tensor in (x, self.weight, self.bias)]

    def check(self) -> list[Tensor]:
        """y, dX, dW and db against float64 and against plain PyTorch in the same dtype, once; returns float64's.

        Raises:
            RuntimeError: a result is wrong.
        """
        if not self._truth:
            leaves = self._leaves(self.our_x)
            y = self.ours(*leaves)
            found = [y.detach(), *torch.autograd.grad(y, leaves, self.our_dy)]
            truth = self._results(loop, torch.float64)
            what = f"{self.mask.kind} {self.mask.out_features} x {self.mask.in_features}"
            exact, plain = self._packed(truth), self._packed(self._results(loop, self.setup.dtype))
            check_all(what, ("y", "dX", "dW", "db"), found, exact, plain)
            self._truth = truth
        return self._truth

    def _results(self, baseline: Baseline, dtype: torch.dtype) -> list[Tensor]:
        """y, dX, dW and db of a baseline, not packed."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self._leaves(self.full_x)]
        y = baseline(leaves[0], leaves[1], self.task, leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, self.full_dy.to(dtype))]

    def _packed(self, results: list[Tensor]) -> list[Tensor]:
        """Reference results with y or dX packed as ours are."""
        y, dx, dw, db = (result.detach() for result in results)
        if self.mask.kind == "rows":
            y = gathered(y, self.mask, self.ids, self.width)
        elif self.mask.kind == "columns":
            dx = gathered(dx, self.mask, self.ids, self.width)
        return [y, dx, dw, db]

    @cached_property
    def full_x(self) -> Tensor:
        """X as the unpacked reference reads it: no value where ours has none."""
        if self.mask.kind != "columns":
            return self.x
        return spread(self.our_x, self.mask, self.ids, self.mask.in_features)

    @cached_property
    def full_dy(self) -> Tensor:
        """The upstream gradient as the unpacked reference reads it."""
        if self.mask.kind != "rows":
            return self.dy
        return spread(self.our_dy, self.mask, self.ids, self.mask.out_features)

    def compared(self, part: str, what: str, *, baseline: str = "dense", as_time: bool = False, **fields: Any) -> Row:
        """A row: our speed relative to a baseline, or our time over its time."""
        truth = self.check()
        if baseline not in self._right:
            check_baseline(baseline, self._results(BASELINES[baseline], self.setup.dtype), truth)
            self._right.add(baseline)
        ours, other = self.side(part), self.side(part, BASELINES[baseline])
        sides = (ours, other) if as_time else (other, ours)
        ratio = compare(*sides, self.device, self.setup.seconds)
        flops = self.flops * (3 if part == PARTS[-1] else 1)
        return row_of(f"{what}: {part}", ratio, baseline, as_time=as_time, flops=flops, **fields)


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


def units_of(languages: int, size: int, unit: int, density: float = DENSITY, seed: int = 0) -> Tensor:
    """Random bool [L, size]: every language owns `density` of the units of `unit` neighbours."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(languages, size // unit, generator=generator).argsort(1).argsort(1)
    return (rank < round(density * (size // unit))).repeat_interleave(unit, 1)


def mixed_ids(examples: int, languages: int, shuffled: bool = False) -> Tensor:
    """Languages in equal shares, sorted or shuffled, int64 [B]."""
    ids = torch.arange(examples) * languages // examples
    return ids[torch.randperm(examples, generator=torch.Generator().manual_seed(1))] if shuffled else ids


# ---- the measurements


def units(setup: Setup) -> list[Measurement]:
    """Heads and neurons at 50%, several languages in a batch."""
    found = []
    width, L = setup.width, setup.languages
    for kind in ("rows", "columns"):
        for shuffled in (False, True):
            for name, unit in (("neurons", 1), ("heads", setup.head)):
                if name == "heads" and shuffled:
                    continue
                keep = units_of(L, width, unit)
                mask = fm.Mask.rows(keep, width) if kind == "rows" else fm.Mask.columns(keep, width)
                order = "shuffled" if shuffled else "sorted"
                what = f"{kind} ({name}) {DENSITY:.0%}, {L} languages {order}"

                def run(mask: fm.Mask = mask, shuffled: bool = shuffled, what: str = what) -> list[Row]:
                    layer = Layer(setup, mask, mixed_ids(setup.examples, L, shuffled))
                    ideal = 1 / DENSITY
                    rows = [layer.compared(PARTS[-1], what, goal=1.7, ideal=ideal)]
                    if shuffled:
                        rows += [layer.compared(part, what, ideal=ideal) for part in PARTS[:-1]]
                        for other in ("loop", "gating"):
                            rows.append(layer.compared(PARTS[-1], f"{what}, vs {other}", baseline=other))
                    return rows

                found.append(Measurement(what, run))
    return found


def blocks(setup: Setup) -> list[Measurement]:
    """Block masks over sparsity, one language: where does a skipped block begin to pay?"""
    side = setup.width // setup.block
    what = f"{setup.block} x {setup.block} blocks, one language"

    @cache
    def layer_of(sparsity: float) -> Layer:
        keep = units_of(1, side * side, 1, 1 - sparsity).reshape(1, side, side)
        mask = fm.Mask.blocks(keep, (setup.block, setup.block))
        return Layer(setup, mask, torch.zeros(setup.examples, dtype=torch.int64))

    def sweep(part: str) -> list[Row]:
        rows = []
        for sparsity in setup.sparsities:
            name, fields = f"{what}, {sparsity:.0%} sparse", {"ideal": 1 - sparsity, "printed": False}
            rows.append(layer_of(sparsity).compared(part, name, as_time=True, **fields))
        times = [row.value for row in rows if row.value is not None]
        even = break_even(setup.sparsities, times)
        summary = Row(
            f"{what}, {part}: break-even sparsity",
            100 * (1.0 if even is None else even),
            unit="%",
            goal=None if part == "dX" else 30,
            at_least=False,
            note=("" if even is not None else "never: ") + "time/dense at " + _at_each(setup, times),
        )
        return [summary, *rows]

    return [Measurement(f"{what}, {part}", lambda part=part: sweep(part)) for part in PARTS[:-1]]  # type: ignore[misc]


def _at_each(setup: Setup, times: list[float]) -> str:
    return " ".join(f"{s:g}:{time:.2f}" for s, time in zip(setup.sparsities, times, strict=True))


def bits(setup: Setup) -> list[Measurement]:
    """Masks over single weights at 50%: the time of one dense product, and not the memory of `stack`."""
    found = []
    for L, goal in ((1, 1.15), (setup.languages, 1.25)):
        what = f"bits 50%, {L} language{'s' * (L > 1)}"

        def run(L: int = L, goal: float = goal, what: str = what) -> list[Row]:
            keep = torch.rand(L, setup.width, setup.width, generator=torch.Generator().manual_seed(2)) < DENSITY
            layer = Layer(setup, fm.Mask.weights(keep), mixed_ids(setup.examples, L))
            rows = [layer.compared(part, what, as_time=True, goal=goal, ideal=1.0) for part in reversed(PARTS)]
            for other in ("loop", "stack") if L > 1 else ("multiply",):
                rows.append(layer.compared(PARTS[-1], f"{what}, vs {other}", baseline=other))
            return rows + (_memory(layer, what) if on_gpu(setup.device) else [])

        found.append(Measurement(what, run))
    return found


def _memory(layer: Layer, what: str) -> list[Row]:
    """Peak of a forward and backward pass beyond that of the dense one, in copies of the weight."""
    ours, plain, stacked = (
        peak_bytes(layer.side(PARTS[-1], baseline).run) for baseline in (None, dense, BASELINES["stack"])
    )
    size = layer.weight.nbytes
    note = f"MiB: dense {plain / 2**20:.0f}, ours {ours / 2**20:.0f}, stack {stacked / 2**20:.0f}"
    value = (ours - plain) / size
    more = {"dense_bytes": plain, "our_bytes": ours, "stack_bytes": stacked}
    name = f"{what}: peak memory beyond dense, in weights"
    return [Row(name, value, unit="", goal=1.0, at_least=False, note=note, more=more)]
