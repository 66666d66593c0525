"""Kernels to try the compile report on: one that is as it should be, and one for each thing that is not."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmask_kernels.compiling import STEPS
from fastmask_kernels.recorder import Variant
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program: c[BM, BN] of a [M, K] times b [N, K] transposed. Grid: tiles of c, one-dimensional."""
    tile = tl.program_id(0)
    rows = (tile // tl.cdiv(N, BN) * BM + tl.arange(0, BM)) % M
    columns = (tile % tl.cdiv(N, BN) * BN + tl.arange(0, BN)) % N
    inner = tl.arange(0, BK)
    at_a = a + rows[:, None].to(tl.int64) * K + inner[None, :]
    at_b = b + columns[:, None].to(tl.int64) * K + inner[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        total = tl.dot(tl.load(at_a), tl.trans(tl.load(at_b)), total)
        at_a += BK
        at_b += BK
    tl.store(c + rows[:, None].to(tl.int64) * N + columns[None, :], total.to(c.dtype.element_ty))


@triton.jit
def row_sums(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program: BM sums over a's rows, without any dot. Grid: tiles of rows."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)) % M
    at_a = a + rows[:, None].to(tl.int64) * K + tl.arange(0, BK)[None, :]
    total = tl.zeros((BM,), tl.float32)
    for _ in range(0, K, BK):
        total += tl.sum(tl.load(at_a).to(tl.float32), 1)
        at_a += BK
    tl.store(c + rows, total.to(c.dtype.element_ty))


STEPS |= dict.fromkeys(("product", "row_sums"), lambda c: 2 * c["BM"] * c["BN"] * c["BK"])


def variants(chip: str) -> list[Variant]:
    """The kernels, in the form the report takes."""

    def made(
        name: str, kernel: Any, bm: int, bn: int, bk: int, warps: int, stages: int, aligned: str = "abcMNK"
    ) -> Variant:
        sizes = {"BM": bm, "BN": bn, "BK": bk}
        signature = {
            key: "*bf16" if key in "abc" else "i32" if key in "MNK" else "constexpr" for key in kernel.arg_names
        }
        attrs = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned}
        constants = {(kernel.arg_names.index(key),): size for key, size in sizes.items()}
        return Variant(name, ASTSource(kernel, signature, constants, attrs), warps, stages, chip)

    return [
        made("good", product, 128, 128, 64, 8, 3),
        made("unaligned", product, 64, 64, 32, 4, 2, aligned=""),
        made("misdescribed", product, 128, 128, 24, 8, 3),
        made("spilling", product, 128, 256, 16, 4, 2),
        made("dotless", row_sums, 64, 1, 64, 4, 2),
        made("too_big", product, 128, 128, 128, 8, 4),
    ]
