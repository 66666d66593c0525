"""Other block sizes than the shipped ones, side by side, so that one run is enough to choose.

Compiling takes longer than measuring: `warm_up` runs a share of all configs once, in one of several processes, and what
it compiled is found in Triton's cache when `sweep` measures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastmask_kernels.configs import Config
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_owned_grad import owned
from fastmask_kernels.row_weight_grad import row_weight_grad
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad

import fastmask as fm
from benchmarks.gpu.layers import DENSITY
from benchmarks.gpu.report import Row
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.measure import Side, on_gpu, rounds
from benchmarks.product import mixed_ids, units_of

__all__ = ["sweep", "warm_up"]

# (block sizes in the order of the names, warps, stages); GROUP is 8 unless it is named.
_ROW_MATMUL = ("BM", "BN", "BK"), [
    (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 128, 8, 3), (256, 64, 64, 8, 4), (64, 128, 64, 4, 4),
]  # fmt: skip
_ROW_MATMUL_T = ("BM", "BN", "BK"), [
    (128, 64, 256, 8, 4), (128, 64, 256, 8, 5), (256, 64, 128, 8, 5), (128, 64, 128, 8, 5), (128, 64, 128, 4, 5),
    (128, 32, 256, 8, 5), (128, 128, 128, 8, 4), (64, 64, 256, 4, 5),
]  # fmt: skip
_ROW_TURN_GRAD = ("BM", "BN", "BK"), [
    (64, 128, 256, 8, 4), (64, 128, 256, 8, 5), (64, 256, 128, 8, 5), (64, 128, 128, 8, 5), (64, 128, 128, 4, 5),
    (32, 128, 256, 8, 5), (128, 128, 128, 8, 4), (64, 64, 128, 4, 5),
]  # fmt: skip
_ROW_OWNED_GRAD = ("BM", "BN", "BK"), [  # BN divides a head
    (64, 128, 256, 8, 3), (64, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 64, 256, 8, 3), (64, 64, 256, 8, 4),
    (64, 64, 256, 4, 3), (64, 64, 128, 4, 3), (64, 64, 128, 4, 4), (128, 64, 128, 4, 3),
]  # fmt: skip
_TILE_MATMUL_64 = ("BM", "BK"), [  # with 4 warps and 256 tokens it spills
    (256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3),
]  # fmt: skip
_TILE_MATMUL_128 = ("BM", "BK"), [  # with 4 warps it spills
    (256, 64, 8, 3), (256, 64, 8, 4), (256, 32, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4),
]  # fmt: skip
_TILE_GRAD_64 = ("BN", "BK", "BM"), [
    (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 64, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3),
]  # fmt: skip
_TILE_GRAD_128 = ("BN", "BK", "BM"), [
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 128, 8, 2),
    (128, 128, 32, 8, 4), (64, 128, 64, 4, 4),
]  # fmt: skip
_SMALL = {("BM", "BN", "BK"): [(16, 16, 16, 4, 2)], ("BM", "BK"): [(16, 32, 4, 2)], ("BN", "BK", "BM"): []}

UNTRIED = "not tried: out of time"


@dataclass
class Workload:
    """One kernel on one problem; `run(None)` is as shipped."""

    what: str
    flops: float
    run: Callable[[Config | None], object]
    configs: list[Config]


def workloads(setup: Setup) -> list[Workload]:
    """The problems that are swept, each made when it is first run."""
    n, L, B, T = setup.width, setup.languages, setup.examples, setup.tokens
    small = (setup.encoder_examples, setup.encoder_tokens)
    found = []
    for (B_, T_), N, K in (((B, T), n, n), (small, setup.ffn, setup.hidden), (small, setup.hidden, setup.hidden)):
        make = _once(lambda B_=B_, T_=T_, N=N, K=K: _row_problem(setup, B_, T_, N, K))  # type: ignore[misc]
        size = f"{N} x {K}, {B_ * T_} tokens"
        flops = 2.0 * B_ * T_ * N * K * DENSITY
        grouped = {"GROUP": 8}

        def forward(config: Config | None, make: Any = make) -> object:
            p = make()
            return row_matmul(p.x, [p.weight], [p.index], [p.counts], p.plan, [p.width], config=config)

        def back(config: Config | None, make: Any = make) -> object:
            p = make()
            return row_matmul_t([p.packed], [p.weight], [p.index], [p.counts], p.plan, config=config)

        def gradient(config: Config | None, make: Any = make) -> object:
            p = make()
            arguments: dict[str, Any] = {"weight_dtype": p.x.dtype, "units": [p.unit], "config": config}
            return row_weight_grad([p.packed], p.x, [p.index], [p.counts], p.plan, [p.weight.shape[0]], **arguments)

        unit = setup.head if n == N else N // setup.heads
        of_heads = _once(lambda B_=B_, T_=T_, N=N, K=K, unit=unit: _row_problem(setup, B_, T_, N, K, unit))  # type: ignore[misc]
        owned_configs = [c for c in _configs(setup, _ROW_OWNED_GRAD, {}) if unit % c["BN"] == 0]

        found += [
            Workload(f"row_matmul {size}", flops, forward, _configs(setup, _ROW_MATMUL, grouped)),
            Workload(f"row_matmul_t {size}", flops, back, _configs(setup, _ROW_MATMUL_T, grouped)),
            Workload(f"row_turn_grad {size}", flops, gradient, _configs(setup, _ROW_TURN_GRAD, {})),
        ]
        if owned([unit]) and (setup.ffn, setup.hidden) != (N, K):
            run = partial(gradient, make=of_heads)
            found.append(Workload(f"row_owned_grad {size}", flops, run, owned_configs))
    small_tile, large_tile = (_TILE_MATMUL_64, _TILE_GRAD_64), (_TILE_MATMUL_128, _TILE_GRAD_128)
    for kind, languages, tile, (products, grads) in (
        ("blocks", 1, setup.block, small_tile),
        ("blocks", 1, 2 * setup.block, large_tile),  # most tiles are partial: twice the reuse, nothing skipped
        ("bits", L, 2 * setup.block, large_tile),
    ):
        make = _once(lambda kind=kind, languages=languages, tile=tile: _tile_problem(setup, kind, languages, tile))  # type: ignore[misc]
        live = DENSITY if kind == "blocks" and tile == setup.block else 1.0
        size = f"{kind}, {languages} languages, tile {tile}"
        flops = 2.0 * B * T * n * n * live
        for transposed in (False, True):

            def product(config: Config | None, make: Any = make, transposed: bool = transposed) -> object:
                p = make()
                return tile_matmul(p.x, p.weight, p.layout, p.plan, transposed=transposed, config=config)

            name = "tile_matmul " + "transposed " * transposed + size
            found.append(Workload(name, flops, product, _configs(setup, products, {})))

        def tile_gradient(config: Config | None, make: Any = make) -> object:
            p = make()
            return tile_weight_grad(p.packed, p.x, p.layout, p.plan, weight_dtype=p.x.dtype, config=config)

        found.append(Workload(f"tile_weight_grad {size}", flops, tile_gradient, _configs(setup, grads, {})))
    return found


@dataclass
class _Problem:
    x: torch.Tensor
    packed: torch.Tensor  # the other side's activations, or gradients
    weight: torch.Tensor
    plan: Plan
    index: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    width: int = 0
    unit: int = 1
    layout: TileLayout | None = None


def _row_problem(setup: Setup, B: int, T: int, N: int, K: int, unit: int = 1) -> _Problem:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=setup.device, dtype=setup.dtype)

    mask = fm.Mask.rows(units_of(setup.languages, N, unit), K)
    width = max(mask.live_counts())
    mask = mask.to(setup.device)
    plan = Plan(mixed_ids(B, setup.languages, shuffled=True).to(setup.device), T, setup.languages)
    return _Problem(randn(B * T, K), randn(B * T, width), randn(N, K), plan, mask.index, mask.extents, width, unit)


def _tile_problem(setup: Setup, kind: str, languages: int, tile: int) -> _Problem:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=setup.device, dtype=setup.dtype)

    n, M, side = setup.width, setup.examples * setup.tokens, setup.width // setup.block
    plan = Plan(mixed_ids(setup.examples, languages).to(setup.device), setup.tokens, languages)
    if kind == "blocks":
        keep = units_of(languages, side * side, 1, DENSITY).reshape(languages, side, side).to(setup.device)
        layout = TileLayout.from_blocks(keep, (setup.block, setup.block), (tile, tile))
    else:
        words = torch.randint(-(2**31), 2**31, (languages, n, n // 32), device=setup.device).to(torch.int32)
        layout = TileLayout.from_bits(words, n, n, (tile, tile))
    return _Problem(randn(M, n), randn(M, n), randn(n, n), plan, layout=layout)


def _configs(setup: Setup, listed: Any, more: dict[str, int]) -> list[Config]:
    names, choices = listed
    if setup.device.type == "cpu":
        choices = _SMALL[names]
    return [
        Config((*zip(names, blocks, strict=True), *more.items()), warps, stages) for *blocks, warps, stages in choices
    ]


def _once(make: Callable[[], _Problem]) -> Callable[[], _Problem]:
    made: list[_Problem] = []

    def get() -> _Problem:
        if not made:
            torch.manual_seed(0)
            made.append(make())
        return made[0]

    return get


def warm_up(setup: Setup, share: int, shares: int) -> None:
    """Run every `shares`-th config once, so that it is compiled; what fails is reported when it is measured."""
    every = [(work, config) for work in workloads(setup) for config in (None, *work.configs)]
    for work, config in every[share::shares]:
        try:
            work.run(config)
        except Exception as error:
            print(f"{work.what}, {name_of(config)}: {type(error).__name__}")


def sweep(setup: Setup) -> list[Measurement]:
    """For each workload the best config beside the shipped one."""
    works = workloads(setup)
    end: list[float] = []

    def measure(number: int) -> list[Row]:
        if not end:
            end.append(time.perf_counter() + setup.sweep_seconds)
        work, left = works[number], len(works) - number
        rows = _best(work, setup, (end[0] - time.perf_counter()) / left)
        works[number] = None  # type: ignore[call-overload]  # frees its tensors
        return rows

    return [Measurement(work.what, lambda number=number: measure(number)) for number, work in enumerate(works)]  # type: ignore[misc]


def _best(work: Workload, setup: Setup, seconds: float) -> list[Row]:
    found: dict[str, float | str] = {}
    fits: list[tuple[str, Side]] = []
    start = time.perf_counter()
    for config in (None, *work.configs):
        name = name_of(config)
        if config is not None and time.perf_counter() - start > seconds:
            found[name] = UNTRIED
            continue
        try:
            work.run(config)
            if on_gpu(setup.device):
                torch.cuda.synchronize()
            fits.append((name, Side(lambda config=config: work.run(config))))  # type: ignore[misc]
        except Exception as error:  # out of shared memory or registers
            if config is None:
                raise
            found[name] = f"{type(error).__name__}: {error}"[:120]
    left = max(0.5 * setup.seconds, min(seconds - (time.perf_counter() - start), 4 * setup.seconds))
    times = rounds([side for _, side in fits], setup.device, left, warm_up=1)
    medians = {name: statistics.median(own) for (name, _), own in zip(fits, times, strict=True)}
    best = min(medians, key=lambda name: medians[name])
    shipped = medians[name_of(None)]
    untried = list(found.values()).count(UNTRIED)
    failed = len(found) - untried
    return [
        Row(
            f"sweep: {work.what}",
            shipped / medians[best],
            baseline="shipped",
            baseline_ms=shipped,
            ours_ms=medians[best],
            tflops=work.flops / medians[best] / 1e9,
            note=f"{best}; of {len(medians)}, {failed} do not run, {untried} not tried",
            more={"configs": medians | found},
        )
    ]


def name_of(config: Config | None) -> str:
    """A config in a few characters."""
    if config is None:
        return "shipped"
    blocks = " ".join(f"{name}{size}" for name, size in config.blocks if name != "GROUP")
    return f"{blocks} w{config.num_warps} s{config.num_stages}"
