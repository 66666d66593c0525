"""Gradient of weights under row masks, all languages in one launch: only live work, and the same bits every run.

The rows of two languages overlap, so their sums meet in the same rows of dW; they take turns (`turnstile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of
from fastmask_kernels.configs import Config
from fastmask_kernels.launching import Prepared, described, described_masks, prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_arguments import aligned, check_activation, check_rows, filled, positions
from fastmask_kernels.row_configs import ROW_WEIGHT_GRAD, choose, kind_of
from fastmask_kernels.row_pieces import live_count, pick
from fastmask_kernels.tuning import tuned
from fastmask_kernels.turnstile import TURNSTILE_CHIPS, end_turn, put_tile, strips_together, turn_order, wait_for_turn

__all__ = ["row_weight_grad"]


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
def row_weight_grad_kernel(
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
        put_tile(dw, acc, live, K - strip * BK, 0, False, BN, BK, 4)
    else:
        if TURNS:
            wait_for_turn(turn, programs_before(slot, present, counts, N, width, SLOTS, BN))
        put_tile(dw, acc, live, K - strip * BK, 0, True, BN, BK, 4)
        if TURNS:
            end_turn(turn)


def row_weight_grad(
    dys: Sequence[Tensor],
    x: Tensor,
    indices: Sequence[Tensor],
    counts: Sequence[Tensor],
    plan: Plan,
    n_rows: Sequence[int],
    *,
    weight_dtype: torch.dtype,
    outs: Sequence[Tensor] | None = None,
    accumulate: bool = False,
    with_bias: bool = False,
    transposed: bool = False,
    column_sums: bool = False,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """dW_g[index_g[l, j]] = sum over the tokens m of each language l of dys_g[m, j] x[m], and db_g likewise.

    Sums are float32, in an order that depends on nothing but the arguments: two runs give the same bits. Fresh results
    are parts of one tensor, which is zeroed and rounded at once.

    Args:
        dys: one to three packed gradients [M, width_g]; what lies behind a language's live units is never used. Widths
            that are multiples of 16 copy fast.
        x: [M, K] in the gradients' dtype.
        indices: the live rows of each, int64 [L, most_g].
        counts: how many they are, int64 [L].
        plan: the batch; for its rows of the full network column j of dys_g belongs to row j.
        n_rows: N_g of each weight.
        weight_dtype: of fresh results, x's dtype or float32.
        outs: float32 [N_g, K] contiguous, where dW_g is written, or added to with `accumulate`; returned as they are.
            None takes fresh memory.
        accumulate: add to `outs` instead of overwriting them; biases' gradients are always fresh.
        with_bias: also sum db.
        transposed: return fresh dW_g as contiguous [K, N_g]: a mask over columns is one over the transposed weight's
            rows.
        column_sums: in the place of db, return the sum of x over all tokens, [K]: there x is the gradient of y, and
            this the bias's. Not with `with_bias`.
        config: block sizes BM (tokens in one step), BN (packed rows) and BK (columns); None chooses.
        allow_tf32: lets float32 products use TF32 (10 bits of mantissa).

    Returns:
        The list of dW_g [N_g, K] and that of db_g [N_g] (None without a bias), dead rows exactly zero.

    Raises:
        TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
    """
    key = (
        "row_weight_grad", described(x, *dys), described_masks(indices), described_masks(counts), plan.sizes,
        tuple(n_rows), weight_dtype, outs and described(*outs), accumulate, with_bias, transposed, column_sums, config,
        allow_tf32,
    )  # fmt: skip
    prepare = partial(
        _prepare, dys, x, indices, counts, plan, n_rows, weight_dtype, outs, accumulate, with_bias, column_sums, config,
        allow_tf32,
    )  # fmt: skip
    runs, alone, dtype, sizes, n_turns = prepared(key, prepare)
    K = x.shape[1]
    arena, turns = _arena(sizes, n_turns, dtype, x.device)
    dW, db, total = _parts(arena, n_rows, K, outs, with_bias)
    sums = torch.empty(K, dtype=weight_dtype, device=x.device) if column_sums else None
    if outs is not None and not accumulate:
        for out in outs:
            out.zero_()
    if runs:
        # Where the sums of columns add up, and where they go.
        both = (x, x) if sums is None else (sums if alone else arena[total:], sums)
        for run in runs:
            run(x, *dys, *indices, *counts, *dW, *(db or ()), *both, turns, plan.token_rows, plan.starts, plan.present)
    elif sums is not None:
        sums.zero_()
    if outs is None and transposed:
        dW = [part.new_empty(part.shape[::-1], dtype=weight_dtype).copy_(part.t()) for part in dW]
        db = None if db is None else [part.to(weight_dtype) for part in db]
    elif dtype != weight_dtype and total:
        dW, db, _ = _parts(arena[:total].to(weight_dtype), n_rows, K, outs, with_bias)
    return dW, db if sums is None else [sums]


class _Decided(NamedTuple):
    """What a call needs: its launches, none for an empty batch, and the tensor that they write to."""

    runs: list[Prepared]
    alone: bool  # one segment alone writes its rows in their final dtype; several add up in float32, and take turns
    dtype: torch.dtype
    sizes: list[int]  # elements of the tensor's parts
    n_turns: int


def _prepare(
    dys: Sequence[Tensor], x: Tensor, indices: Sequence[Tensor], counts: Sequence[Tensor], plan: Plan,
    n_rows: Sequence[int], weight_dtype: torch.dtype, outs: Sequence[Tensor] | None, accumulate: bool, with_bias: bool,
    column_sums: bool, config: Config | None, allow_tf32: bool,
) -> _Decided:  # fmt: skip
    """Check the arguments of `row_weight_grad`, and decide all that does not depend on where its tensors lie."""
    G = len(dys)
    check_activation("x", x, plan)
    check_rows(indices, counts, G, plan, x.device)
    for number, dy in enumerate(dys):
        check_activation(f"dys[{number}]", dy, plan)
        if dy.dtype != x.dtype or dy.device != x.device:
            raise ValueError(f"dys[{number}]: expected {x.dtype} on {x.device}, given {dy.dtype} on {dy.device}")
    if weight_dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight_dtype: expected {x.dtype} or torch.float32, given {weight_dtype}")
    if len(n_rows) != G or min(n_rows) < 1:
        raise ValueError(f"n_rows: expected {G} positive integers, given {list(n_rows)}")
    K = x.shape[1]
    if accumulate and outs is None:
        raise ValueError("accumulate: expected outs to add to, given None")
    if with_bias and column_sums:
        raise ValueError("column_sums are a bias's gradient in the place of db: expected one of with_bias, column_sums")
    if outs is not None:
        _check_outs(outs, n_rows, K, x)

    alone = plan.present.shape[0] <= 1 and not accumulate
    dtype = weight_dtype if alone and outs is None else torch.float32
    config = config or _config(dys, x, plan, allow_tf32)
    strips = triton.cdiv(K, config["BK"]) + with_bias
    sizes = [n * K for n in n_rows] if outs is None else []
    sizes += [*n_rows] if with_bias else [K] if column_sums and not alone else []
    n_turns = 0 if alone else (G + column_sums) * strips
    runs = (
        []
        if plan.n_rows == 0
        else _launches(dys, x, indices, plan, n_rows, alone, with_bias, column_sums, config, allow_tf32)
    )
    return _Decided(runs, alone, dtype, sizes, n_turns)


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


def _config(dys: Sequence[Tensor], x: Tensor, plan: Plan, allow_tf32: bool) -> Config:
    K, n_present, widths = x.shape[1], max(1, plan.present.shape[0]), [dy.shape[1] for dy in dys]
    return tuned("row_weight_grad", x, None, [*widths, K], plan, allow_tf32) or choose(
        ROW_WEIGHT_GRAD[chip_of(x.device), kind_of(x, None, allow_tf32)],
        {"BN": sum(widths), "BK": K},
        n_present,
        plan.n_rows // n_present,
        aligned(x, *dys),
    )


def _launches(
    dys: Sequence[Tensor], x: Tensor, indices: Sequence[Tensor], plan: Plan, n_rows: Sequence[int], alone: bool,
    with_bias: bool, column_sums: bool, config: Config, allow_tf32: bool,
) -> list[Prepared]:  # fmt: skip
    """One launch; without turns one for each segment that the batch may have."""
    K, n_present = x.shape[1], plan.present.shape[0]
    widths = [dy.shape[1] for dy in dys]
    BN, BK = config["BN"], config["BK"]
    chunks = sum(triton.cdiv(width, BN) for width in widths) + column_sums
    strips = triton.cdiv(K, BK) + with_bias
    together = strips_together(strips, chunks, 2)
    takes_turns = chip_of(x.device) in TURNSTILE_CHIPS and not alone
    in_one_launch, G = n_present if takes_turns else 1, len(dys)
    xs, acts, lists, lengths, dws, dbs, rest = positions(1, G, G, G, G, G * with_bias, 6)
    places = [*filled(acts), *xs, *filled(lists), *filled(lengths), *filled(dws), *filled(dbs or dws), *rest]
    return [
        Prepared(
            row_weight_grad_kernel, (in_one_launch * chunks * strips,), places,
            K, x.stride(0), *filled(n_rows), *filled([index.shape[1] for index in indices]), *filled(widths),
            *filled([dy.stride(0) for dy in dys]), in_one_launch, first_slot, n_present, together,
            G=G, SLOTS=triton.next_power_of_2(n_present), ALONE=alone, TURNS=takes_turns,
            WITH_BIAS=with_bias, COLUMN_SUMS=column_sums,
            EVEN=K % BK == 0 and all(width % BN == 0 for width in widths),
            PRECISION="tf32" if allow_tf32 else "ieee",
            **dict(config.blocks), num_warps=config.num_warps, num_stages=config.num_stages,
        )
        for first_slot in range(0, n_present, in_one_launch)
    ]  # fmt: skip


def _check_outs(outs: Sequence[Tensor], n_rows: Sequence[int], K: int, x: Tensor) -> None:
    if len(outs) != len(n_rows):
        raise ValueError(f"outs: expected {len(n_rows)} tensors, given {len(outs)}")
    for number, (out, n) in enumerate(zip(outs, n_rows, strict=True)):
        if (
            out.dtype != torch.float32
            or tuple(out.shape) != (n, K)
            or not out.is_contiguous()
            or out.device != x.device
        ):
            raise ValueError(
                f"outs[{number}]: expected contiguous float32 {(n, K)} on {x.device}, "
                f"given {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}"
            )
