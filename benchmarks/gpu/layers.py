"""One linear layer under masks of each kind against one dense product, forward and backward, apart and together."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import fastmask as fm
from benchmarks.gpu.report import Row, row_of
from benchmarks.gpu.setup import Measurement, Setup, has_grouped
from benchmarks.gpu.timing import break_even
from benchmarks.measure import compare, on_gpu
from benchmarks.memory import peak_bytes
from benchmarks.product import PARTS, Product, gathered, mixed_ids, units_of

__all__ = ["DENSITY", "Layer", "bits", "blocks", "gathered", "mixed_ids", "spread", "units", "units_of"]

DENSITY = 0.5
BOTH = PARTS[-1]
LABELS = {**dict(zip(PARTS, PARTS, strict=True)), BOTH: "fwd + bwd"}


class Layer(Product):
    """A product of the setup's sizes, and its rows.

    Args:
        setup: sizes, device, dtype.
        mask: over [N, K]; rows and columns run packed, as in an attached model.
        ids: language of each example.
    """

    def __init__(self, setup: Setup, mask: fm.Mask, ids: Tensor) -> None:
        super().__init__(mask, ids, setup.tokens, setup.device, setup.dtype)
        self.setup = setup
        self._right = {"dense"}  # baselines that need no check any more

    def compared(self, part: str, what: str, *, baseline: str = "dense", as_time: bool = False, **fields: Any) -> Row:
        """A row: our speed relative to a baseline, or our time over its time."""
        self.check()
        if baseline not in self._right:
            self.check_against(baseline)
            self._right.add(baseline)
        ours, other = self.side(part), self.side(part, baseline)
        sides = (ours, other) if as_time else (other, ours)
        ratio = compare(*sides, self.device, self.setup.seconds)
        flops = self.flops * (3 if part == BOTH else 1)
        return row_of(f"{what}: {LABELS[part]}", ratio, baseline, as_time=as_time, flops=flops, **fields)


def spread(packed: Tensor, mask: fm.Mask, ids: Tensor, size: int) -> Tensor:
    """[B, T, width] -> [B, T, size]: undoes `gathered`, zeros where an example owns nothing."""
    full, counts = packed.new_zeros(*packed.shape[:-1], size), mask.live_counts()
    for b, language in enumerate(ids.tolist()):
        live = slice(size) if language < 0 else mask.index[language, : counts[language]]
        full[b, :, live] = packed[b, :, : size if language < 0 else counts[language]]
    return full


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
                    rows = [layer.compared(BOTH, what, goal=1.7, ideal=ideal)]
                    if shuffled:
                        rows += [layer.compared(part, what, ideal=ideal) for part in PARTS[:-1]]
                        for other in ("packed", "loop", "gating"):
                            if other == "packed" and not has_grouped(setup):
                                continue
                            rows.append(layer.compared(BOTH, f"{what}, vs {other}", baseline=other))
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
    """Masks over single weights at 50%: the time of one dense product, and not the memory of a loop over languages."""
    found = []
    for L, goal in ((1, 1.15), (setup.languages, 1.25)):
        what = f"bits 50%, {L} language{'s' * (L > 1)}"

        def run(L: int = L, goal: float = goal, what: str = what) -> list[Row]:
            keep = torch.rand(L, setup.width, setup.width, generator=torch.Generator().manual_seed(2)) < DENSITY
            layer = Layer(setup, fm.Mask.weights(keep), mixed_ids(setup.examples, L))
            rows = [layer.compared(part, what, as_time=True, goal=goal, ideal=1.0) for part in reversed(PARTS)]
            for other in ("loop",) if L > 1 else ("multiply",):
                rows.append(layer.compared(BOTH, f"{what}, vs {other}", baseline=other))
            return rows + (_memory(layer, what) if on_gpu(setup.device) else [])

        found.append(Measurement(what, run))
    return found


def _memory(layer: Layer, what: str) -> list[Row]:
    """Peak of a forward and backward pass beyond that of the dense one, in copies of the weight."""
    ours, plain, looped = (peak_bytes(layer.side(BOTH, name).run) for name in ("fastmask", "dense", "loop"))
    size = layer.operands[0].weight.nbytes
    note = f"MiB: dense {plain / 2**20:.0f}, ours {ours / 2**20:.0f}, loop {looped / 2**20:.0f}"
    value = (ours - plain) / size
    more = {"dense_bytes": plain, "our_bytes": ours, "loop_bytes": looped}
    name = f"{what}: peak memory beyond dense, in weights"
    return [Row(name, value, unit="", goal=1.0, at_least=False, note=note, more=more)]
