"""What layers take on a GPU by the cost model, on paper: products, the traffic around them, launches, the host.

Nothing here is measured. Block sizes are those that would be launched, times those of `fastmask_kernels.cost_model`;
the assumptions of the rest stand below. `python -m benchmarks.gpu.recorded` prints the table; `make gpu` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from fastmask_kernels.configs import Config
from fastmask_kernels.cost_model import L2_SHARE, WAVE, seconds
from fastmask_kernels.limits import CHIPS
from fastmask_kernels.row_configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD, Table, choose
from fastmask_kernels.row_owned_grad import owned

__all__ = ["BERT", "HEADS", "ROWS", "Linear", "Workload", "dense_products", "masked_products", "predicted", "table"]

CHIP = CHIPS["sm_90"]
# cuBLAS: FLOP/s of a product whose tiles fill every multiprocessor, and the tiles it has to choose from, with the share
# of that rate each reaches.
DENSE, DENSE_TILES = 740e12, (((128, 256), 1.0), ((256, 128), 1.0), ((128, 128), 0.85))
GAP = 1.5e-6  # seconds between two kernels of one stream
# Seconds of the host for an operation of PyTorch, autograd included; ours take HOST times what they stand for, as
# `--host-time` measured.
OPERATION, HOST = 6e-6, 1.9
ELEMENT = 2  # bytes: bfloat16 throughout


@dataclass(frozen=True)
class Linear:
    """Layers [N, K] that share an input, each with a mask over rows or columns in units of so many."""

    name: str
    weights: int
    N: int
    K: int
    kind: str
    unit: int


@dataclass(frozen=True)
class Workload:
    """Layers on so many tokens of equally many in each language, half of the units alive.

    Attributes:
        others: bytes that operations around the products move, dense and masked.
        kernels: that dense and masked layers launch; `same` are launched on both sides beside them.
    """

    name: str
    layers: tuple[Linear, ...]
    tokens: int
    goal: float
    others: tuple[tuple[str, float, float], ...]
    kernels: tuple[int, int]
    same: int = 0
    languages: int = 8
    density: float = 0.5


def _bert(tokens: int, sentence: int, h: int, f: int, d: float) -> tuple[tuple[str, float, float], ...]:
    """Bytes of a BERT layer beside its products, forward and backward; attention reads and writes each tensor once."""
    one = ELEMENT * tokens
    return (
        ("LayerNorm, residuals", one * h * (10 + 12), one * h * (10 + 12)),
        ("sum of Q, K, V's input gradients", one * h * 6, 0.0),
        ("GELU and its gradient", one * f * 5, one * f * 4 * d),
        ("attention", one * h * 12, one * h * 12 * d),
        ("gradients of biases", one * (5 * h + f), one * (2 * h + (3 * h + f) * d)),
    )


BERT = Workload(
    "BERT-base layer, 8192 tokens",
    (
        Linear("Q, K, V", 3, 768, 768, "rows", 64),
        Linear("attention output", 1, 768, 768, "columns", 64),
        Linear("FFN up", 1, 3072, 768, "rows", 1),
        Linear("FFN down", 1, 768, 3072, "columns", 1),
    ),
    tokens=8192,
    goal=1.2,
    others=_bert(8192, 128, 768, 3072, 0.5),
    kernels=(29, 20),
    same=14,  # LayerNorm, residuals and attention, forward and backward
)
_BIAS = ELEMENT * 16384 * 4096.0
ROWS, HEADS = (
    Workload(
        f"4096 x 4096, rows of {name}, 16384 tokens",
        (Linear(name, 1, 4096, 4096, "rows", unit),),
        tokens=16384,
        goal=1.6,
        others=(("gradient of the bias", _BIAS, _BIAS / 2),),
        kernels=(4, 5 if unit == 1 else 3),
    )
    for name, unit in (("neurons", 1), ("heads", 128))
)


# ---- products


def _time(
    table: Table, outer: dict[str, list[int]], inner: tuple[str, int], load: Workload, pieces: int = 1, unit: int = 0
) -> tuple[Config, float, int]:
    """The config that is launched, its time, and the programs: with equally long segments no tile is cut short."""
    segments = load.languages + 1 if "BM" in outer else 1  # the full network's is empty
    device = torch.device("meta")  # which counts as an H200
    config = choose(
        table, device, "half", True, outer, inner, pieces=pieces, segments=segments,
        usable=lambda config: unit % config["BN"] == 0,
    )  # fmt: skip
    programs = pieces
    for name, sizes in outer.items():
        of = load.languages * [sizes[0] // load.languages] if name == "BM" else sizes
        programs *= sum(ceil(size / config[name]) for size in of)
    return config, seconds(config, programs, outer, inner, "half", CHIP, CHIP.multiprocessors), programs


def masked_products(layer: Linear, load: Workload) -> dict[str, tuple[str, float]]:
    """Forward, dX and dW of masked layers: block sizes, and seconds, zeroing, casts and copies included."""
    M, n, L = load.tokens, layer.weights, load.languages
    rows = layer.kind == "rows"
    side, other = (layer.N, layer.K) if rows else (layer.K, layer.N)  # that the mask cuts, and the whole one
    live = [round(side * load.density)] * n
    gathered = _time(ROW_MATMUL, {"BM": [M], "BN": live}, ("BK", other), load)[:2]
    spread = _time(ROW_MATMUL_T, {"BM": [M], "BK": [other]}, ("BN", sum(live)), load)[:2]
    weights = n * layer.N * layer.K
    if owned([layer.unit]):
        outer = {"BN": [side] * n, "BK": [other]}
        config, dw, _ = _time(ROW_OWNED_GRAD, outer, ("BM", round(M * load.density)), load, unit=layer.unit)
    else:
        config, dw, programs = _time(ROW_TURN_GRAD, {"BN": live, "BK": [other]}, ("BM", M // L), load, pieces=L)
        # Each program reads and writes a float32 tile of the sums; those of one strip do so one after the other.
        step = config["BN"] * config["BK"] * 8 / (L2_SHARE * CHIP.l2 / CHIP.multiprocessors)
        waves = ceil(programs / (CHIP.multiprocessors * config.resident))
        dw = max(dw + waves * step, dw / waves + L * step)
        dw += weights * (4 + 4 + ELEMENT) / CHIP.memory  # zeroed, read, and written in the weight's dtype
    copy = 0.0 if rows else weights * 2 * ELEMENT / CHIP.memory  # W^T, once for both passes
    forward, dx = (gathered, spread) if rows else (spread, gathered)
    return {
        "forward": (_named(forward[0]), forward[1] + copy),
        "dX": (_named(dx[0]), dx[1]),
        "dW": (_named(config), dw),
    }


def _named(config: Config) -> str:
    return "x".join(str(size) for name, size in config.blocks if name != "GROUP") + f" fit {config.resident}"


def dense_products(layer: Linear, load: Workload) -> dict[str, float]:
    """Seconds of the same by cuBLAS; a product with few tiles is split along what it sums over."""

    def one(rows: int, columns: int, depth: int) -> float:
        times = []
        for (a, b), share in DENSE_TILES:
            waves = ceil(rows / a) * ceil(columns / b) / CHIP.multiprocessors
            flops = 2 * ceil(rows / a) * a * ceil(columns / b) * b * depth
            times.append(flops / (DENSE * share) * (ceil(waves) / waves if waves > 1 else 1))
        return min(times) + WAVE / 3  # one program after the other: a new tile's reads hide behind the last one's sums

    M, n, N, K = load.tokens, layer.weights, layer.N, layer.K
    return {"forward": n * one(M, N, K), "dX": n * one(M, K, N), "dW": n * one(N, K, M)}


# ---- the table


def predicted(load: Workload) -> tuple[float, list[str]]:
    """Dense over masked as called, and the lines of a table."""
    lines = [f"{load.name}, {load.languages} languages, {load.density:.0%}: predicted, on paper, on {CHIP.product}"]
    lines.append(f"{'microseconds':<40}{'dense':>8}{'ours':>8}{'ratio':>7}  blocks")
    total = [0.0, 0.0]

    def add(what: str, dense: float, ours: float, note: str = "") -> None:
        total[0], total[1] = total[0] + dense, total[1] + ours
        ratio = f"{dense / ours:.2f}" if ours else "-"
        lines.append(f"{what:<40}{1e6 * dense:>8.0f}{1e6 * ours:>8.0f}{ratio:>7}  {note}".rstrip())

    for layer in load.layers:
        dense = dense_products(layer, load)
        for part, (blocks, ours) in masked_products(layer, load).items():
            add(f"{layer.name}: {part}", dense[part], ours, blocks)
    for what, before, after in load.others:
        add(what, before / CHIP.memory, after / CHIP.memory)
    kernels = [count + load.same for count in load.kernels]
    add(f"between {kernels[0]} and {kernels[1]} kernels", *(GAP * count for count in kernels))
    host = [OPERATION * (load.same + load.kernels[0] * factor) for factor in (1, HOST)]
    add_host = f"{'the host, beside the device':<40}{1e6 * host[0]:>8.0f}{1e6 * host[1]:>8.0f}"
    lines += [f"{'on the device':<40}{1e6 * total[0]:>8.0f}{1e6 * total[1]:>8.0f}{total[0] / total[1]:>7.2f}", add_host]
    called = [max(both) for both in zip(total, host, strict=True)]
    ratio = called[0] / called[1]
    short = "" if ratio >= load.goal else ", short"
    lines.append(f"as called: {ratio:.2f} times dense's speed, asked {load.goal:g}{short}")
    return ratio, lines


def table() -> Iterator[str]:
    """The lines of all workloads."""
    for load in (BERT, ROWS, HEADS):
        yield from (*predicted(load)[1], "")
