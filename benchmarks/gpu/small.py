"""The chip's own ceilings, the host's time to launch a layer, and the making of tile layouts."""

from __future__ import annotations

import statistics

import torch
from fastmask_kernels.tile_layout import TileLayout
from torch import Tensor, nn

import fastmask as fm
from benchmarks.gpu.report import Row, row_of
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.gpu.timing import captured, host_compare
from benchmarks.measure import Side, on_gpu, rounds
from benchmarks.product import mixed_ids, units_of

__all__ = ["ceilings", "launches", "layouts"]


def ceilings(setup: Setup) -> list[Measurement]:
    """What this chip can do at all: a large product, and a copy."""

    def product() -> list[Row]:
        n = setup.ceiling
        a, b = (torch.randn(n, n, device=setup.device, dtype=setup.dtype) for _ in range(2))
        (times,) = rounds([Side(lambda: a @ b)], setup.device, setup.seconds)
        ms = statistics.median(times)
        name = str(setup.dtype).removeprefix("torch.")
        return [
            Row(f"{n}^3 product, {name}", 2 * n**3 / ms / 1e9, unit=" TF/s", ours_ms=ms, tflops=2 * n**3 / ms / 1e9)
        ]

    def copied() -> list[Row]:
        source = torch.randint(0, 255, (setup.copied,), dtype=torch.uint8, device=setup.device)
        target = torch.empty_like(source)
        (times,) = rounds([Side(lambda: target.copy_(source))], setup.device, setup.seconds)
        ms = statistics.median(times)
        return [Row("copy on the device, read + written", 2 * setup.copied / ms / 1e9, unit=" TB/s", ours_ms=ms)]

    return [Measurement("product", product), Measurement("copy", copied)]


# ---- launch path

TINY_WIDTH = 64


def tiny_masks(languages: int) -> dict[str, fm.Mask]:
    """A mask of each kind over a layer so small that only the host's time counts."""
    n = TINY_WIDTH
    keep = units_of(languages, n * n, 1).reshape(languages, n, n)
    return {
        "rows": fm.Mask.rows(units_of(languages, n, 1), n),
        "columns": fm.Mask.columns(units_of(languages, n, 1), n),
        "blocks": fm.Mask.blocks(keep[:, : n // 16, : n // 16], (16, 16)),
        "bits": fm.Mask.weights(keep),
    }


class TinyLayer:
    """`MaskedLinear` and `nn.Linear` with the same Parameters on the same small batch."""

    def __init__(self, setup: Setup, mask: fm.Mask) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(TINY_WIDTH, TINY_WIDTH, device=setup.device, dtype=setup.dtype)
        self.masked = fm.MaskedLinear.from_linear(self.linear, mask)
        self.ids = mixed_ids(4, mask.n_languages).to(setup.device)
        self.x, self.dy = (torch.randn(4, 8, TINY_WIDTH, device=setup.device, dtype=setup.dtype) for _ in range(2))
        self.x.requires_grad_()
        self.leaves = [self.x, self.linear.weight, self.linear.bias]

    def run_dense(self) -> tuple[Tensor, ...]:
        """Forward and backward of `nn.Linear`."""
        return torch.autograd.grad(self.linear(self.x), self.leaves, self.dy)

    def run_masked(self) -> tuple[Tensor, ...]:
        """Forward and backward of `MaskedLinear`."""
        y = self.masked(self.x, self.ids)
        return (y.detach(), *torch.autograd.grad(y, self.leaves, self.dy))


def launches(setup: Setup) -> list[Measurement]:
    """Host time of one layer's forward and backward, and whether it goes into a CUDA graph."""
    found = []
    for name, mask in tiny_masks(setup.languages).items():

        def host(name: str = name, mask: fm.Mask = mask) -> list[Row]:
            layer = TinyLayer(setup, mask)
            # Time over time: ours is the numerator.
            ratio = host_compare(Side(layer.run_masked), Side(layer.run_dense), setup.device, setup.seconds / 2)
            what = f"launch, {name}: host time of fwd + bwd"
            return [row_of(what, ratio, "F.linear", as_time=True, goal=2.0)]

        def graph(name: str = name, mask: fm.Mask = mask) -> list[Row]:
            if not on_gpu(setup.device):
                return []
            what = f"launch, {name}: goes into a CUDA graph"
            layer, kept = TinyLayer(setup, mask), []

            def step() -> None:
                kept[:] = layer.run_masked()

            try:
                side = captured(step)
            except RuntimeError as error:
                torch.cuda.synchronize()
                return [Row(what, 0.0, unit="", goal=1, note=f"no: {error}"[:200])]
            results = list(kept)
            layer.ids.copy_(layer.ids.flip(0))  # a replay must follow the ids
            side.run()
            torch.cuda.synchronize()
            replayed = [result.clone() for result in results]
            right = all(torch.equal(a, b) for a, b in zip(replayed, layer.run_masked(), strict=True))
            return [Row(what, float(right), unit="", goal=1, note="yes" if right else "replays other numbers")]

        found += [Measurement(f"host time, {name}", host), Measurement(f"graph, {name}", graph)]
    return found


# ---- tile layouts


def layouts(setup: Setup) -> list[Measurement]:
    """Making the layout of many languages, and replacing one language's entry."""
    L, n, block = setup.layout_languages, setup.width, setup.block
    size = f"{n} x {n} x {L} languages"

    def from_bits() -> list[Row]:
        words = torch.randint(-(2**31), 2**31, (L, n, n // 32), device=setup.device).to(torch.int32)
        layout = TileLayout.from_bits(words, n, n)
        one = words[1].clone()
        return _made(
            f"TileLayout from bits, {size}", setup, layout,
            lambda: TileLayout.from_bits(words, n, n), lambda: layout.update(0, bits=one),
        )  # fmt: skip

    def from_blocks() -> list[Row]:
        side = n // block
        keep = units_of(L, side * side, 1).reshape(L, side, side).to(setup.device)
        layout = TileLayout.from_blocks(keep, (block, block))
        return _made(
            f"TileLayout from blocks of {block}, {size}", setup, layout,
            lambda: TileLayout.from_blocks(keep, (block, block)), lambda: layout.update(0, keep=keep[1]),
        )  # fmt: skip

    return [Measurement("layout from bits", from_bits), Measurement("layout from blocks", from_blocks)]


def _made(what, setup, layout, make, update):  # type: ignore[no-untyped-def]
    made, updated = (
        statistics.median(rounds([Side(run)], setup.device, setup.seconds / 2)[0]) for run in (make, update)
    )
    note = f"{layout.nbytes / 2**20:.1f} MiB, bits included; one language {updated:.3g} ms"
    more = {"nbytes": layout.nbytes, "update_ms": updated}
    return [Row(what, made, unit=" ms", at_least=False, ours_ms=made, note=note, more=more)]
