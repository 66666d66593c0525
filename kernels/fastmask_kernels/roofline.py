"""The least time a masked linear layer could take on a chip, and how far below the dense layer's that is.

A floor counts the bytes that must move whatever the kernel does: each input read once, each output written once, from
and to memory; and the multiply-adds, times two, that the mask leaves. No kernel gets below it. It takes no account of
launches, of tiles that are not full, or of two operations sharing an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastmask_kernels.limits import CHIPS, Chip

__all__ = ["Work", "masked_linear", "roofline", "roofline_table", "workloads"]

PASSES = ("forward", "dX", "dW")


def roofline(flops: float, n_bytes: float, chip: Chip, dtype: str = "bf16") -> tuple[float, str]:
    """Seconds that `flops` and `n_bytes` from memory take at least, and which of them it is: "compute" or "memory".

    `dtype` is that of the operands: "bf16", "fp16", "tf32" or "fp32". Williams, Waterman and Patterson, "Roofline",
    2009: arithmetic and transfers overlap, so the slower of the two is the bound.
    """
    compute, memory = flops / chip.flops(dtype), n_bytes / chip.memory
    return max(compute, memory), "compute" if compute >= memory else "memory"


@dataclass(frozen=True)
class Work:
    """FLOPs and compulsory bytes of one operation."""

    flops: float
    n_bytes: float


def masked_linear(
    kind: str, M: int, N: int, K: int, density: float, n_languages: int, element: int = 2
) -> dict[str, Work]:
    """What the passes of a linear layer [N, K] over M tokens have to do: "forward", "dX" and "dW".

    Languages own random, independent parts of one density and have equally many tokens. The weight is then read where
    any language owns it, a share of 1 - (1 - density)^L; its gradient is written whole, zeros included.

    Args:
        kind: "dense"; "rows" (the output holds every row, zeros where dead); "packed rows", "packed columns" (that
            side of the activations holds live units only); "blocks" (`density` of 64 x 64 blocks live); "weights" (any
            pattern: no tile is dead, so the FLOPs are the dense ones).
        M: tokens.
        N: out_features.
        K: in_features.
        density: live share.
        n_languages: L.
        element: bytes of an element of activations, weight and gradient.
    """
    index = {  # bytes of the mask: 4 for a live unit or block, a bit for a weight
        "dense": 0.0,
        "rows": 4 * n_languages * N * density,
        "packed rows": 4 * n_languages * N * density,
        "packed columns": 4 * n_languages * K * density,
        "blocks": 4 * n_languages * (N / 64) * (K / 64) * density,
        "weights": n_languages * N * K / 8,
    }
    if kind not in index:
        raise ValueError(f"kind must be one of {', '.join(index)}, given {kind!r}")
    if kind == "dense":
        density = 1.0
    x = M * K * (density if kind == "packed columns" else 1)
    y = M * N * (density if kind == "packed rows" else 1)
    dy = M * N * (density if kind in ("rows", "packed rows") else 1)  # a dead row's gradient need not be read
    weight = N * K * (1 - (1 - density) ** n_languages)
    flops = 2.0 * M * N * K * (1 if kind == "weights" else density)
    return {
        "forward": Work(flops, element * (x + weight + y) + index[kind]),
        "dX": Work(flops, element * (dy + weight + x) + index[kind]),
        "dW": Work(flops, element * (dy + x + N * K) + index[kind]),
    }


@dataclass(frozen=True)
class Workload:
    """A named list of layers, run one after the other: (times, kind, M, N, K), all at one density."""

    name: str
    layers: tuple[tuple[int, str, int, int, int], ...]
    density: float
    n_languages: int


def workloads() -> Iterator[Workload]:
    """The workloads that the kernels are judged by, in bf16."""
    M, N, K = 16384, 4096, 4096
    yield Workload("rows 50%, full-width output", ((1, "rows", M, N, K),), 0.5, 8)
    yield Workload("rows 50%, packed output", ((1, "packed rows", M, N, K),), 0.5, 8)
    tokens, width, ffn = 8192, 768, 3072
    parts = (
        ("Q, K, V", (3, "packed rows", tokens, width, width)),
        ("attention output", (1, "packed columns", tokens, width, width)),
        ("FFN up", (1, "packed rows", tokens, ffn, width)),
        ("FFN down", (1, "packed columns", tokens, width, ffn)),
    )
    for name, layer in parts:
        yield Workload(f"BERT-base, {name}, 50%", (layer,), 0.5, 8)
    yield Workload("BERT-base, together, 50%", tuple(layer for _, layer in parts), 0.5, 8)
    for density in (0.7, 0.5, 0.3):
        yield Workload(f"64 x 64 blocks {density:.0%}", ((1, "blocks", M, N, K),), density, 8)
    for n_languages in (1, 8):
        yield Workload("bits 50%", ((1, "weights", M, N, K),), 0.5, n_languages)


def roofline_table(chip: Chip = CHIPS["sm_90"]) -> str:
    """The floors of `workloads()` on `chip` beside the dense ones, as text."""
    lines = [
        f"Floors on {chip.product}: {chip.flops_16bit / 1e12:.0f} TFLOP/s in bf16, {chip.memory / 1e12:.1f} TB/s.",
        "Compulsory bytes: each input read once, each output written once, masks included. Operations one after the",
        "other; of attention only the projections. `ideal` = dense floor / floor: no kernel can be faster than that",
        "against a dense one that reaches the same rates.",
        "",
        f"{'workload':<36}{'L':>3} {'tokens':>7} {'pass':<8}{'GFLOP':>9}{'MB':>8}{'floor ms':>10} {'bound':<9}"
        f"{'dense ms':>9}{'ideal':>7}",
    ]
    for load in workloads():
        for name in PASSES:
            total = dense_total = flops = n_bytes = 0.0
            bounds = set()
            for times, kind, M, N, K in load.layers:
                work = masked_linear(kind, M, N, K, load.density, load.n_languages)[name]
                dense = masked_linear("dense", M, N, K, 1.0, load.n_languages)[name]
                seconds, bound = roofline(work.flops, work.n_bytes, chip)
                total += times * seconds
                dense_total += times * roofline(dense.flops, dense.n_bytes, chip)[0]
                flops, n_bytes = flops + times * work.flops, n_bytes + times * work.n_bytes
                bounds.add(bound)
            lines.append(
                f"{load.name:<36}{load.n_languages:>3} {load.layers[0][2]:>7} {name:<8}{flops / 1e9:>9.1f}"
                f"{n_bytes / 1e6:>8.1f}{1e3 * total:>10.4f} {'+'.join(sorted(bounds)):<9}{1e3 * dense_total:>9.4f}"
                f"{dense_total / total:>7.2f}"
            )
    return "\n".join(lines)
