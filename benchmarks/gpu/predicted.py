"""What dense and masked layers take on a GPU, on paper: a roofline of products, traffic and launches around them.

Nothing here is measured. Block sizes are those that would be launched, times those of `fastmask_kernels.configs`;
the assumptions of the rest stand below. All is bfloat16. `python -m benchmarks.gpu.predicted` prints all sections.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from fastmask_kernels.chips import CHIPS
from fastmask_kernels.configs import (
    L2_SHARE,
    ROW_MATMUL,
    ROW_MATMUL_T,
    ROW_OWNED_GRAD,
    ROW_TURN_GRAD,
    WAVE,
    Table,
    choose,
    programs_of,
    seconds,
)
from fastmask_kernels.row_owned_grad import owned

from benchmarks.cases.op import PARTS, unit_of, weight_shape
from benchmarks.row import Setting

CHIP = CHIPS["sm_90"]
# cuBLAS: FLOP/s of a product whose tiles fill every multiprocessor, and the tiles it has to choose from, with the share
# of that rate each reaches.
DENSE, DENSE_TILES = 740e12, (((128, 256), 1.0), ((256, 128), 1.0), ((128, 128), 0.85))
GAP = 1.5e-6  # seconds between two kernels of one stream
# Seconds of the host for an operation of PyTorch, autograd included; ours take HOST times what they stand for
# (docs/log/2026-11-29-gpu-host-time.md).
OPERATION, HOST = 6e-6, 1.9
ELEMENT = 2  # bytes
PASSES = PARTS[:3]
# Kernels that dense and masked layers launch, forward and backward, by case and unit; beside them a BERT layer launches
# SAME on both sides (LayerNorm, residuals, attention).
OURS = {"neurons": 5, "neuron-inputs": 6, "heads": 3, "head-inputs": 4, "blocks64": 7, "weights": 4}
KERNELS = {("encoder", "both"): (29, 20), **{("op", unit): (4, ours) for unit, ours in OURS.items()}}
SAME = 14


class Linear(NamedTuple):
    """Layers [N, K] that share an input, each with a mask of a kind in units of so many rows or columns."""

    weights: int
    N: int
    K: int
    kind: str
    unit: int


def predicted_ms(setting: Setting, part: str, implementation: str) -> float | None:
    """Milliseconds of "dense" or "fastmask" on an H200; None for what the model knows nothing of.

    As called, a pass takes as long as the slower of device and host; as a graph the device's time is left.
    """
    part, _, how = part.partition(" ")
    kernels, ours = KERNELS.get((setting.case, setting.unit)), {"dense": False, "fastmask": True}.get(implementation)
    if None in (kernels, ours) or setting.dtype != "bfloat16-parameters" or setting.compiled:
        return None
    products = [(masked_products if ours else dense_products)(linear, setting) for linear in linears_of(setting)]
    if part in PASSES:
        return 1e3 * sum(own[part] for own in products)
    layers, same = (setting.layers, SAME) if setting.case == "encoder" else (1, 0)
    device = sum(sum(own.values()) for own in products)
    device += sum(both[ours] for both in _bytes_around(setting)) / CHIP.memory + GAP * (kernels[ours] + same)
    host = OPERATION * (same + kernels[0] * (HOST if ours else 1))
    return 1e3 * layers * {"": max(device, host), "graph": device, "host-time": host}[how]


def linears_of(setting: Setting) -> list[Linear]:
    """The masked layers of one weight, or of one encoder layer with heads and neurons."""
    if setting.case == "op":
        return [Linear(1, *weight_shape(setting), setting.kind, unit_of(setting))]
    h, ffn, head = setting.sizes.hidden, setting.sizes.ffn, setting.sizes.hidden // setting.sizes.heads
    qkv, out = Linear(3, h, h, "rows", head), Linear(1, h, h, "columns", head)
    return [qkv, out, Linear(1, ffn, h, "rows", 1), Linear(1, h, ffn, "columns", 1)]


def _bytes_around(setting: Setting) -> list[tuple[float, float]]:
    """Bytes beside the products, dense and masked, in both passes; attention reads and writes each tensor once."""
    one, d = ELEMENT * setting.batch * setting.tokens, setting.density
    if setting.case == "op":
        N, kind = weight_shape(setting)[0], setting.kind
        return [(one * N, one * N * (d if kind == "rows" else 1))]  # the gradient of the bias
    h, f = setting.sizes.hidden, setting.sizes.ffn
    return [
        (one * h * (10 + 12), one * h * (10 + 12)),  # LayerNorm, residuals
        (one * h * 6, 0.0),  # the sum of Q, K, V's input gradients
        (one * f * 5, one * f * 4 * d),  # GELU and its gradient
        (one * h * 12, one * h * 12 * d),  # attention
        (one * (5 * h + f), one * (2 * h + (3 * h + f) * d)),  # gradients of biases
    ]


def dense_products(layer: Linear, setting: Setting) -> dict[str, float]:
    """Seconds of forward, dX and dW by cuBLAS; a product with few tiles is split along what it sums over."""

    def one(rows: int, columns: int, depth: int) -> float:
        times = []
        for (a, b), share in DENSE_TILES:
            waves = ceil(rows / a) * ceil(columns / b) / CHIP.multiprocessors
            flops = 2 * ceil(rows / a) * a * ceil(columns / b) * b * depth
            times.append(flops / (DENSE * share) * (ceil(waves) / waves if waves > 1 else 1))
        return min(times) + WAVE / 3  # one program after the other: a new tile's reads hide behind the last one's sums

    M, n, N, K = setting.batch * setting.tokens, layer.weights, layer.N, layer.K
    return {"forward": n * one(M, N, K), "dX": n * one(M, K, N), "dW": n * one(N, K, M)}


def masked_products(layer: Linear, setting: Setting) -> dict[str, float]:
    """Seconds of the same of masked layers; zeroing, casts and copies included."""
    M, L, d = setting.batch * setting.tokens, setting.present, setting.density
    flops = 2.0 * M * layer.N * layer.K
    if layer.kind == "weights":  # every tile is partial
        return {part: _tiled(flops, 128 if part == "dW" else 256, 128) for part in PASSES}
    if layer.kind == "blocks":  # of a pair of tiles of 64 a share d is multiplied together, the others by themselves
        return dict.fromkeys(PASSES, _tiled(flops * d * d, 256, 128) + _tiled(flops * d * (1 - d), 256, 64))
    n, rows = layer.weights, layer.kind == "rows"
    side, other = (layer.N, layer.K) if rows else (layer.K, layer.N)  # that the mask cuts, and the whole one
    live = [round(side * d)] * n
    gathered = _time(ROW_MATMUL, {"BM": [M], "BN": live}, ("BK", other), L)
    spread = _time(ROW_MATMUL_T, {"BM": [M], "BK": [other]}, ("BN", sum(live)), L)
    weights = n * layer.N * layer.K
    if owned([layer.unit]):
        dw = _time(ROW_OWNED_GRAD, {"BN": [side] * n, "BK": [other]}, ("BM", round(M * d)), L, unit=layer.unit)
    else:
        dw = _time(ROW_TURN_GRAD, {"BN": live, "BK": [other]}, ("BM", M // L), L, turns=True)
        dw += weights * (4 + 4 + ELEMENT) / CHIP.memory  # zeroed, read, and written in the weight's dtype
    copy = 0.0 if rows else weights * 2 * ELEMENT / CHIP.memory  # W^T, once for both passes
    forward, dx = (gathered, spread) if rows else (spread, gathered)
    return {"forward": forward + copy, "dX": dx, "dW": dw}


def _tiled(flops: float, a: int, b: int) -> float:
    """Sums over tiles [a, b]: bound by arithmetic, or by what a step reads through the L2 cache."""
    rate = 2 * a * b / (ELEMENT * (a + b)) * L2_SHARE * CHIP.l2
    return flops / min(CHIP.flops_16bit, rate) + WAVE


def _time(
    table: Table, outer: dict[str, list[int]], inner: tuple[str, int], L: int, unit: int = 0, turns: bool = False
) -> float:
    """Seconds with the config that is launched; with `turns` the programs of a tile, one a language, add one by one."""
    segments, pieces = (L + 1 if "BM" in outer else 1), (L if turns else 1)  # the full network's segment is empty
    config = choose(
        table, torch.device("meta"), "half", True, outer, inner, pieces=pieces, segments=segments,
        usable=lambda config: unit % config["BN"] == 0,
    )  # fmt: skip  # "meta" counts as an H200
    cut = {name: L * [sizes[0] // L] if name == "BM" else sizes for name, sizes in outer.items()}
    programs = programs_of(config, cut, pieces)
    found = seconds(config, programs, outer, inner, "half", CHIP, CHIP.multiprocessors)
    if not turns:
        return found
    # Each program reads and writes a float32 tile of the sums.
    step = config["BN"] * config["BK"] * 8 / (L2_SHARE * CHIP.l2 / CHIP.multiprocessors)
    waves = ceil(programs / (CHIP.multiprocessors * config.resident))
    return max(found + waves * step, found / waves + L * step)


def main() -> None:
    """Print the predictions of all sections."""
    from benchmarks.gpu.sections import SECTIONS

    print(f"predicted, on paper, on {CHIP.product}; milliseconds, and dense over ours")
    for job in (job for jobs in SECTIONS.values() for job in jobs if not job.setting.compiled):
        for part in job.parts:
            dense, ours = (predicted_ms(job.setting, part, name) for name in ("dense", "fastmask"))
            print(f"{job.setting.words()}, {part}: {dense:.3f} {ours:.3f} {dense / ours:.2f}")


if __name__ == "__main__":
    main()
