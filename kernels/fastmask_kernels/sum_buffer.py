"""A float32 buffer for sums of several segments, which costs next to nothing where a batch has only one.

How many segments of a batch have tokens is known on the device alone. So the host launches the same kernels either way:
with one segment they leave the buffer alone, and the product is written straight to where it belongs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.launching import launch
from fastmask_kernels.plan import Plan

__all__ = ["clear", "finish", "several_segments"]

_BLOCK, _WARPS = 2048, 4


@triton.jit
def several_segments(present, SLOTS: tl.constexpr):
    """Whether the batch has tokens of more than one segment; `present` is a plan's, of SLOTS entries or fewer."""
    several = False
    if SLOTS > 1:
        several = tl.load(present + 1) >= 0
    return several


@triton.jit
def sum_buffer_kernel(
    out, buffer, present, n_columns, out_stride, SLOTS: tl.constexpr, ACCUMULATE: tl.constexpr, FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row. Grid: rows, blocks of columns.

    Before the sums (not FINISH) it clears the buffer, or where that is not used the result; after them it rounds the
    buffer to the result, or adds it.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    several = several_segments(present, SLOTS)
    place, sums = out + row * out_stride + column, buffer + row * n_columns + column
    if FINISH:
        if several:
            total = tl.load(sums, mask=inside, other=0)
            if ACCUMULATE:
                total += tl.load(place, mask=inside, other=0).to(tl.float32)
            tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    elif several:
        tl.store(sums, tl.zeros([BLOCK], tl.float32), mask=inside)
    elif not ACCUMULATE:
        tl.store(place, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)


def clear(out: Tensor, plan: Plan, accumulate: bool) -> Tensor:
    """Where several segments may add their sums: float32 [N, K], zeros if there are several.

    That is `out` itself if it is float32. Whatever does not use the buffer finds zeros in `out`, or with `accumulate`
    what it held.

    Args:
        out: [N, K], the elements of a row side by side.
        plan: the batch.
        accumulate: whether `out` is added to.
    """
    if out.dtype == torch.float32 or plan.present.shape[0] <= 1:
        if not accumulate:
            out.zero_()
        return out
    buffer = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    _launch(out, buffer, plan, accumulate, False)
    return buffer


def finish(out: Tensor, buffer: Tensor, plan: Plan, accumulate: bool) -> None:
    """Round what is in the buffer to `out`, or add it, if there were several segments."""
    if buffer is not out:
        _launch(out, buffer, plan, accumulate, True)


def _launch(out: Tensor, buffer: Tensor, plan: Plan, accumulate: bool, at_the_end: bool) -> None:
    launch(
        sum_buffer_kernel, (out.shape[0], triton.cdiv(out.shape[1], _BLOCK)), out,
        out, buffer, plan.present, out.shape[1], out.stride(0), SLOTS=triton.next_power_of_2(plan.present.shape[0]),
        ACCUMULATE=accumulate, FINISH=at_the_end, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
