"""An activation function, and its derivative, where a row kernel writes the gradient of its input."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "put_through_activation"]

ACTIVATIONS = ("", "gelu", "relu")


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """What an activation function, GELU (by the error function) or ReLU, makes of z."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """The gradient at z for an upstream gradient."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return dy * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def put_through_activation(
    y, y_stride, before, before_stride, active, acc, token_rows, first, last, j, live, width,
    ACTIVATION: tl.constexpr, ACTIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Writes acc [BN, BM] as the gradient of `before`, in PIECES of its tokens: registers hold no second tile."""
    if PIECES > 1:
        halves = tl.permute(tl.reshape(acc, (BN, 2, BM // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        put_through_activation(
            y, y_stride, before, before_stride, active, left, token_rows, first, last, j, live, width,
            ACTIVATION, ACTIVE, BM // 2, BN, PIECES // 2,
        )  # fmt: skip
        put_through_activation(
            y, y_stride, before, before_stride, active, right, token_rows, first + BM // 2, last, j, live, width,
            ACTIVATION, ACTIVE, BM // 2, BN, PIECES // 2,
        )  # fmt: skip
    else:
        m = first + tl.arange(0, BM)
        token = tl.load(token_rows + tl.minimum(m, last - 1)).to(tl.int64)
        stored = (m < last)[None, :] & (j < width)[:, None]
        place = token[None, :] * before_stride + j[:, None]
        z = tl.load(before + place, mask=stored & live[:, None], other=0.0).to(tl.float32)
        result = through_activation(acc, z, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + token[None, :] * y_stride + j[:, None], tl.where(live[:, None], result, 0.0), mask=stored)
        if ACTIVE:
            there = active + token[None, :] * width + j[:, None]
            tl.store(there, activated(z, ACTIVATION).to(active.dtype.element_ty), mask=stored)  # 0 is mapped to 0
