"""`tile_weight_grad`: dW = sum over languages of M_l o (dY_l^T X_l), for masks over blocks and single weights.

One program owns one tile of dW, or a piece of one, and goes through the languages of the batch whose mask holds some of
it. The sum stays in float32 registers and is written once: no dense gradient of one language ever exists, nothing is
added atomically, and two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of
from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import check_runnable
from fastmask_kernels.launching import launch
from fastmask_kernels.pair_weight_grad import pair_weight_grad, worth_pairing
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_arguments import check_gradient, check_operands, with_contiguous_rows
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_pieces import grouped

__all__ = ["tile_weight_grad"]


@triton.jit(do_not_specialize=["n_tiles", "k_tiles", "words", "n_present"])
def tile_weight_grad_kernel(
    dy, x, grad, weight, scores, token_rows, starts, present, state, bits,
    N, K, dy_stride, x_stride, grad_row_stride, grad_column_stride, w_stride, n_tiles, k_tiles, words, n_present,
    HAS_PARTIAL: tl.constexpr, ACCUMULATE: tl.constexpr, SCORES: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a piece (BN, BK) of dW within one tile (TN, TK), all languages of the batch, BM tokens in a step.

    Grid: the pieces of all tiles, in one dimension and in the order of `grouped`.
    """
    rows, columns = n_tiles * (TN // BN), k_tiles * (TK // BK)
    row, column = grouped(tl.program_id(0), rows, columns, GROUP)
    n = row * BN + tl.arange(0, BN)
    k = column * BK + tl.arange(0, BK)
    n_inside, k_inside = n < N, k < K
    inner = tl.arange(0, BM)

    total = tl.zeros([BN, BK], tl.float32)
    total_steps = 0
    for entry in range(n_present):
        segment = tl.load(present + entry)
        known = tl.maximum(segment, 0)  # -1 marks what is left over of the list
        tile_state = tl.load(state + (known * n_tiles + row // (TN // BN)) * k_tiles + column // (TK // BK))
        first, last = tl.load(starts + known), tl.load(starts + known + 1)
        # A tile that is empty takes no steps; so no branch breaks the pipeline of loads.
        live = (segment >= 0) & (tile_state != 0)
        steps = tl.where(live, (last - first + BM - 1) // BM, 0)
        total_steps += steps
        # Where this language's part is masked or scored it needs a sum of its own.
        part = tl.zeros([BN, BK], tl.float32) if HAS_PARTIAL or SCORES else total
        # Rows are looked up one step ahead: looked up in the step that reads them, they would halve what is in flight.
        end = tl.maximum(last - 1, 0)
        next_token = tl.load(token_rows + tl.minimum(first + inner, end))
        for step in range(steps):
            token = next_token.to(tl.int64)
            position = first + step * BM + inner
            next_token = tl.load(token_rows + tl.minimum(position + BM, end))
            # Past the end the last token is read again; zeros in dY make it count for nothing.
            token_inside = position < last
            dy_tile = dy + token[None, :] * dy_stride + n[:, None]
            x_tile = x + token[:, None] * x_stride + k[None, :]
            if EVEN_N:
                dyt = tl.load(dy_tile, mask=token_inside[None, :], other=0)
            else:
                dyt = tl.load(dy_tile, mask=token_inside[None, :] & n_inside[:, None], other=0)
            xs = tl.load(x_tile) if EVEN_K else tl.load(x_tile, mask=k_inside[None, :], other=0)
            part = tl.dot(dyt, xs, part, input_precision=PRECISION)
        if HAS_PARTIAL:
            language = tl.maximum(segment - 1, 0).to(tl.int64)
            word = column * (BK // 32) + tl.arange(0, BK // 32)
            own = bits + (language * N + n)[:, None] * words + word[None, :]
            # Only a partial tile (1) reads bits; those of a full one are all set.
            readable = tl.where(tile_state == 1, words, 0)
            owned = tl.load(own, mask=n_inside[:, None] & (word < readable)[None, :], other=-1)
            flags = (owned[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            part = tl.where(tl.reshape(flags, (BN, BK)) != 0, part, 0.0)
        if SCORES:
            w_tile = weight + n.to(tl.int64)[:, None] * w_stride + k[None, :]
            w = tl.load(w_tile, mask=n_inside[:, None] & k_inside[None, :], other=0).to(tl.float32)
            tl.store(scores + (known * rows + row) * columns + column, tl.sum(part * w), mask=live)
        if HAS_PARTIAL or SCORES:
            total += part
        else:
            total = part

    grad_tile = grad + n.to(tl.int64)[:, None] * grad_row_stride + k.to(tl.int64)[None, :] * grad_column_stride
    inside = n_inside[:, None] & k_inside[None, :]
    if ACCUMULATE:  # nothing to add: touch nothing
        inside = (n < tl.where(total_steps > 0, N, 0))[:, None] & k_inside[None, :]
        total += tl.load(grad_tile, mask=inside, other=0).to(tl.float32)
    tl.store(grad_tile, total.to(grad.dtype.element_ty), mask=inside)


def tile_weight_grad(
    dy: Tensor,
    x: Tensor,
    layout: TileLayout,
    plan: Plan,
    *,
    weight_dtype: torch.dtype,
    out: Tensor | None = None,
    accumulate: bool = False,
    weight: Tensor | None = None,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum the weight gradient of a mixed-language batch over its languages, each within its own mask, in one launch.

    Where it pays (`worth_pairing`), and neither scores nor a config are asked for, `pair_weight_grad` does it.

    Args:
        dy: [M, N]; float16, bfloat16 or float32.
        x: [M, K] of the same dtype.
        layout: the masks; `layout.shape` is (N, K).
        plan: which row belongs to which language; M is `plan.n_rows`.
        weight_dtype: dtype of the result: that of x, or float32.
        out: [N, K] of `weight_dtype`, any strides: where to write; a new tensor if None.
        accumulate: add to `out` rather than overwrite it; what no language of the batch owns is not touched.
        weight: [N, K]; give it to get scores too.
        config: block sizes BM (tokens of a step), BN and BK (a program's piece of a tile); by chip and shape if None.
        allow_tf32: for float32 activations, round them to TensorFloat-32 (10 bits) to use tensor cores.

    Returns:
        dW [N, K]; outside of all masks it is 0. With `weight` also scores, float32 [L + 1, NT, KT]: for each segment (0
        is the full network) and tile the sum of dW_l o W; 0 where the segment has no tokens or the tile is empty.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    if weight is None and config is None and worth_pairing(x, layout, plan):
        return pair_weight_grad(
            dy, x, layout, plan, weight_dtype=weight_dtype, out=out, accumulate=accumulate, allow_tf32=allow_tf32
        )
    dy, x, out = check_gradient(dy, x, layout, plan, weight_dtype, out, accumulate)
    if weight is not None:
        check_operands(x, weight, layout, plan)
        check_runnable(weight)
        weight = with_contiguous_rows(weight)
    if plan.n_rows == 0:
        if not accumulate:
            out.zero_()
        return out if weight is None else (out, torch.zeros(layout.state.shape, device=x.device))
    (N, K), (TN, TK), (n_tiles, k_tiles) = layout.shape, layout.tile, layout.n_tiles
    if config is None:
        even = N % TN == 0 and K % TK == 0
        config = _config(chip_of(x.device), x.dtype.itemsize, layout.tile, weight is not None, even)
    BN, BK, BM = config["BN"], config["BK"], config["BM"]
    if TN % BN or TK % BK or min(BN, BM) < 16 or BK < 32:
        raise ValueError(f"pieces of {BN} x {BK} do not divide a tile of {TN} x {TK}, or BM = {BM} is below 16")
    parts = (TN // BN, TK // BK)
    scores = None
    if weight is not None:  # zeros: a program writes only where it finds tokens
        scores = torch.zeros(
            layout.n_languages + 1, n_tiles * parts[0], k_tiles * parts[1], dtype=torch.float32, device=x.device
        )
    launch(
        tile_weight_grad_kernel, (n_tiles * parts[0] * k_tiles * parts[1],), x,
        dy, x, out, weight, scores, plan.token_rows, plan.starts, plan.present, layout.state, layout.bits,
        N, K, dy.stride(0), x.stride(0), out.stride(0), out.stride(1), 0 if weight is None else weight.stride(0),
        n_tiles, k_tiles, 0 if layout.bits is None else layout.bits.shape[2], plan.present.shape[0],
        HAS_PARTIAL=layout.bits is not None, ACCUMULATE=accumulate, SCORES=weight is not None,
        EVEN_N=N % TN == 0, EVEN_K=K % TK == 0, TN=TN, TK=TK, BN=BN, BK=BK, BM=BM, GROUP=_GROUP,
        PRECISION="tf32" if allow_tf32 else "ieee", num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if scores is None:
        return out
    return out, scores if parts == (1, 1) else scores.unflatten(2, (k_tiles, -1)).unflatten(1, (n_tiles, -1)).sum(
        (2, 4)
    )


# ---- block sizes

_GROUP = 8  # rows of tiles that are walked side by side


def _config(chip: str, size: int, tile: tuple[int, int], scores: bool, even: bool) -> Config:
    """The table: `size` is bytes of an element of the activations; BN and BK divide the tile, or are it.

    Partial tiles and scores hold a second sum in registers, scores the weight too; the entries are the largest that the
    compiler fits into registers on every chip.
    """
    if size == 4 and not even:  # elements are loaded one by one, each with an address
        BN, BK, BM, warps, stages = 32, 32, 16, 4, 2
    elif size == 4:  # plain float32 arithmetic
        BN, BK, BM, warps, stages = 64, 64, 16 if scores and chip == "sm_80" else 32, 4, 2
    else:
        BN, BK, BM, warps, stages = 64 if scores else 128, 128, 64, 8, 2 if chip == "gfx942" else 3
    BN, BK = min(BN, tile[0]), min(BK, tile[1])
    if BN * BK <= 64 * 64 and not scores:
        warps = 4
    return Config((("BN", BN), ("BK", BK), ("BM", BM)), warps, stages)
