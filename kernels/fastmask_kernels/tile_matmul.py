"""`tile_matmul`: Y = X (W o M)^T and dX = dY (W o M) for masks over blocks and single weights, all languages at once.

The kernel computes the transposed result, Y^T = (W o M) X^T: the left operand of a tensor core product may lie in
registers, where it is masked (and, from a float32 weight, rounded) on its way. Two habits keep it there, read from the
compiler's output for sm_90: a tile is addressed in the orientation in which it is multiplied (no `tl.trans`), and the
32 bits of a word are told apart by a table that is loaded. With `tl.arange` in its place, or with a transposition,
Triton 3.9 masks in another layout and sends every tile through shared memory once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.chips import chip_of
from fastmask_kernels.configs import Config
from fastmask_kernels.launching import launch
from fastmask_kernels.pair_matmul import pair_matmul
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_arguments import check_product
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_pieces import grouped, load_tile
from fastmask_kernels.tuning import tuned

__all__ = ["block_sizes", "tile_matmul"]


# Sizes in elements are specialised: at an edge, what is a multiple of 16 can still be copied 16 bytes at a time.
@triton.jit(do_not_specialize=["out_tiles", "in_tiles", "words", "token_tiles_size"])
def tile_matmul_kernel(
    x, weight, bias, y, token_rows, token_tiles, tiles, counts, bits, one_bit,
    out_size, in_size, x_stride, w_stride, y_stride, out_tiles, in_tiles, words, token_tiles_size,
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
    y_tile = y + token[:, None] * y_stride + out[None, :]
    if EVEN_OUT:
        tl.store(y_tile, result, mask=token_inside[:, None])
    else:
        tl.store(y_tile, result, mask=token_inside[:, None] & out_inside[None, :])


def tile_matmul(
    x: Tensor,
    weight: Tensor,
    layout: TileLayout,
    plan: Plan,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    out: Tensor | None = None,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Multiply every row of a mixed-language batch with its own language's part of one weight, in one launch.

    Where the layout's tiles are small and need no bits (`TileLayout.pairs`), `pair_matmul` does it.

    Args:
        x: [M, K] (activations) or, if transposed, [M, N] (their gradient); float16, bfloat16 or float32.
        weight: [N, K] of x's dtype, or float32 (rounded to x's dtype tile by tile).
        layout: the masks; `layout.shape` is (N, K).
        plan: which row belongs to which language; M is `plan.n_rows`.
        bias: [N], added to every row whatever its mask; not with `transposed`.
        transposed: False for Y = X (W o M)^T, True for dX = dY (W o M).
        out: where to write, of x's dtype, rows contiguous; a new tensor if None. May not overlap x.
        config: block sizes BM (tokens) and BK (depth of a step, divides the tile); a choice by chip and shape if None.
        allow_tf32: for float32 x, round factors to TensorFloat-32 (10 bits) to use tensor cores.

    Returns:
        [M, N], or [M, K] if transposed; every element is written. Sums are float32.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    if layout.pairs(transposed) is not None:
        return pair_matmul(
            x, weight, layout, plan, bias, transposed=transposed, out=out, config=config, allow_tf32=allow_tf32
        )
    x, weight, out = check_product(x, weight, layout, plan, bias, transposed, out)
    if plan.n_rows == 0:
        return out
    in_size, out_size = x.shape[1], out.shape[1]
    (OUT_TILE, IN_TILE), (out_tiles, in_tiles) = layout.tile, layout.n_tiles
    tiles, counts = layout.row_tiles, layout.row_counts
    if transposed:
        OUT_TILE, IN_TILE, out_tiles, in_tiles = IN_TILE, OUT_TILE, in_tiles, out_tiles
        tiles, counts = layout.column_tiles, layout.column_counts
    sizes = [int(transposed), *layout.shape, *layout.tile]
    config = config or tuned("tile_matmul", x, weight.dtype, sizes, plan, allow_tf32)
    if config is None:
        even = layout.bits is None or (out_size % OUT_TILE == 0 and in_size % IN_TILE == 0)
        config = _choose(chip_of(x.device), x.dtype, weight.dtype, (OUT_TILE, IN_TILE), plan, even)
    BM, BK = config["BM"], config["BK"]
    if IN_TILE % BK or BK % 16 or (layout.bits is not None and not transposed and BK % 32):
        raise ValueError(f"BK = {BK} does not divide the tile's depth {IN_TILE} into steps that a product can take")
    n_token_tiles = plan.n_tiles(BM)
    launch(
        tile_matmul_kernel, (n_token_tiles * out_tiles,), x,
        x, weight, bias, out, plan.token_rows, plan.tiles(BM), tiles, counts, layout.bits, layout.one_bit,
        out_size, in_size, x.stride(0), weight.stride(0), out.stride(0), out_tiles, in_tiles,
        0 if layout.bits is None else layout.bits.shape[2], n_token_tiles,
        TRANSPOSED=transposed, HAS_BIAS=bias is not None, HAS_PARTIAL=layout.bits is not None,
        EVEN_OUT=out_size % OUT_TILE == 0, EVEN_IN=in_size % IN_TILE == 0, OUT_TILE=OUT_TILE, IN_TILE=IN_TILE,
        BM=BM, BK=BK, GROUP=_GROUP, PRECISION="tf32" if allow_tf32 else "ieee",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


# ---- block sizes

_GROUP = 8  # token tiles that go through the weight side by side


def _choose(
    chip: str, dtype: torch.dtype, weight_dtype: torch.dtype, tile: tuple[int, int], plan: Plan, even: bool
) -> Config:
    """Block sizes by what the host knows of a batch: how many tokens a language has at least on average."""
    if not even:
        return _edges(dtype, tile)
    tokens = plan.n_rows // plan.present.shape[0]
    bucket = 256 if tokens >= 256 else 128 if tokens >= 128 else 64
    return _config(chip, dtype.itemsize, weight_dtype.itemsize, tile, bucket)


def block_sizes(chip: str, dtype: torch.dtype, weight_dtype: torch.dtype, tile: tuple[int, int]) -> list[Config]:
    """Every shipped config for a tile (out, in), for whoever measures them."""
    return [_config(chip, dtype.itemsize, weight_dtype.itemsize, tile, bucket) for bucket in (256, 128, 64)]


def _edges(dtype: torch.dtype, tile: tuple[int, int]) -> Config:
    """For bits at sizes that are no multiples of a tile: elements are loaded one by one, each with an address."""
    BM = 16 if dtype == torch.float32 else 32
    return Config((("BM", BM), ("BK", 32)), 8 if tile[0] >= 128 else 4, 2)


def _config(chip: str, size: int, weight_size: int, tile: tuple[int, int], bucket: int) -> Config:
    """The table: bytes of an element of x and of W, (out, in) of a tile, and about how many tokens a language has.

    The more tokens at a time, the fewer times W is read, up to the registers of a chip: sm_90 and sm_100 take the
    right operand of a product from shared memory, on the others it lies in registers too.
    """
    out_tile, depth = tile
    warps = 8 if out_tile >= 128 else 4
    if size == 4:  # plain float32 arithmetic
        # With 64 tokens Triton 3.6 and 3.9 spill a few registers on sm_90.
        BM = 32 if chip == "sm_90" else 64
        return Config((("BM", BM), ("BK", min(32, depth))), warps, 2)
    # A float32 weight is rounded in registers: in steps of 64 ptxas often runs the products of sm_90 one by one.
    BK, stages = (32, 4) if weight_size == 4 else (64, 3)
    BK = min(BK, depth)
    if chip in ("sm_90", "sm_100"):
        return Config((("BM", min(bucket, 256 if out_tile <= 128 else 128)), ("BK", BK)), warps, stages)
    return Config((("BM", min(bucket, 128)), ("BK", BK)), warps, 2 if chip == "gfx942" else 3)
