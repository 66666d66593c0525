"""`tile_weight_grad`: dW = sum over languages of M_l o (dY_l^T X_l), for masks over blocks and single weights.

One program owns one tile of dW, or a piece of one, and goes through the languages of the batch whose mask holds some of
it. The sum stays in float32 registers and is written once: no dense gradient of one language ever exists, nothing is
added atomically, and two runs give the same bits.

Tiles of 64 that are empty or full may be taken several at a time (`pair_weight_grad`). A 64 x 64 piece of dW does 32
FLOPs for each byte that it reads through the L2 cache; the tensor cores of an H200 want 88. So a program gathers up to
four live tiles of a pair of neighbouring columns of tiles: of rows in which the language owns both, 256 x 128 weights
at 85 FLOPs a byte, of rows in which it owns one, 256 x 64 at 51. Tiles gathered for one language are not neighbours,
and another language gathers others: where a batch has several, their sums meet in a float32 buffer, and they take turns
(`program_order`).
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
from fastmask_kernels.program_order import (
    TURN_CHIPS,
    end_turn,
    grouped,
    put_tile,
    strips_together,
    turn_order,
    wait_for_turn,
)
from fastmask_kernels.row_arguments import check_activation, check_parameters
from fastmask_kernels.tile_layout import TileLayout, with_contiguous_rows

__all__ = ["pair_weight_grad", "tile_weight_grad", "worth_pairing"]


@triton.jit(do_not_specialize=["n_tiles", "k_tiles", "words", "n_present"])
def tile_weight_grad_kernel(
    dy, x, grad, token_rows, starts, present, state, bits,
    N, K, dy_stride, x_stride, n_tiles, k_tiles, words, n_present,
    HAS_PARTIAL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
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
    for entry in range(n_present):
        segment = tl.load(present + entry)
        known = tl.maximum(segment, 0)  # -1 marks what is left over of the list
        tile = (known.to(tl.int64) * n_tiles + row // (TN // BN)) * k_tiles + column // (TK // BK)
        tile_state = tl.load(state + tile)
        first, last = tl.load(starts + known), tl.load(starts + known + 1)
        # A tile that is empty takes no steps; so no branch breaks the pipeline of loads.
        live = (segment >= 0) & (tile_state != 0)
        steps = tl.where(live, (last - first + BM - 1) // BM, 0)
        # Where this language's part is masked it needs a sum of its own.
        part = tl.zeros([BN, BK], tl.float32) if HAS_PARTIAL else total
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
            total += tl.where(tl.reshape(flags, (BN, BK)) != 0, part, 0.0)
        else:
            total = part

    grad_tile = grad + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(grad_tile, total.to(grad.dtype.element_ty), mask=n_inside[:, None] & k_inside[None, :])


def tile_weight_grad(
    dy: Tensor,
    x: Tensor,
    layout: TileLayout,
    plan: Plan,
    *,
    weight_dtype: torch.dtype,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Sum the weight gradient of a mixed-language batch over its languages, each within its own mask, in one launch.

    Where it pays (`worth_pairing`), and no config is given, `pair_weight_grad` does it.

    Args:
        dy: [M, N]; float16, bfloat16 or float32.
        x: [M, K] of the same dtype.
        layout: the masks; `layout.shape` is (N, K).
        plan: which row belongs to which language; M is `plan.n_rows`.
        weight_dtype: dtype of the result: that of x, or float32.
        config: block sizes BM (tokens of a step), BN and BK (a program's piece of a tile); by chip and shape if None.
        allow_tf32: for float32 activations, round them to TensorFloat-32 (10 bits) to use tensor cores.

    Returns:
        dW [N, K]; outside of all masks it is 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    if config is None and worth_pairing(x, layout, plan):
        return pair_weight_grad(dy, x, layout, plan, weight_dtype=weight_dtype, allow_tf32=allow_tf32)
    dy, x, grad = _checked(dy, x, layout, plan, weight_dtype)
    if plan.n_rows == 0:
        return grad.zero_()
    (N, K), (TN, TK), (n_tiles, k_tiles) = layout.shape, layout.tile, layout.n_tiles
    if config is None:
        config = _config(chip_of(x.device), x.dtype.itemsize, layout.tile, N % TN == 0 and K % TK == 0)
    BN, BK, BM = config["BN"], config["BK"], config["BM"]
    if TN % BN or TK % BK or min(BN, BM) < 16 or BK < 32:
        raise ValueError(f"pieces of {BN} x {BK} do not divide a tile of {TN} x {TK}, or BM = {BM} is below 16")
    launch(
        tile_weight_grad_kernel, (n_tiles * (TN // BN) * k_tiles * (TK // BK),), x,
        dy, x, grad, plan.token_rows, plan.starts, plan.present, layout.state, layout.bits,
        N, K, dy.stride(0), x.stride(0), n_tiles, k_tiles,
        0 if layout.bits is None else layout.bits.shape[2], plan.present.shape[0],
        HAS_PARTIAL=layout.bits is not None, EVEN_N=N % TN == 0, EVEN_K=K % TK == 0, TN=TN, TK=TK, BN=BN, BK=BK, BM=BM,
        GROUP=_GROUP, PRECISION="tf32" if allow_tf32 else "ieee",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return grad


# ---- several tiles at a time

_BLOCK = 2048


@triton.jit
def several_segments(present, SLOTS: tl.constexpr):
    """Whether the batch has tokens of more than one segment; `present` is a plan's, of SLOTS entries or fewer."""
    several = False
    if SLOTS > 1:
        several = tl.load(present + 1) >= 0
    return several


@triton.jit
def sum_buffer_kernel(
    grad, buffer, present, size, SLOTS: tl.constexpr, FINISH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK elements. Grid: the blocks.

    Before the sums (not FINISH) it clears the buffer, or where that is not used the result; after them it rounds the
    buffer to the result. How many segments of a batch have tokens is known on the device alone: with one, the buffer is
    left alone, and the product written straight to where it belongs.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, several = at < size, several_segments(present, SLOTS)
    if FINISH:
        if several:
            tl.store(grad + at, tl.load(buffer + at, mask=inside).to(grad.dtype.element_ty), mask=inside)
    elif several:
        tl.store(buffer + at, tl.zeros([BLOCK], tl.float32), mask=inside)
    else:
        tl.store(grad + at, tl.zeros([BLOCK], grad.dtype.element_ty), mask=inside)


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
    dy, x, grad, buffer, several, turn, before, token_rows, first, last, tiles, left, column,
    dy_stride, x_stride, K, TURNS: tl.constexpr, PRECISION: tl.constexpr, TN: tl.constexpr, BN: tl.constexpr,
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
    place = n.to(tl.int64)[:, None] * K + column
    if several:
        if TURNS:
            wait_for_turn(turn, before)
        put_tile(buffer + place, acc, live, BK, 0, 1, True, BN, BK, 4)
        if TURNS:
            end_turn(turn)
    else:
        put_tile(grad + place, acc, live, BK, 0, 1, False, BN, BK, 4)


@triton.jit(do_not_specialize=["n_tiles", "n_strips", "n_slots", "first_slot", "together"])
def pair_weight_grad_kernel(
    dy, x, grad, buffer, turns, token_rows, starts, present, tiles, counts,
    dy_stride, x_stride, K, n_tiles, n_strips, n_slots, first_slot, together,
    SLOTS: tl.constexpr, TURNS: tl.constexpr, PRECISION: tl.constexpr,
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
            dy, x, grad, buffer, several, turn, before, token_rows, first, last,
            tiles + chunk * TILES, both - chunk * TILES, strip * 2 * TK, dy_stride, x_stride, K,
            TURNS, PRECISION, TN, BN, 2 * TK, BM,
        )  # fmt: skip
    else:
        is_left = right_chunk < 0
        done = tl.where(is_left, left_chunk, right_chunk) * TILES
        gathered_product(
            dy, x, grad, buffer, several, turn, before, token_rows, first, last,
            tiles + both + tl.where(is_left, 0, left) + done, tl.where(is_left, left, right) - done,
            (strip * 2 + tl.where(is_left, 0, 1)) * TK, dy_stride, x_stride, K,
            TURNS, PRECISION, TN, BN, TK, BM,
        )  # fmt: skip


def pair_weight_grad(
    dy: Tensor,
    x: Tensor,
    layout: TileLayout,
    plan: Plan,
    *,
    weight_dtype: torch.dtype,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """As `tile_weight_grad`; for a layout that has `pairs(transposed=True)`.

    A batch that may hold several segments takes a float32 buffer [N, K] beside a result that is not float32. A config
    has BM (tokens of a step) and BN (rows of a program, a multiple of the tile's).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other; a layout without pairs.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    pairs = layout.pairs(True)
    if pairs is None:
        raise ValueError(f"expected a layout with pairs of columns, given {layout}")
    dy, x, grad = _checked(dy, x, layout, plan, weight_dtype)
    (TN, TK), (n_tiles, _), n_strips, n_slots = layout.tile, layout.n_tiles, pairs[0].shape[1], plan.present.shape[0]
    if plan.n_rows == 0:
        return grad.zero_()
    config = config or _pair_config(chip_of(x.device), TN)
    BN, BM = config["BN"], config["BM"]
    if BN % TN or min(BN, BM) < 16:
        raise ValueError(f"expected BN a multiple of the tile's {TN} rows and BM of at least 16, given {BN} and {BM}")
    buffer, SLOTS = grad, triton.next_power_of_2(n_slots)
    aside = grad.dtype != torch.float32 and n_slots > 1
    if aside:
        buffer = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)

    def all_elements(finish: bool) -> None:
        launch(
            sum_buffer_kernel, (triton.cdiv(grad.numel(), _BLOCK),), grad, grad, buffer, plan.present, grad.numel(),
            SLOTS=SLOTS, FINISH=finish, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip

    if aside:
        all_elements(finish=False)
    else:
        grad.zero_()
    chunks = triton.cdiv(n_tiles, BN // TN) + 2
    together = strips_together(n_strips, chunks, multiprocessors(x.device))
    turns = torch.zeros(n_strips, dtype=torch.int32, device=x.device)
    takes_turns = n_slots > 1 and chip_of(x.device) in TURN_CHIPS
    in_one_launch = n_slots if takes_turns else 1
    for first_slot in range(0, n_slots, in_one_launch):
        launch(
            pair_weight_grad_kernel, (in_one_launch * chunks * n_strips,), x,
            dy, x, grad, buffer, turns, plan.token_rows, plan.starts, plan.present, *pairs,
            dy.stride(0), x.stride(0), layout.shape[1], n_tiles, n_strips, in_one_launch, first_slot, together,
            SLOTS=SLOTS, TURNS=takes_turns, PRECISION="tf32" if allow_tf32 else "ieee", TN=TN, TK=TK, BN=BN, BM=BM,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if aside:
        all_elements(finish=True)
    return grad


def _checked(
    dy: Tensor, x: Tensor, layout: TileLayout, plan: Plan, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands as a kernel reads them, with contiguous rows, and where it writes."""
    (N, K), dy, x = layout.shape, with_contiguous_rows(dy), with_contiguous_rows(x)
    check_activation("x", x, plan, K)
    check_activation("dy", dy, plan, N, like=x)
    grad = torch.empty(N, K, dtype=weight_dtype, device=x.device)
    check_parameters("weight gradient", [grad], [(N, K)], x)
    layout.check(plan, x.device)
    return dy, x, grad


# ---- block sizes

_GROUP = 8  # rows of tiles that are walked side by side


def _config(chip: str, size: int, tile: tuple[int, int], even: bool) -> Config:
    """The table: `size` is bytes of an element of the activations; BN and BK divide the tile, or are it.

    Partial tiles hold a second sum in registers; the entries are the largest that the compiler fits into registers on
    every chip.
    """
    if size == 4 and not even:  # elements are loaded one by one, each with an address
        BN, BK, BM, warps, stages = 32, 32, 16, 4, 2
    elif size == 4:  # plain float32 arithmetic
        BN, BK, BM, warps, stages = 64, 64, 32, 4, 2
    else:
        BN, BK, BM, warps, stages = 128, 128, 64, 8, 2 if chip == "gfx942" else 3
    BN, BK = min(BN, tile[0]), min(BK, tile[1])
    return Config((("BN", BN), ("BK", BK), ("BM", BM)), 4 if BN * BK <= 64 * 64 else warps, stages)


_FEW_TOKENS = 512  # of a language: with fewer, what sums that meet in memory cost is more than what reading less saves


def worth_pairing(x: Tensor, layout: TileLayout, plan: Plan) -> bool:
    """Whether `pair_weight_grad` is expected to be the faster one: by sizes, never by what the masks hold.

    Products of float32 are bound by arithmetic, small weights give every multiprocessor a program only in small pieces.
    """
    pairs, n_slots = layout.pairs(True), plan.present.shape[0]
    if pairs is None or x.dtype == torch.float32 or n_slots == 0:
        return False
    BN = _pair_config(chip_of(x.device), layout.tile[0])["BN"]
    programs = n_slots * pairs[0].shape[1] * -(-layout.shape[0] // BN)
    return programs >= multiprocessors(x.device) and (n_slots == 1 or plan.n_rows // n_slots >= _FEW_TOKENS)


def _pair_config(chip: str, tile_rows: int) -> Config:
    """The table, by rows of a tile: of a pair BN x 128 sums are in registers."""
    BN, stages = (256, 3) if chip in ("sm_90", "sm_100") else (128, 2 if chip == "gfx942" else 3)
    return Config((("BN", max(BN, tile_rows)), ("BM", 64)), 8, stages)
