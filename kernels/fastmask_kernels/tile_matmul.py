"""`tile_matmul`: Y = X (W o M)^T and dX = dY (W o M) for masks over blocks and single weights, all languages at once.

The kernel computes the transposed result, Y^T = (W o M) X^T: the left operand of a tensor core product may lie in
registers, where it is masked (and, from a float32 weight, rounded) on its way. Two habits keep it there, read from the
compiler's output for sm_90: a tile is addressed in the orientation in which it is multiplied (no `tl.trans`), and the
32 bits of a word are told apart by a table that is loaded. With `tl.arange` in its place, or with a transposition,
Triton 3.9 masks in another layout and sends every tile through shared memory once more.

Tiles of 64 that are empty or full are taken two rows of them at a time (`pair_matmul_kernel`). A product of 64 x 256
does 51 FLOPs for each byte that it reads through the L2 cache, which is too slow to feed the tensor cores of an H200
(they want 88). Where both of two neighbouring rows own a tile, they share what is read of X, at 85 FLOPs a byte. Of
tiles that a share d of is live, d^2 of a row are such; those that only one row owns, d (1 - d) for each, are multiplied
as before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of, multiprocessors
from fastmask_kernels.configs import Config, tuned
from fastmask_kernels.launching import launch
from fastmask_kernels.plan import Plan
from fastmask_kernels.program_order import grouped
from fastmask_kernels.row_arguments import check_activation, check_parameters
from fastmask_kernels.tile_layout import TileLayout, with_contiguous_rows

__all__ = ["block_sizes", "tile_matmul"]


@triton.jit
def load_tile(pointers, inside_rows, inside_columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Load a tile; what lies outside is 0. An even side needs no check, and its argument is not read."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(pointers)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=inside_columns[None, :], other=0)
    elif EVEN_COLUMNS:
        tile = tl.load(pointers, mask=inside_rows[:, None], other=0)
    else:
        tile = tl.load(pointers, mask=inside_rows[:, None] & inside_columns[None, :], other=0)
    return tile


# Sizes in elements are specialised: at an edge, what is a multiple of 16 can still be copied 16 bytes at a time.
@triton.jit(do_not_specialize=["out_tiles", "in_tiles", "words", "token_tiles_size"])
def tile_matmul_kernel(
    x, weight, bias, y, token_rows, token_tiles, tiles, counts, bits, one_bit,
    out_size, in_size, x_stride, w_stride, out_tiles, in_tiles, words, token_tiles_size,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    EVEN_OUT: tl.constexpr, EVEN_IN: tl.constexpr, OUT_TILE: tl.constexpr, IN_TILE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: OUT_TILE output units (a row of tiles; a column, if TRANSPOSED) for BM tokens of one segment.

    Grid: token tiles x rows of tiles, in one dimension and in the order of `grouped`.
    """
    place, row = grouped(tl.program_id(0), token_tiles_size, out_tiles, GROUP)
    token_tile = token_tiles + place * 3

    segment = tl.load(token_tile)
    if segment < 0:  # a spare one
        return
    last = tl.load(token_tile + 2)
    position = tl.load(token_tile + 1) + tl.arange(0, BM)
    token_inside = position < last
    # Past the end the last token is read again: no mask in the loops, and what comes of it is not stored.
    token = tl.load(token_rows + tl.minimum(position, last - 1)).to(tl.int64)

    out = row * OUT_TILE + tl.arange(0, OUT_TILE)
    inner = tl.arange(0, BK)
    out_inside = out < out_size
    x_tile = x + token[None, :] * x_stride + inner[:, None]
    if TRANSPOSED:  # W [in, out]
        w_tile = weight + out[:, None] + inner[None, :].to(tl.int64) * w_stride
    else:  # W [out, in]
        w_tile = weight + out[:, None].to(tl.int64) * w_stride + inner[None, :]

    # A tile of the layout is IN_TILE deep and taken in steps of BK.
    STEPS: tl.constexpr = IN_TILE // BK
    list_row = segment * out_tiles + row
    tiles += list_row.to(tl.int64) * in_tiles
    full_steps = tl.load(counts + list_row * 2) * STEPS
    accumulator = tl.zeros([OUT_TILE, BM], tl.float32)
    for step in range(full_steps):
        k = tl.load(tiles + step // STEPS).to(tl.int32) * IN_TILE + step % STEPS * BK
        w_step = k.to(tl.int64) * w_stride if TRANSPOSED else k
        inside = k + inner < in_size
        xt = load_tile(x_tile + k, inside, inside, EVEN_IN, True)
        w = load_tile(w_tile + w_step, out_inside, inside, EVEN_OUT, EVEN_IN)
        accumulator = tl.dot(w.to(xt.dtype), xt, accumulator, input_precision=PRECISION)

    if HAS_PARTIAL:
        one = tl.load(one_bit + tl.arange(0, 32))
        partial_steps = tl.load(counts + list_row * 2 + 1) * STEPS
        # The full network (segment 0) has no bits, and no partial tile either.
        language = tl.maximum(segment - 1, 0).to(tl.int64)
        if TRANSPOSED:  # bits [in, out / 32]
            bits += language * in_size * words
            word = row * (OUT_TILE // 32) + tl.arange(0, OUT_TILE // 32)
        else:  # bits [out, in / 32]
            bits += language * out_size * words
            word = tl.arange(0, BK // 32)
        for step in range(full_steps, full_steps + partial_steps):
            k = tl.load(tiles + step // STEPS).to(tl.int32) * IN_TILE + step % STEPS * BK
            inside = k + inner < in_size
            xt = load_tile(x_tile + k, inside, inside, EVEN_IN, True)
            if TRANSPOSED:
                own = bits + (k + inner).to(tl.int64)[None, :] * words + word[:, None]
                owned = load_tile(own, word < words, inside, EVEN_OUT, EVEN_IN)
                flags = tl.reshape(owned[:, None, :] & one[None, :, None], (OUT_TILE, BK))
                w = load_tile(w_tile + k.to(tl.int64) * w_stride, out_inside, inside, EVEN_OUT, EVEN_IN)
            else:
                own = bits + out.to(tl.int64)[:, None] * words + (k // 32 + word)[None, :]
                owned = load_tile(own, out_inside, k // 32 + word < words, EVEN_OUT, EVEN_IN)
                flags = tl.reshape(owned[:, :, None] & one[None, None, :], (OUT_TILE, BK))
                w = load_tile(w_tile + k, out_inside, inside, EVEN_OUT, EVEN_IN)
            masked = tl.where(flags != 0, w, 0.0).to(xt.dtype)
            accumulator = tl.dot(masked, xt, accumulator, input_precision=PRECISION)

    if HAS_BIAS:
        accumulator += tl.load(bias + out, mask=out_inside, other=0).to(tl.float32)[:, None]
    result = tl.trans(accumulator.to(y.dtype.element_ty))
    y_tile = y + token[:, None] * out_size + out[None, :]
    if EVEN_OUT:
        tl.store(y_tile, result, mask=token_inside[:, None])
    else:
        tl.store(y_tile, result, mask=token_inside[:, None] & out_inside[None, :])


@triton.jit
def walk_one(
    accumulator, tiles, steps, x_tile, w_tile, w_stride, TRANSPOSED: tl.constexpr, IN_TILE: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of one row's listed tiles, `steps` of depth BK, to its accumulator."""
    STEPS: tl.constexpr = IN_TILE // BK
    for step in range(steps):
        k = tl.load(tiles + step // STEPS).to(tl.int32) * IN_TILE + step % STEPS * BK
        xt = tl.load(x_tile + k)
        w = tl.load(w_tile + (k.to(tl.int64) * w_stride if TRANSPOSED else k))
        accumulator = tl.dot(w.to(xt.dtype), xt, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def put_row(accumulator, bias, y_row, out, inside, HAS_BIAS: tl.constexpr):
    """Writes one row of tiles: accumulator [out, tokens] to y_row [tokens] + out, for the tokens `inside`."""
    if HAS_BIAS:
        accumulator += tl.load(bias + out).to(tl.float32)[:, None]
    tl.store(y_row[:, None] + out[None, :], tl.trans(accumulator.to(y_row.dtype.element_ty)), mask=inside[:, None])


@triton.jit(do_not_specialize=["out_tiles", "in_tiles", "token_tiles_size"])
def pair_matmul_kernel(
    x, weight, bias, y, token_rows, token_tiles, tiles, counts,
    x_stride, w_stride, out_size, out_tiles, in_tiles, token_tiles_size,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, OUT_TILE: tl.constexpr, IN_TILE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: two neighbouring rows of tiles (columns, if TRANSPOSED) for BM tokens of one segment.

    Grid: token tiles x pairs of rows, in one dimension and in the order of `grouped`. Tiles are full and sides whole:
    masks over blocks have no other. The last row of an odd number has no neighbour, and no list for it.
    """
    pairs = (out_tiles + 1) // 2
    place, pair = grouped(tl.program_id(0), token_tiles_size, pairs, GROUP)
    token_tile = token_tiles + place * 3
    segment = tl.load(token_tile)
    if segment < 0:  # a spare one
        return
    last = tl.load(token_tile + 2)
    position = tl.load(token_tile + 1) + tl.arange(0, BM)
    # Past the end the last token is read again: no mask in the loops, and what comes of it is not stored.
    token = tl.load(token_rows + tl.minimum(position, last - 1)).to(tl.int64)

    out = pair * 2 * OUT_TILE + tl.arange(0, OUT_TILE)
    inner = tl.arange(0, BK)
    x_tile = x + token[None, :] * x_stride + inner[:, None]
    if TRANSPOSED:  # W [in, out]
        w_tile = weight + out[:, None] + inner[None, :].to(tl.int64) * w_stride
        second_row = OUT_TILE
    else:  # W [out, in]
        w_tile = weight + out[:, None].to(tl.int64) * w_stride + inner[None, :]
        second_row = w_stride * OUT_TILE

    STEPS: tl.constexpr = IN_TILE // BK  # a tile of the layout is IN_TILE deep and taken in steps of BK
    list_row = segment * pairs + pair
    tiles += list_row.to(tl.int64) * in_tiles
    both, first = tl.load(counts + list_row * 3), tl.load(counts + list_row * 3 + 1)
    second = tl.load(counts + list_row * 3 + 2)
    upper, lower = tl.zeros([OUT_TILE, BM], tl.float32), tl.zeros([OUT_TILE, BM], tl.float32)
    for step in range(both * STEPS):
        k = tl.load(tiles + step // STEPS).to(tl.int32) * IN_TILE + step % STEPS * BK
        w_step = w_tile + (k.to(tl.int64) * w_stride if TRANSPOSED else k)
        xt = tl.load(x_tile + k)
        upper = tl.dot(tl.load(w_step).to(xt.dtype), xt, upper, input_precision=PRECISION)
        lower = tl.dot(tl.load(w_step + second_row).to(xt.dtype), xt, lower, input_precision=PRECISION)
    tiles += both
    upper = walk_one(upper, tiles, first * STEPS, x_tile, w_tile, w_stride, TRANSPOSED, IN_TILE, BK, PRECISION)
    y_row, inside = y + token * out_size, position < last
    put_row(upper, bias, y_row, out, inside, HAS_BIAS)
    if pair * 2 + 1 < out_tiles:
        tiles += first
        w_tile += second_row
        lower = walk_one(lower, tiles, second * STEPS, x_tile, w_tile, w_stride, TRANSPOSED, IN_TILE, BK, PRECISION)
        put_row(lower, bias, y_row, out + OUT_TILE, inside, HAS_BIAS)


def tile_matmul(
    x: Tensor,
    weight: Tensor,
    layout: TileLayout,
    plan: Plan,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Multiply every row of a mixed-language batch with its own language's part of one weight, in one launch.

    Where the layout's tiles are small and need no bits (`TileLayout.pairs`), `pair_matmul_kernel` does it.

    Args:
        x: [M, K] (activations) or, if transposed, [M, N] (their gradient); float16, bfloat16 or float32.
        weight: [N, K] of x's dtype, or float32 (rounded to x's dtype tile by tile).
        layout: the masks; `layout.shape` is (N, K).
        plan: which row belongs to which language; M is `plan.n_rows`.
        bias: [N], added to every row whatever its mask; not with `transposed`.
        transposed: False for Y = X (W o M)^T, True for dX = dY (W o M).
        config: block sizes BM (tokens) and BK (depth of a step, divides the tile); a choice by chip and shape if None.
        allow_tf32: for float32 x, round factors to TensorFloat-32 (10 bits) to use tensor cores.

    Returns:
        [M, N], or [M, K] if transposed; every element is written. Sums are float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    (N, K), x, weight = layout.shape, with_contiguous_rows(x), with_contiguous_rows(weight)
    check_activation("x", x, plan, N if transposed else K)
    check_parameters("weight", [weight], [(N, K)], x, strided=True)
    layout.check(plan, x.device)
    if bias is not None:
        if transposed:
            raise ValueError("expected no bias of a transposed product")
        check_parameters("bias", [bias], [(N,)], x)
    out = torch.empty(plan.n_rows, K if transposed else N, dtype=x.dtype, device=x.device)
    if plan.n_rows == 0:
        return out
    pairs, in_size, out_size = layout.pairs(transposed), x.shape[1], out.shape[1]
    (OUT_TILE, IN_TILE), (out_tiles, in_tiles) = layout.tile, layout.n_tiles
    tiles, counts = layout.row_tiles, layout.row_counts
    if transposed:
        OUT_TILE, IN_TILE, out_tiles, in_tiles = IN_TILE, OUT_TILE, in_tiles, out_tiles
        tiles, counts = layout.column_tiles, layout.column_counts
    sizes, even = [int(transposed), *layout.shape, *layout.tile], (out_size % OUT_TILE == 0, in_size % IN_TILE == 0)
    config = config or tuned("pair_matmul" if pairs else "tile_matmul", x, weight.dtype, (), sizes, plan, allow_tf32)
    if config is None:
        fits, n_pairs = layout.bits is None or all(even), pairs[0].shape[1] if pairs else None
        config = _choose(x, weight.dtype, (OUT_TILE, IN_TILE), plan, fits, n_pairs)
    BM, BK = config["BM"], config["BK"]
    if IN_TILE % BK or BK % 16 or (layout.bits is not None and not transposed and BK % 32):
        raise ValueError(f"BK = {BK} does not divide the tile's depth {IN_TILE} into steps that a product can take")
    n_token_tiles = plan.n_tiles(BM)
    operands = x, weight, bias, out, plan.token_rows, plan.tiles(BM)
    options = {
        "TRANSPOSED": transposed, "HAS_BIAS": bias is not None, "OUT_TILE": OUT_TILE, "IN_TILE": IN_TILE,
        "GROUP": _GROUP, "PRECISION": "tf32" if allow_tf32 else "ieee", **config.options,
    }  # fmt: skip
    if pairs:
        launch(
            pair_matmul_kernel, (n_token_tiles * pairs[0].shape[1],), x, *operands, *pairs,
            x.stride(0), weight.stride(0), out_size, out_tiles, in_tiles, n_token_tiles, **options,
        )  # fmt: skip
    else:
        launch(
            tile_matmul_kernel, (n_token_tiles * out_tiles,), x, *operands, tiles, counts, layout.bits, layout.one_bit,
            out_size, in_size, x.stride(0), weight.stride(0), out_tiles, in_tiles,
            0 if layout.bits is None else layout.bits.shape[2], n_token_tiles,
            HAS_PARTIAL=layout.bits is not None, EVEN_OUT=even[0], EVEN_IN=even[1], **options,
        )  # fmt: skip
    return out


# ---- block sizes

_GROUP = 8  # token tiles that go through the weight side by side


def _choose(
    x: Tensor, weight_dtype: torch.dtype, tile: tuple[int, int], plan: Plan, fits: bool, n_pairs: int | None
) -> Config:
    """Block sizes by what the host knows of a batch: how many tokens a language has at least on average."""
    if not fits:  # bits at sizes that are no multiples of a tile: elements are loaded one by one, each with an address
        return Config((("BM", 16 if x.dtype == torch.float32 else 32), ("BK", 32)), 8 if tile[0] >= 128 else 4, 2)
    bucket, tokens = 256, plan.n_rows // plan.present.shape[0]
    # So large are pairs that small weights keep a GPU busy only with less of each.
    enough = 0 if n_pairs is None else multiprocessors(x.device) / n_pairs
    while bucket > 64 and (tokens < bucket or plan.n_rows // bucket < enough):
        bucket //= 2
    return _config(chip_of(x.device), x.dtype.itemsize, weight_dtype.itemsize, tile, bucket, n_pairs is not None)


def block_sizes(
    chip: str, dtype: torch.dtype, weight_dtype: torch.dtype, tile: tuple[int, int], paired: bool
) -> list[Config]:
    """Every shipped config for a tile (out, in), for whoever measures them."""
    sizes = dtype.itemsize, weight_dtype.itemsize
    return [_config(chip, *sizes, tile, bucket, paired) for bucket in (256, 128, 64)]


def _config(chip: str, size: int, weight_size: int, tile: tuple[int, int], bucket: int, paired: bool) -> Config:
    """The table: bytes of an element of x and of W, (out, in) of a tile, and about how many tokens a language has.

    The more tokens at a time, the fewer times W is read, up to the registers of a chip: sm_90 and sm_100 take the
    right operand of a product from shared memory, on the others it lies in registers too. Of a pair two accumulators of
    64 x 256 take 128 registers of each thread of 8 warps, two of 64 x 128 those of 4.
    """
    out_tile, depth = tile
    if size == 4:  # plain float32 arithmetic
        # With 64 tokens of one tile Triton 3.6 and 3.9 spill a few registers on sm_90.
        BM = 32 if chip == "sm_90" and not paired else 64
        return Config((("BM", BM), ("BK", min(32, depth))), 8 if paired or out_tile >= 128 else 4, 2)
    # A float32 weight is rounded in registers: in steps of 64 ptxas often runs the products of sm_90 one by one.
    BK, stages = (32, 4) if weight_size == 4 else (64, 3)
    new = chip in ("sm_90", "sm_100")
    warps = 8 if (bucket >= (256 if new else 128) if paired else out_tile >= 128) else 4
    blocks = ("BM", bucket if new else min(bucket, 128)), ("BK", min(BK, depth))
    return Config(blocks, warps, stages if new else 2 if chip == "gfx942" else 3)
