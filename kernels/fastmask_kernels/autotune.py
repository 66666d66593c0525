"""`python -m fastmask_kernels.autotune`: measure the shipped block sizes on this GPU and remember the best of each.

Every kernel is timed on random data of the sizes given, with each config its tables hold for this chip; the fastest is
kept in `configs.cache_file()`, and later launches of such sizes take it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from fastmask_kernels import configs
from fastmask_kernels.chips import chip_of, has_tf32
from fastmask_kernels.configs import Config, cache_file, kind_of, problem, remember
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_owned_grad import owned
from fastmask_kernels.row_weight_grad import row_weight_grad
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import block_sizes, tile_matmul

__all__ = ["fastest", "main", "tune"]

Launch = Callable[[Config], object]
PROJECTIONS = (1, 3)  # weights of a launch: a layer alone, and Q, K and V


def fastest(launch: Launch, candidates: Sequence[Config], time: Callable[[Callable[[], object]], float]) -> Config:
    """The candidate with the least time; one that the chip cannot run is passed over.

    Raises:
        RuntimeError: no candidate runs.
    """
    best: tuple[float, Config] | None = None
    problems: list[str] = []
    for config in dict.fromkeys(candidates):
        try:
            seconds = time(lambda config=config: launch(config))  # type: ignore[misc]
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
            problems.append(f"{config}: {error}")
            continue
        if best is None or seconds < best[0]:
            best = (seconds, config)
    if best is None:
        raise RuntimeError("no config runs here:\n" + "\n".join(problems))
    return best[1]


def tune_rows(
    x: Tensor, weights: Sequence[Tensor], index: Tensor, counts: Tensor, plan: Plan, unit: int = 1, tf32: bool = False
) -> list[tuple[str, Config]]:
    """Best configs of the row kernels for activations [M, K] and weights [N, K]; returned and remembered.

    With units that one program may own (`row_owned_grad.owned`) those of dW alone: the others know no units. Those of
    dW, which reads no weight, only with weights of the dtype of x.
    """
    (N, K), width, G, dtype = weights[0].shape, index.shape[1], len(weights), weights[0].dtype
    chip, kind, grad_kind = chip_of(x.device), kind_of(x, dtype, tf32), kind_of(x, None, tf32)
    rows, sizes = ([index] * G, [counts] * G, plan), [K]
    ys = row_matmul(x, weights, *rows, [width] * G, allow_tf32=tf32)

    def forward(config: Config) -> object:
        return row_matmul(x, weights, *rows, [width] * G, config=config, allow_tf32=tf32)

    def transposed(config: Config) -> object:
        return row_matmul_t(ys, weights, *rows, config=config, allow_tf32=tf32)

    def grad(config: Config) -> object:
        units = [unit] * G
        return row_weight_grad(ys, x, *rows, [N] * G, weight_dtype=dtype, units=units, config=config, allow_tf32=tf32)

    jobs: list[tuple[str, torch.dtype | None, Launch, list[Config]]] = []
    if not owned([unit]):
        jobs.append(("row_matmul", dtype, forward, configs.ROW_MATMUL[chip, kind]))
        jobs.append(("row_matmul_t", dtype, transposed, configs.ROW_MATMUL_T[chip, kind]))
    if dtype == x.dtype and owned([unit]):
        whole = [config for config in configs.ROW_OWNED_GRAD[chip, grad_kind] if unit % config["BN"] == 0]
        sizes.append(unit)  # a block may divide no other head
        jobs.append(("row_owned_grad", None, grad, whole))
    elif dtype == x.dtype:
        jobs.append(("row_turn_grad", None, grad, configs.ROW_TURN_GRAD[chip, grad_kind]))
    return [
        _keep(problem(name, x, dtype, [width] * G, sizes, plan, tf32), launch, candidates)
        for name, dtype, launch, candidates in jobs
    ]


def tune_tiles(
    x: Tensor, weight: Tensor, layout: TileLayout, plan: Plan, tf32: bool = False
) -> list[tuple[str, Config]]:
    """Best configs of the two tile products; the weight gradient's blocks follow from the layout's tile."""
    y = tile_matmul(x, weight, layout, plan, allow_tf32=tf32)
    found = []
    for transposed, given in ((False, x), (True, y)):
        sizes = [int(transposed), *weight.shape, *layout.tile]

        def launch(config: Config, given: Tensor = given, transposed: bool = transposed) -> object:
            return tile_matmul(given, weight, layout, plan, transposed=transposed, config=config, allow_tf32=tf32)

        tile, paired = layout.tile[::-1] if transposed else layout.tile, layout.pairs(transposed) is not None
        kernel = "pair_matmul" if paired else "tile_matmul"
        candidates = block_sizes(chip_of(x.device), x.dtype, weight.dtype, tile, paired)
        found.append(_keep(problem(kernel, x, weight.dtype, (), sizes, plan, tf32), launch, candidates))
    return found


def tune(x: Tensor, N: int, plan: Plan, density: float, head: int) -> list[tuple[str, Config]]:
    """Best configs for random weights [N, K] and activations [M, K]; returned and remembered.

    Measured is every way to launch with such activations: under autocast they meet float32 weights, and products of
    float32 may be let use TF32.
    """
    (_, K), languages, device, found = x.shape, plan.n_languages, x.device, []
    ways = [(x.dtype, False), (torch.float32, has_tf32(device) and x.dtype == torch.float32)]
    for dtype, tf32 in dict.fromkeys(ways):
        weight = torch.randn(N, K, device=device, dtype=dtype)
        for unit in (1, head) if N % head == 0 and owned([head]) else (1,):
            live, units = max(1, round(density * N / unit)), N // unit
            chosen = [torch.randperm(units, device=device)[:live].sort().values for _ in range(languages)]
            rows = torch.stack(chosen)[:, :, None] * unit + torch.arange(unit, device=device)
            counts = torch.full((languages,), live * unit, device=device)
            for G in PROJECTIONS:
                weights = [weight, *[torch.randn_like(weight) for _ in range(G - 1)]]
                found += tune_rows(x, weights, rows.flatten(1), counts, plan, unit, tf32)
        keep = torch.rand(languages, -(-N // 64), -(-K // 64), device=device) < density
        if N % 64 == 0 and K % 64 == 0:
            found += tune_tiles(x, weight, TileLayout.from_blocks(keep, (64, 64)), plan, tf32)
    return found


def _keep(name: str, launch: Launch, candidates: Sequence[Config]) -> tuple[str, Config]:
    config = fastest(launch, candidates, lambda run: triton.testing.do_bench(run, return_mode="median"))
    remember(name, config)
    return name, config


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune for one set of sizes."""
    parser = argparse.ArgumentParser(prog="python -m fastmask_kernels.autotune", description=__doc__)
    parser.add_argument("--weight", default="4096x4096", help="out_features x in_features (default: 4096x4096)")
    parser.add_argument("--examples", type=int, default=32, help="examples in a batch (default: 32)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an example (default: 512)")
    parser.add_argument("--languages", type=int, default=8, help="languages in a batch (default: 8)")
    parser.add_argument("--density", type=float, default=0.5, help="share of live rows or tiles (default: 0.5)")
    parser.add_argument("--head", type=int, default=64, help="rows of a head, for dW of heads (default: 64)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args(arguments)
    try:
        N, K = (int(size) for size in options.weight.split("x"))
    except ValueError:
        parser.error(f"--weight must be like 4096x4096, given {options.weight!r}")
    if not torch.cuda.is_available():
        print("autotune measures on a GPU, and there is none here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    ids = torch.arange(options.examples, device="cuda") * options.languages // options.examples
    plan = Plan(ids, options.tokens, options.languages)
    x = torch.randn(options.examples * options.tokens, K, device="cuda", dtype=dtype)
    found = tune(x, N, plan, options.density, options.head)
    for name, config in found:
        print(f"{name}: {dict(config.blocks)}, {config.num_warps} warps, {config.num_stages} stages")
    print(f"kept in {cache_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
