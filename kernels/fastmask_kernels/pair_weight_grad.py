"""`pair_weight_grad`: what `tile_weight_grad` computes, for tiles of 64 that are empty or full, several at a time.

A 64 x 64 piece of dW does 32 FLOPs for each byte that it reads through the L2 cache; the tensor cores of an H200 want
88. So a program gathers up to four live tiles of a pair of neighbouring columns of tiles: of rows in which the language
owns both, 256 x 128 weights at 85 FLOPs a byte, of rows in which it owns one, 256 x 64 at 51. Tiles gathered for one
language are not neighbours, and another language gathers others: where a batch has several, their sums meet in a
float32 buffer, and they take turns (`turnstile`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of, multiprocessors
from fastmask_kernels.configs import Config
from fastmask_kernels.launching import launch
from fastmask_kernels.plan import Plan
from fastmask_kernels.sum_buffer import clear, finish, several_segments
from fastmask_kernels.tile_arguments import check_gradient
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.turnstile import TURNSTILE_CHIPS, end_turn, put_tile, strips_together, turn_order, wait_for_turn

__all__ = ["pair_weight_grad", "worth_pairing"]


@triton.jit
def programs_before(slot, present, counts, strip, n_strips, SLOTS: tl.constexpr, TILES: tl.constexpr):
    """How many programs the segments before `slot` have for this strip."""
    slots = tl.arange(0, SLOTS)
    earlier = tl.load(present + slots, mask=slots < slot, other=-1)
    listed = counts + (earlier * n_strips + strip) * 3
    total = tl.zeros([SLOTS], tl.int32)
    for kind in tl.static_range(3):
        total += tl.cdiv(tl.load(listed + kind, mask=earlier >= 0, other=0), TILES)
    return tl.sum(total)


@triton.jit
def gathered_product(
    dy, x, out, buffer, several, turn, before, token_rows, first, last, tiles, left, column,
    dy_stride, x_stride, out_stride, buffer_stride,
    ACCUMULATE: tl.constexpr, TURNS: tl.constexpr, PRECISION: tl.constexpr, TN: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums one product over the tokens from `first` to before `last` and puts it where it belongs.

    Its rows are those of the next `left` (at most BN / TN) listed tiles, its columns BK from `column` on.
    """
    i = tl.arange(0, BN)
    live = i // TN < left
    # Runs of TN neighbours; unsaid, the compiler would copy them element by element.
    n = tl.load(tiles + i // TN, mask=live, other=0).to(tl.int32) * TN + i % TN
    n = tl.max_contiguous(tl.multiple_of(n, TN), TN)
    k = column + tl.arange(0, BK)
    inner = tl.arange(0, BM)
    acc = tl.zeros([BN, BK], tl.float32)
    # Rows are looked up one step ahead: looked up in the step that reads them, they would halve what is in flight.
    next_token = tl.load(token_rows + tl.minimum(first + inner, last - 1))
    for m in range(first, last, BM):
        token = next_token.to(tl.int64)
        next_token = tl.load(token_rows + tl.minimum(m + BM + inner, last - 1))
        # Past the end the last token is read again; zeros in dY make it count for nothing.
        inside = live[:, None] & (m + inner < last)[None, :]
        dyt = tl.load(dy + token[None, :] * dy_stride + n[:, None], mask=inside, other=0)
        xs = tl.load(x + token[:, None] * x_stride + k[None, :])
        acc = tl.dot(dyt, xs, acc, input_precision=PRECISION)
    n = n.to(tl.int64)[:, None]
    if several:
        if TURNS:
            wait_for_turn(turn, before)
        put_tile(buffer + n * buffer_stride + column, acc, live, BK, 0, 1, True, BN, BK, 4)
        if TURNS:
            end_turn(turn)
    else:
        put_tile(out + n * out_stride + column, acc, live, BK, 0, 1, ACCUMULATE, BN, BK, 4)


@triton.jit(do_not_specialize=["n_tiles", "n_strips", "n_slots", "first_slot", "together"])
def pair_weight_grad_kernel(
    dy, x, out, buffer, turns, token_rows, starts, present, tiles, counts,
    dy_stride, x_stride, out_stride, buffer_stride, n_tiles, n_strips, n_slots, first_slot, together,
    SLOTS: tl.constexpr, ACCUMULATE: tl.constexpr, TURNS: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One program: what one segment adds to BN / TN tiles of one kind in a strip, a pair of columns of tiles.

    Kinds are as in `TileLayout.column_pairs`: rows that own both tiles of the pair (products BN x 2 TK), only the
    first, only the second (BN x TK). Grid: slots (the batch's segments) x chunks of all kinds x strips, in
    `turn_order`; at most so many chunks as if every tile were live, and one more for each kind but one.
    """
    TILES: tl.constexpr = BN // TN
    slot, chunk, strip = turn_order(tl.program_id(0), n_slots, tl.cdiv(n_tiles, TILES) + 2, n_strips, together)
    slot += first_slot
    segment = tl.load(present + slot)
    if segment < 0:
        return  # fewer segments have tokens than there are slots
    listed = segment * n_strips + strip
    both, left, right = tl.load(counts + listed * 3), tl.load(counts + listed * 3 + 1), tl.load(counts + listed * 3 + 2)
    left_chunk = chunk - tl.cdiv(both, TILES)
    right_chunk = left_chunk - tl.cdiv(left, TILES)
    if right_chunk >= tl.cdiv(right, TILES):
        return
    tiles += listed.to(tl.int64) * n_tiles
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    turn = turns + strip
    several = several_segments(present, SLOTS)
    before = programs_before(slot, present, counts, strip, n_strips, SLOTS, TILES) if TURNS else 0
    if left_chunk < 0:
        gathered_product(
            dy, x, out, buffer, several, turn, before, token_rows, first, last,
            tiles + chunk * TILES, both - chunk * TILES, strip * 2 * TK, dy_stride, x_stride, out_stride, buffer_stride,
            ACCUMULATE, TURNS, PRECISION, TN, BN, 2 * TK, BM,
        )  # fmt: skip
    else:
        is_left = right_chunk < 0
        done = tl.where(is_left, left_chunk, right_chunk) * TILES
        gathered_product(
            dy, x, out, buffer, several, turn, before, token_rows, first, last,
            tiles + both + tl.where(is_left, 0, left) + done, tl.where(is_left, left, right) - done,
            (strip * 2 + tl.where(is_left, 0, 1)) * TK, dy_stride, x_stride, out_stride, buffer_stride,
            ACCUMULATE, TURNS, PRECISION, TN, BN, TK, BM,
        )  # fmt: skip


def pair_weight_grad(
    dy: Tensor,
    x: Tensor,
    layout: TileLayout,
    plan: Plan,
    *,
    weight_dtype: torch.dtype,
    out: Tensor | None = None,
    accumulate: bool = False,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """As `tile_weight_grad` without scores; for a layout that has `pairs(transposed=True)`.

    A batch that may hold several segments takes a float32 buffer [N, K] beside a result that is not float32. A config
    has BM (tokens of a step) and BN (rows of a program, a multiple of the tile's).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other; a layout without pairs.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    pairs = layout.pairs(True)
    if pairs is None:
        raise ValueError(f"expected a layout with pairs of columns, given {layout}")
    dy, x, out = check_gradient(dy, x, layout, plan, weight_dtype, out, accumulate)
    target = out
    if out.stride(1) != 1:  # a program's columns lie side by side
        target = out.contiguous() if accumulate else torch.empty(out.shape, dtype=out.dtype, device=x.device)
    buffer = clear(target, plan, accumulate)
    if plan.n_rows > 0:
        config = config or _config(chip_of(x.device), x.dtype.itemsize, layout.tile[0])
        _launch(dy, x, target, buffer, layout, pairs, plan, accumulate, config, allow_tf32)
        finish(target, buffer, plan, accumulate)
    return out if target is out else out.copy_(target)


def _launch(
    dy: Tensor, x: Tensor, out: Tensor, buffer: Tensor, layout: TileLayout, pairs: tuple[Tensor, Tensor], plan: Plan,
    accumulate: bool, config: Config, allow_tf32: bool,
) -> None:  # fmt: skip
    (TN, TK), (n_tiles, _), n_strips = layout.tile, layout.n_tiles, pairs[0].shape[1]
    BN, BM = config["BN"], config["BM"]
    if BN % TN or min(BN, BM) < 16:
        raise ValueError(f"expected BN a multiple of the tile's {TN} rows and BM of at least 16, given {BN} and {BM}")
    chunks, n_slots = triton.cdiv(n_tiles, BN // TN) + 2, plan.present.shape[0]
    together = strips_together(n_strips, chunks, multiprocessors(x.device))
    turns = torch.zeros(n_strips, dtype=torch.int32, device=x.device)
    takes_turns = n_slots > 1 and chip_of(x.device) in TURNSTILE_CHIPS
    in_one_launch = n_slots if takes_turns else 1
    for first_slot in range(0, n_slots, in_one_launch):
        launch(
            pair_weight_grad_kernel, (in_one_launch * chunks * n_strips,), x,
            dy, x, out, buffer, turns, plan.token_rows, plan.starts, plan.present, *pairs,
            dy.stride(0), x.stride(0), out.stride(0), buffer.stride(0), n_tiles, n_strips,
            in_one_launch, first_slot, together,
            SLOTS=triton.next_power_of_2(n_slots), ACCUMULATE=accumulate, TURNS=takes_turns,
            PRECISION="tf32" if allow_tf32 else "ieee", TN=TN, TK=TK, BN=BN, BM=BM,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


# ---- where it pays, and block sizes

_FEW_TOKENS = 512  # of a language: with fewer, what sums that meet in memory cost is more than what reading less saves


def worth_pairing(x: Tensor, layout: TileLayout, plan: Plan) -> bool:
    """Whether `pair_weight_grad` is expected to be the faster one: by sizes, never by what the masks hold.

    Products of float32 are bound by arithmetic, small weights give every multiprocessor a program only in small pieces.
    """
    pairs, n_slots = layout.pairs(True), plan.present.shape[0]
    if pairs is None or x.dtype == torch.float32 or n_slots == 0:
        return False
    BN = _config(chip_of(x.device), x.dtype.itemsize, layout.tile[0])["BN"]
    programs = n_slots * pairs[0].shape[1] * -(-layout.shape[0] // BN)
    return programs >= multiprocessors(x.device) and (n_slots == 1 or plan.n_rows // n_slots >= _FEW_TOKENS)


def _config(chip: str, size: int, tile_rows: int) -> Config:
    """The table: bytes of an element of the activations, rows of a tile. Of a pair BN x 128 sums are in registers."""
    if size == 4:  # plain float32 arithmetic
        # On sm_100 Triton 3.6 spills a few registers in steps of 32, on the others in steps of 16.
        BN, BM, warps, stages = 64, 16 if chip == "sm_100" else 32, 8, 2
    elif chip in ("sm_90", "sm_100"):
        BN, BM, warps, stages = 256, 64, 8, 3
    else:
        BN, BM, warps, stages = 128, 64, 8, 2 if chip == "gfx942" else 3
    return Config((("BN", max(BN, tile_rows)), ("BM", BM)), warps, stages)
