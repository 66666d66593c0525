"""Kernels to try the compile report on: one that is as it should be, and one for each thing that is not."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from fastmask_kernels.configs import Case, Config


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


def _case(name: str, kernel: object, bm: int, bn: int, bk: int, warps: int, stages: int, dtype: str = "bf16") -> Case:
    pointers, size = {key: f"*{dtype}" for key in "abc"}, {"bf16": 2, "fp32": 4}[dtype]
    return Case(
        kernel=kernel,
        name=name,
        config=Config((("BM", bm), ("BN", bn), ("BK", bk)), warps, stages),
        signature={**pointers, **dict.fromkeys("MNK", "i32")},
        constexprs={"BM": bm, "BN": bn, "BK": bk},
        aligned=tuple("abcMNK"),
        flops=2 * bm * bn * bk,
        bytes=(bm + bn) * bk * size,
    )


def cases() -> list[Case]:
    """The kernels, in the form the report takes."""
    good = _case("good", product, 128, 128, 64, 8, 3)
    return [
        good,
        replace(_case("unaligned", product, 64, 64, 32, 4, 2), aligned=()),
        replace(good, name="misdescribed", constexprs={"BM": 128, "BN": 128}),
        _case("spilling", product, 128, 256, 16, 4, 2),
        _case("dotless", row_sums, 64, 1, 64, 4, 2),
        _case("too_big", product, 128, 128, 128, 8, 4),
    ]
