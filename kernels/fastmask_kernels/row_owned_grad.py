"""dW of row masks whose units are whole blocks of rows (heads): one program owns a block of dW, and adds all languages.

No two programs write to the same place: the sum stays in float32 registers and is rounded once to where it belongs, in
the weight's dtype and orientation. Nothing is zeroed, cast or copied, nobody waits, and two runs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels import row_arguments as rows
from fastmask_kernels.configs import ROW_OWNED_GRAD
from fastmask_kernels.launching import Prepared
from fastmask_kernels.program_order import grouped, put_tile
from fastmask_kernels.row_arguments import RowProblem, filled, live_count, pick, positions, sum_over_tokens

__all__ = ["OwnedGrad", "owned"]

_ROWS = 64  # of a unit, at least and as a divisor: fewer rows of a tile would read too much for what they compute
_GROUP = 8  # blocks of rows that are walked side by side


def owned(units: Sequence[int]) -> bool:
    """Whether units of so many rows, by weight, are large enough for one program to own each block of rows."""
    return math.gcd(*units) % _ROWS == 0


@triton.jit
def place_of(index, counts, language, segment, row, N, most, width, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """Where a language's packed form holds the unit that begins at `row` and whether it does; index is ascending."""
    unit = tl.arange(0, UNITS) * UNIT
    count = live_count(counts, segment, N, width)
    first = tl.load(index + language * most + unit, mask=unit + UNIT <= tl.where(segment == 0, 0, count), other=N)
    place = tl.sum((first < row).to(tl.int32)) * UNIT
    has = tl.sum((first == row).to(tl.int32)) > 0
    return tl.where(segment == 0, row, place), tl.where(segment == 0, row + UNIT <= count, has)


# One program computes BN rows, all of one unit, and BK columns of one dW: the sum over the batch's languages that own
# the unit of the products of dY^T and X over their tokens, in steps of BM. Before them, as theirs are the longest walks
# over tokens, come programs that sum BN elements of db each (WITH_BIAS), or SUMMED columns of X over all tokens
# (COLUMN_SUMS). Grid, one-dimensional: those; then blocks of rows of all weights x strips, in the order of `grouped`.
@triton.jit(do_not_specialize=["N0", "N1", "N2", "most0", "most1", "most2", "n_present", "n_rows"])
def row_owned_grad_kernel(
    dy0, dy1, dy2, x, index0, index1, index2, counts0, counts1, counts2, dw0, dw1, dw2, db0, db1, db2, sums,
    token_rows, starts, present,
    K, x_stride, N0, N1, N2, most0, most1, most2, width0, width1, width2, dy_stride0, dy_stride1, dy_stride2,
    n_present, n_rows,
    G: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TRANSPOSED: tl.constexpr, WITH_BIAS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr,
    SUM_STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if COLUMN_SUMS:
        if program < tl.cdiv(K, SUMMED):
            column = program * SUMMED + tl.arange(0, SUMMED)
            total = sum_over_tokens(x, x_stride, column, column < K, token_rows, 0, n_rows, False, SUMMED, SUM_STEP)
            tl.store(sums + column, total.to(sums.dtype.element_ty), mask=column < K)
            return
        program -= tl.cdiv(K, SUMMED)
    n_blocks = rows.blocks_of(N0, N1, N2, G, BN)
    if WITH_BIAS:
        block, strip = grouped(program - n_blocks, n_blocks, tl.cdiv(K, BK), GROUP)
        block = tl.where(program < n_blocks, program, block)
    else:
        block, strip = grouped(program, n_blocks, tl.cdiv(K, BK), GROUP)

    g, block = rows.weight_of(block, N0, N1, G, BN)
    N = pick(g, N0, N1, N2, G)
    most = pick(g, most0, most1, most2, G)
    width = pick(g, width0, width1, width2, G)
    index = pick(g, index0, index1, index2, G)
    counts = pick(g, counts0, counts1, counts2, G)
    dy = pick(g, dy0, dy1, dy2, G)
    dy_stride = pick(g, dy_stride0, dy_stride1, dy_stride2, G)
    row = block * BN + tl.arange(0, BN)
    unit = block * BN // UNIT * UNIT
    within = block * BN - unit + tl.arange(0, BN)

    if WITH_BIAS:  # noqa: SIM102 (known when the kernel is compiled)
        if program < n_blocks:
            total = tl.zeros([BN], tl.float32)
            for entry in range(n_present):
                segment = tl.load(present + entry)
                known = tl.maximum(segment, 0)
                language = tl.maximum(segment - 1, 0).to(tl.int64)
                place, has = place_of(index, counts, language, segment, unit, N, most, width, UNIT, UNITS)
                first = tl.load(starts + known)
                last = tl.where(has & (segment >= 0), tl.load(starts + known + 1), first)
                j = place + within
                total += sum_over_tokens(dy, dy_stride, j, j < width, token_rows, first, last, True, BN, SUM_STEP)
            db = pick(g, db0, db1, db2, G)
            tl.store(db + row, total.to(db.dtype.element_ty))
            return

    k = strip * BK + tl.arange(0, BK)
    k_inside = k < K
    inner = tl.arange(0, BM)
    acc = tl.zeros([BN, BK], tl.float32)
    for entry in range(n_present):
        segment = tl.load(present + entry)  # -1 marks what is left over of the list
        known = tl.maximum(segment, 0)
        language = tl.maximum(segment - 1, 0).to(tl.int64)
        place, has = place_of(index, counts, language, segment, unit, N, most, width, UNIT, UNITS)
        first = tl.load(starts + known)
        last = tl.load(starts + known + 1)
        # A language that does not own the unit takes no steps; so no branch breaks the pipeline of loads.
        steps = tl.where(has & (segment >= 0), tl.cdiv(last - first, BM), 0)
        column = place + within
        # Rows are looked up one step ahead: looked up in the step that reads them, they would halve what is in flight.
        end = tl.maximum(last - 1, 0)
        next_token = tl.load(token_rows + tl.minimum(first + inner, end))
        for step in range(steps):
            token = next_token.to(tl.int64)
            position = first + step * BM + inner
            next_token = tl.load(token_rows + tl.minimum(position + BM, end))
            # Past the end the last token is read again; zeros in dY make it count for nothing.
            dy_tile = dy + token[None, :] * dy_stride + column[:, None]
            x_tile = x + token[:, None] * x_stride + k[None, :]
            a = tl.load(dy_tile, mask=(position < last)[None, :], other=0.0)
            b = tl.load(x_tile) if EVEN_K else tl.load(x_tile, mask=k_inside[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    dw, everything = pick(g, dw0, dw1, dw2, G), tl.full([BN], 1, tl.int1)
    if TRANSPOSED:
        far = N.to(tl.int64)
        put_tile(dw + row[:, None] + strip * BK * far, acc, everything, K - strip * BK, 0, far, False, BN, BK, 4)
    else:
        far = row.to(tl.int64)[:, None] * K
        put_tile(dw + far + strip * BK, acc, everything, K - strip * BK, 0, 1, False, BN, BK, 4)


class OwnedGrad(NamedTuple):
    """A prepared launch, None for an empty batch; called with the tensors of a `RowProblem` like its own."""

    run: Prepared | None

    @classmethod
    def of(cls, p: RowProblem) -> OwnedGrad:
        """Check the arguments, and decide all that does not depend on where the tensors lie."""
        p.check()
        if p.plan.n_rows == 0:
            return cls(None)
        K, G, unit = p.x.shape[1], len(p.dys), math.gcd(*p.units)
        # The tokens that a block sums over, on average.
        tokens = p.plan.n_rows * sum(dy.shape[1] for dy in p.dys) // sum(p.n_rows)
        outer = {"BN": list(p.n_rows), "BK": [K]}
        config = p.chosen("row_owned_grad", ROW_OWNED_GRAD, outer, max(1, tokens), unit=unit)
        BN, BK = config["BN"], config["BK"]
        if unit % BN:
            raise ValueError(f"config: expected BN to divide units of {unit} rows, given BN = {BN}")
        blocks, strips = sum(n // BN for n in p.n_rows), triton.cdiv(K, BK)
        programs = blocks * (strips + p.with_bias) + (triton.cdiv(K, rows.SUM_COLUMNS) if p.column_sums else 0)
        xs, acts, lists, lengths, dws, dbs, sums, rest = positions(1, G, G, G, G, G * p.with_bias, p.column_sums, 3)
        places = [*filled(acts), *xs, *filled(lists), *filled(lengths), *filled(dws), *filled(dbs or dws)]
        units = max(1, *[index.shape[1] // unit for index in p.indices])
        return cls(
            Prepared(
                row_owned_grad_kernel, (programs,), [*places, *(sums or xs), *rest],
                K, p.x.stride(0), *filled(p.n_rows), *filled([index.shape[1] for index in p.indices]),
                *filled([dy.shape[1] for dy in p.dys]), *filled([dy.stride(0) for dy in p.dys]),
                p.plan.present.shape[0], p.plan.n_rows,
                G=G, UNIT=unit, UNITS=triton.next_power_of_2(units), TRANSPOSED=p.transposed, WITH_BIAS=p.with_bias,
                COLUMN_SUMS=p.column_sums, EVEN_K=K % BK == 0, PRECISION="tf32" if p.allow_tf32 else "ieee",
                SUMMED=rows.SUM_COLUMNS, SUM_STEP=p.sum_step(BN),
                **config.options, GROUP=_GROUP,
            )
        )  # fmt: skip

    def __call__(self, p: RowProblem) -> tuple[list[Tensor], list[Tensor] | None]:
        """Returns dW and db (or, with column sums, those)."""
        K, dtype, device = p.x.shape[1], p.weight_dtype, p.x.device
        make = torch.zeros if self.run is None else torch.empty
        dW = [make((K, n) if p.transposed else (n, K), dtype=dtype, device=device) for n in p.n_rows]
        sizes = [K] if p.column_sums else p.n_rows if p.with_bias else []
        db = [make(n, dtype=dtype, device=device) for n in sizes] or None
        if self.run is not None:
            batch = p.plan.token_rows, p.plan.starts, p.plan.present
            self.run(p.x, *p.dys, *p.indices, *p.counts, *dW, *(db or ()), *batch)
        return dW, db
