"""dW of row masks of any shape: programs of several languages add to the same rows, one after the other (`turnstile`).

Sums are float32, and rounded to the weight's dtype behind; one language alone writes its rows as they will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of, multiprocessors
from fastmask_kernels.launching import Prepared
from fastmask_kernels.row_arguments import filled, positions
from fastmask_kernels.row_configs import ROW_TURN_GRAD
from fastmask_kernels.row_pieces import live_count, pick
from fastmask_kernels.row_problem import RowProblem
from fastmask_kernels.turnstile import TURNSTILE_CHIPS, end_turn, put_tile, strips_together, turn_order, wait_for_turn

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
# dY^T and X over the segment's tokens, in steps of BM. With a bias there is one strip more, whose programs compute what
# the segment adds to BN elements of db. With column sums there is one chunk more, whose programs sum a strip of X over
# the tokens. Grid, one-dimensional: slots (the batch's segments) x chunks of BN packed rows of all weights x strips, in
# `turn_order`.
@triton.jit(
    do_not_specialize=["N0", "N1", "N2", "most0", "most1", "most2", "n_present", "first_slot", "n_slots", "together"],
)
def row_turn_grad_kernel(
    dy0, dy1, dy2, x, index0, index1, index2, counts0, counts1, counts2, dw0, dw1, dw2, db0, db1, db2,
    sums, sums_out, turns, token_rows, starts, present,
    K, x_stride, N0, N1, N2, most0, most1, most2, width0, width1, width2, dy_stride0, dy_stride1, dy_stride2,
    n_present, first_slot, n_slots, together,
    G: tl.constexpr, SLOTS: tl.constexpr, ALONE: tl.constexpr, TURNS: tl.constexpr, WITH_BIAS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    chunks0 = tl.cdiv(width0, BN)
    n_chunks = chunks0
    if G >= 2:
        chunks1 = tl.cdiv(width1, BN)
        n_chunks += chunks1
    if G >= 3:
        n_chunks += tl.cdiv(width2, BN)
    column_strips = tl.cdiv(K, BK)
    n_strips = column_strips
    if WITH_BIAS:
        n_strips += 1
    if COLUMN_SUMS:
        n_chunks += 1

    slot, chunk, strip = turn_order(tl.program_id(0), n_present, n_chunks, n_strips, together)
    slot += first_slot
    segment = tl.load(present + slot)
    if segment < 0:
        return  # fewer segments have tokens than there are slots

    i = tl.arange(0, BM)
    if COLUMN_SUMS:  # noqa: SIM102 (known when the kernel is compiled)
        if chunk == n_chunks - 1:
            column = strip * BK + tl.arange(0, BK)
            first = tl.load(starts + segment)
            last = tl.load(starts + segment + 1)
            total = tl.zeros([BM, BK], tl.float32)
            for m in range(first, last, BM):
                token = tl.load(token_rows + tl.minimum(m + i, last - 1)).to(tl.int64)
                x_tile = x + token[:, None] * x_stride + column[None, :]
                total += tl.load(x_tile, mask=(m + i < last)[:, None] & (column < K)[None, :], other=0.0).to(tl.float32)
            part = tl.sum(total, 0)
            if not ALONE:
                # One program for each segment before this one; the last rounds the sum to its place.
                if TURNS:
                    wait_for_turn(turns + G * n_strips + strip, slot)
                part += tl.load(sums + column, mask=column < K, other=0.0, cache_modifier=".cg")
                tl.store(sums + column, part, mask=column < K)
                if TURNS:
                    end_turn(turns + G * n_strips + strip)
            if tl.load(present + slot + 1, mask=slot + 1 < n_slots, other=-1) < 0:
                tl.store(sums_out + column, part.to(sums_out.dtype.element_ty), mask=column < K)
            return

    g = 0
    if G >= 2:
        g += (chunk >= chunks0).to(tl.int32)
        start1 = chunks0
        start2 = chunks0
        if G >= 3:
            g += (chunk >= chunks0 + chunks1).to(tl.int32)
            start2 += chunks1
        chunk -= tl.where(g == 0, 0, tl.where(g == 1, start1, start2))
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
    language = tl.maximum(segment - 1, 0).to(tl.int64)
    row = tl.load(index + language * most + j, mask=j < tl.where(segment == 0, 0, count), other=0)
    row += tl.where(j < tl.where(segment == 0, count, 0), j, 0)
    first = tl.load(starts + segment)
    last = tl.load(starts + segment + 1)

    if WITH_BIAS:  # noqa: SIM102 (known when the kernel is compiled)
        if strip == column_strips:
            db = pick(g, db0, db1, db2, G)
            total = tl.zeros([BM, BN], tl.float32)
            for m in range(first, last, BM):
                token = tl.load(token_rows + tl.minimum(m + i, last - 1)).to(tl.int64)
                dy_tile = dy + token[:, None] * dy_stride + j[None, :]
                total += tl.load(dy_tile, mask=(m + i < last)[:, None] & (j < width)[None, :], other=0.0).to(tl.float32)
            part = tl.sum(total, 0)
            if ALONE:
                tl.store(db + row, part.to(db.dtype.element_ty), mask=live)
            else:
                if TURNS:
                    wait_for_turn(turn, programs_before(slot, present, counts, N, width, SLOTS, BN))
                tl.store(db + row, part + tl.load(db + row, mask=live, other=0.0, cache_modifier=".cg"), mask=live)
                if TURNS:
                    end_turn(turn)
            return

    # Rows of dY^T behind the live ones may be anything, NaN included: each only enters its own row of the product,
    # which is not stored. Tokens past the last are zero in dY and the last token again in X.
    k = strip * BK + tl.arange(0, BK)
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
    alone: bool  # one segment alone writes its rows in their final dtype; several add up in float32, and take turns
    dtype: torch.dtype
    sizes: list[int]  # elements of the parts of the tensor that they write to
    n_turns: int

    @classmethod
    def of(cls, p: RowProblem) -> TurnGrad:
        """Decide all that does not depend on where the tensors lie."""
        K, G, n_present = p.x.shape[1], len(p.dys), p.plan.present.shape[0]
        widths = [dy.shape[1] for dy in p.dys]
        alone = n_present <= 1 and not p.accumulate
        dtype = p.weight_dtype if alone and p.outs is None else torch.float32
        pieces = max(1, n_present)
        outer = {"BN": widths, "BK": [K]}
        config = p.chosen("row_turn_grad", ROW_TURN_GRAD, outer, p.plan.n_rows // pieces, pieces=pieces)
        BN, BK = config["BN"], config["BK"]
        chunks = sum(triton.cdiv(width, BN) for width in widths) + p.column_sums
        strips = triton.cdiv(K, BK) + p.with_bias
        sizes = [n * K for n in p.n_rows] if p.outs is None else []
        sizes += [*p.n_rows] if p.with_bias else [K] if p.column_sums and not alone else []
        n_turns = 0 if alone else (G + p.column_sums) * strips
        if p.plan.n_rows == 0:
            return cls([], alone, dtype, sizes, n_turns)
        # About so many programs of one language at a time as keep the device busy.
        together = strips_together(strips, chunks, 2 * multiprocessors(p.x.device))
        takes_turns = chip_of(p.x.device) in TURNSTILE_CHIPS and not alone
        in_one_launch = n_present if takes_turns else 1
        xs, acts, lists, lengths, dws, dbs, rest = positions(1, G, G, G, G, G * p.with_bias, 6)
        places = [*filled(acts), *xs, *filled(lists), *filled(lengths), *filled(dws), *filled(dbs or dws), *rest]
        runs = [
            Prepared(
                row_turn_grad_kernel, (in_one_launch * chunks * strips,), places,
                K, p.x.stride(0), *filled(p.n_rows), *filled([index.shape[1] for index in p.indices]), *filled(widths),
                *filled([dy.stride(0) for dy in p.dys]), in_one_launch, first_slot, n_present, together,
                G=G, SLOTS=triton.next_power_of_2(n_present), ALONE=alone, TURNS=takes_turns,
                WITH_BIAS=p.with_bias, COLUMN_SUMS=p.column_sums,
                EVEN=K % BK == 0 and all(width % BN == 0 for width in widths),
                PRECISION="tf32" if p.allow_tf32 else "ieee",
                **dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages,
            )
            for first_slot in range(0, n_present, in_one_launch)
        ]  # fmt: skip
        return cls(runs, alone, dtype, sizes, n_turns)

    def __call__(self, p: RowProblem) -> tuple[list[Tensor], list[Tensor] | None]:
        """Returns dW and db (or, with column sums, those)."""
        K = p.x.shape[1]
        arena, turns = _arena(self.sizes, self.n_turns, self.dtype, p.x.device)
        dW, db, total = _parts(arena, p.n_rows, K, p.outs, p.with_bias)
        sums = torch.empty(K, dtype=p.weight_dtype, device=p.x.device) if p.column_sums else None
        if p.outs is not None and not p.accumulate:
            for out in p.outs:
                out.zero_()
        if self.runs:
            # Where the sums of columns add up, and where they go.
            both = (p.x, p.x) if sums is None else (sums if self.alone else arena[total:], sums)
            batch = p.plan.token_rows, p.plan.starts, p.plan.present
            for run in self.runs:
                run(p.x, *p.dys, *p.indices, *p.counts, *dW, *(db or ()), *both, turns, *batch)
        elif sums is not None:
            sums.zero_()
        if p.transposed:
            dW = [part.new_empty(part.shape[::-1], dtype=p.weight_dtype).copy_(part.t()) for part in dW]
            db = None if db is None else [part.to(p.weight_dtype) for part in db]
        elif self.dtype != p.weight_dtype and total:
            dW, db, _ = _parts(arena[:total].to(p.weight_dtype), p.n_rows, K, p.outs, p.with_bias)
        return dW, db if sums is None else [sums]


_ALIGNED = 64  # elements: parts of one tensor begin where 16-byte copies can


def _arena(sizes: Sequence[int], n_turns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros: room for parts of `sizes` elements, and int32 [n_turns] counters of turns."""
    total = sum([_room(size) for size in sizes])
    arena = torch.zeros(total + n_turns, dtype=dtype, device=device)
    turns = arena[total:].view(torch.int32) if n_turns else torch.empty(0, dtype=torch.int32, device=device)
    return arena, turns


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _parts(
    arena: Tensor, n_rows: Sequence[int], K: int, outs: Sequence[Tensor] | None, with_bias: bool
) -> tuple[list[Tensor], list[Tensor] | None, int]:
    """What lies in front in an arena: each dW (or `outs`) and each db (or None); and the elements that they take."""
    first, dW, db = 0, [] if outs is None else list(outs), None
    if outs is None:
        for n in n_rows:
            dW.append(arena.as_strided((n, K), (K, 1), first))
            first += _room(n * K)
    if with_bias:
        db = []
        for n in n_rows:
            db.append(arena.as_strided((n,), (1,), first))
            first += _room(n)
    return dW, db, first
