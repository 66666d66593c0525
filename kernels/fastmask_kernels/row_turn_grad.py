"""dW of row masks of any shape: programs of several languages add to the same rows, and take turns.

Sums are float32, and rounded to the weight's dtype behind; one language alone writes its rows as they will be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels import row_arguments as rows
from fastmask_kernels.chips import chip_of, multiprocessors
from fastmask_kernels.configs import ROW_TURN_GRAD
from fastmask_kernels.launching import Prepared
from fastmask_kernels.program_order import TURN_CHIPS, end_turn, put_tile, strips_together, turn_order, wait_for_turn
from fastmask_kernels.row_arguments import RowProblem, filled, live_count, pick, positions, sum_over_tokens

__all__ = ["TurnGrad"]


@triton.jit
def programs_before(slot, present, counts, N, width, SLOTS: tl.constexpr, BN: tl.constexpr):
    """How many programs the segments before `slot` have for each strip."""
    slots = tl.arange(0, SLOTS)
    earlier = tl.load(present + slots, mask=slots < slot, other=-1)
    count = tl.load(counts + earlier - 1, mask=earlier > 0, other=0).to(tl.int32)
    count = tl.minimum(tl.where(earlier == 0, N, count), width)
    return tl.sum(tl.cdiv(count, BN))


# One program computes what one segment (language) adds to BN of its live rows and BK columns of one dW: the product of
# dY^T and X over the segment's tokens, in steps of BM. With a bias there is one strip more, the first, whose programs
# compute what the segment adds to BN elements of db. With column sums there are programs before all others, n_sums of
# them, that sum SUMMED columns of X over all tokens. Grid, one-dimensional: those; then slots (the batch's segments) x
# chunks of BN packed rows of all weights x strips, in `turn_order`.
@triton.jit(do_not_specialize=[
    "N0", "N1", "N2", "most0", "most1", "most2", "n_present", "first_slot", "together", "n_sums", "n_tokens",
])  # fmt: skip
def row_turn_grad_kernel(
    dy0, dy1, dy2, x, index0, index1, index2, counts0, counts1, counts2, dw0, dw1, dw2, db0, db1, db2,
    sums, turns, token_rows, starts, present,
    K, x_stride, N0, N1, N2, most0, most1, most2, width0, width1, width2, dy_stride0, dy_stride1, dy_stride2,
    n_present, first_slot, together, n_sums, n_tokens,
    G: tl.constexpr, SLOTS: tl.constexpr, ALONE: tl.constexpr, TURNS: tl.constexpr, WITH_BIAS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr,
    SUM_STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if COLUMN_SUMS:
        if program < n_sums:
            column = program * SUMMED + tl.arange(0, SUMMED)
            total = sum_over_tokens(x, x_stride, column, column < K, token_rows, 0, n_tokens, False, SUMMED, SUM_STEP)
            tl.store(sums + column, total.to(sums.dtype.element_ty), mask=column < K)
            return
        program -= n_sums
    n_strips = tl.cdiv(K, BK)
    if WITH_BIAS:
        n_strips += 1
    n_chunks = rows.blocks_of(width0, width1, width2, G, BN)
    slot, chunk, strip = turn_order(program, n_present, n_chunks, n_strips, together)
    slot += first_slot
    segment = tl.load(present + slot)
    if segment < 0:
        return  # fewer segments have tokens than there are slots

    g, chunk = rows.weight_of(chunk, width0, width1, G, BN)
    N = pick(g, N0, N1, N2, G)
    width = pick(g, width0, width1, width2, G)
    counts = pick(g, counts0, counts1, counts2, G)
    count = live_count(counts, segment, N, width)
    if chunk * BN >= count:
        return

    dy = pick(g, dy0, dy1, dy2, G)
    dy_stride = pick(g, dy_stride0, dy_stride1, dy_stride2, G)
    index = pick(g, index0, index1, index2, G)
    most = pick(g, most0, most1, most2, G)
    turn = turns + g * n_strips + strip
    j = chunk * BN + tl.arange(0, BN)
    live = j < count
    row = rows.live_rows(index, most, segment, count, j)
    first = tl.load(starts + segment)
    last = tl.load(starts + segment + 1)

    if WITH_BIAS:
        if strip == 0:
            db = pick(g, db0, db1, db2, G) + row
            part = sum_over_tokens(dy, dy_stride, j, j < width, token_rows, first, last, True, BN, SUM_STEP)
            if ALONE:
                tl.store(db, part.to(db.dtype.element_ty), mask=live)
            else:
                if TURNS:
                    wait_for_turn(turn, programs_before(slot, present, counts, N, width, SLOTS, BN))
                tl.store(db, part + tl.load(db, mask=live, other=0.0, cache_modifier=".cg"), mask=live)
                if TURNS:
                    end_turn(turn)
            return
        strip -= 1

    # Rows of dY^T behind the live ones may be anything, NaN included: each only enters its own row of the product,
    # which is not stored. Tokens past the last are zero in dY and the last token again in X.
    k = strip * BK + tl.arange(0, BK)
    i = tl.arange(0, BM)
    acc = tl.zeros([BN, BK], tl.float32)
    for m in range(first, last, BM):
        token = tl.load(token_rows + tl.minimum(m + i, last - 1)).to(tl.int64)
        dy_tile = dy + token[:, None] * dy_stride + j[None, :]
        x_tile = x + token[:, None] * x_stride + k[None, :]
        if EVEN:
            a = tl.load(dy_tile, mask=(m + i < last)[:, None], other=0.0)
            b = tl.load(x_tile)
        else:
            a = tl.load(dy_tile, mask=(m + i < last)[:, None] & (j < width)[None, :], other=0.0)
            b = tl.load(x_tile, mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    dw = pick(g, dw0, dw1, dw2, G) + row[:, None] * K + strip * BK
    if ALONE:
        # No other segment: nothing to add to, and no turn to wait for.
        put_tile(dw, acc, live, K - strip * BK, 0, 1, False, BN, BK, 4)
    else:
        if TURNS:
            wait_for_turn(turn, programs_before(slot, present, counts, N, width, SLOTS, BN))
        put_tile(dw, acc, live, K - strip * BK, 0, 1, True, BN, BK, 4)
        if TURNS:
            end_turn(turn)


class TurnGrad(NamedTuple):
    """Prepared launches, none for an empty batch; called with the tensors of a `RowProblem` like the one given."""

    runs: list[Prepared]
    dtype: torch.dtype  # one segment alone writes its rows as they will be; several add up in float32, and take turns
    parts: list[tuple[tuple[int, ...], tuple[int, ...], int]]  # of each dW and db in one tensor: shape, strides, start
    total: int  # elements that they take there; behind them lie n_turns semaphores
    n_turns: int

    @classmethod
    def of(cls, p: RowProblem) -> TurnGrad:
        """Check the arguments, and decide all that does not depend on where the tensors lie."""
        p.check()
        K, G, n_present = p.x.shape[1], len(p.dys), p.plan.present.shape[0]
        widths, alone = [dy.shape[1] for dy in p.dys], n_present <= 1
        pieces = max(1, n_present)
        outer = {"BN": widths, "BK": [K]}
        config = p.chosen("row_turn_grad", ROW_TURN_GRAD, outer, p.plan.n_rows // pieces, pieces=pieces)
        BN, BK = config["BN"], config["BK"]
        chunks = sum(triton.cdiv(width, BN) for width in widths)
        strips = triton.cdiv(K, BK) + p.with_bias
        dtype, n_turns = p.weight_dtype if alone else torch.float32, 0 if alone else G * strips
        parts, total = [], 0
        for shape in [*[(n, K) for n in p.n_rows], *[(n,) for n in p.n_rows if p.with_bias]]:
            parts.append((shape, (K, 1) if len(shape) == 2 else (1,), total))
            total += -(-math.prod(shape) // _ALIGNED) * _ALIGNED
        if p.plan.n_rows == 0:
            return cls([], dtype, parts, total, n_turns)
        # About so many programs of one language at a time as keep the device busy.
        together = strips_together(strips, chunks, 2 * multiprocessors(p.x.device))
        takes_turns = chip_of(p.x.device) in TURN_CHIPS and not alone
        in_one_launch = n_present if takes_turns else 1
        xs, acts, lists, lengths, dws, dbs, sums, rest = positions(1, G, G, G, G, G * p.with_bias, p.column_sums, 4)
        places = [*filled(acts), *xs, *filled(lists), *filled(lengths), *filled(dws), *filled(dbs or dws)]
        runs = []
        for first_slot in range(0, n_present, in_one_launch):
            n_sums = triton.cdiv(K, rows.SUM_COLUMNS) if p.column_sums and first_slot == 0 else 0
            runs.append(
                Prepared(
                    row_turn_grad_kernel, (n_sums + in_one_launch * chunks * strips,), [*places, *(sums or xs), *rest],
                    K, p.x.stride(0), *filled(p.n_rows), *filled([index.shape[1] for index in p.indices]),
                    *filled(widths), *filled([dy.stride(0) for dy in p.dys]),
                    in_one_launch, first_slot, together, n_sums, p.plan.n_rows,
                    G=G, SLOTS=triton.next_power_of_2(n_present), ALONE=alone, TURNS=takes_turns,
                    WITH_BIAS=p.with_bias, COLUMN_SUMS=p.column_sums,
                    EVEN=K % BK == 0 and all(width % BN == 0 for width in widths),
                    PRECISION="tf32" if p.allow_tf32 else "ieee",
                    SUMMED=rows.SUM_COLUMNS, SUM_STEP=p.sum_step(BN),
                    **config.options,
                )
            )  # fmt: skip
        return cls(runs, dtype, parts, total, n_turns)

    def __call__(self, p: RowProblem) -> tuple[list[Tensor], list[Tensor] | None]:
        """Returns dW and db (or, with column sums, those)."""
        G, device = len(p.dys), p.x.device
        arena = torch.zeros(self.total + self.n_turns, dtype=self.dtype, device=device)
        turns = arena[self.total :].view(torch.int32) if self.n_turns else arena.new_empty(0, dtype=torch.int32)
        parts = [arena.as_strided(*part) for part in self.parts]
        make = torch.empty if self.runs else torch.zeros
        sums = [make(p.x.shape[1], dtype=p.weight_dtype, device=device)] if p.column_sums else None
        batch = p.plan.token_rows, p.plan.starts, p.plan.present
        for run in self.runs:
            run(p.x, *p.dys, *p.indices, *p.counts, *parts, *(sums or ()), turns, *batch)
        if p.transposed:
            parts[:G] = [dw.new_empty(dw.shape[::-1], dtype=p.weight_dtype).copy_(dw.t()) for dw in parts[:G]]
            parts[G:] = [db.to(p.weight_dtype) for db in parts[G:]]
        elif self.dtype != p.weight_dtype:
            arena = arena[: self.total].to(p.weight_dtype)
            parts = [arena.as_strided(*part) for part in self.parts]
        # As tensors of their own: views count as written where any of them is, and optimizers look.
        parts = [part.data for part in parts]
        return parts[:G], sums or parts[G:] or None


_ALIGNED = 64  # elements: parts of one tensor begin where 16-byte copies can
