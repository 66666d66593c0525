"""`pair_matmul`: what `tile_matmul` computes, for tiles of 64 that are empty or full, two rows of them at a time.

A product of 64 x 256 does 51 FLOPs for each byte that it reads through the L2 cache, which is too slow to feed the
tensor cores of an H200 (they want 88). So a program takes two neighbouring rows of tiles: where both own a tile, they
share what is read of X, at 85 FLOPs a byte. Of tiles that a share d of is live, d^2 of a row are such; those that only
one row owns, d (1 - d) for each, are multiplied as before.
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
from fastmask_kernels.tile_arguments import check_product
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_pieces import grouped
from fastmask_kernels.tuning import tuned

__all__ = ["block_sizes", "pair_matmul"]


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
    x_stride, w_stride, y_stride, out_tiles, in_tiles, token_tiles_size,
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
    y_row, inside = y + token * y_stride, position < last
    put_row(upper, bias, y_row, out, inside, HAS_BIAS)
    if pair * 2 + 1 < out_tiles:
        tiles += first
        w_tile += second_row
        lower = walk_one(lower, tiles, second * STEPS, x_tile, w_tile, w_stride, TRANSPOSED, IN_TILE, BK, PRECISION)
        put_row(lower, bias, y_row, out + OUT_TILE, inside, HAS_BIAS)


def pair_matmul(
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
    """As `tile_matmul`, which calls it; for a layout that has `pairs(transposed)`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other; a layout without pairs.
        RuntimeError: bfloat16 in Triton's interpreter.
    """
    pairs = layout.pairs(transposed)
    if pairs is None:
        raise ValueError(f"expected a layout with pairs of {'columns' if transposed else 'rows'}, given {layout}")
    x, weight, out = check_product(x, weight, layout, plan, bias, transposed, out)
    if plan.n_rows == 0:
        return out
    (OUT_TILE, IN_TILE), (out_tiles, in_tiles) = layout.tile, layout.n_tiles
    if transposed:
        OUT_TILE, IN_TILE, out_tiles, in_tiles = IN_TILE, OUT_TILE, in_tiles, out_tiles
    sizes = [int(transposed), *layout.shape, *layout.tile]
    config = config or tuned("pair_matmul", x, weight.dtype, sizes, plan, allow_tf32)
    if config is None:
        config = _choose(x, weight.dtype, IN_TILE, pairs[0].shape[1], plan)
    BM, BK = config["BM"], config["BK"]
    if IN_TILE % BK or BK % 16:
        raise ValueError(f"BK = {BK} does not divide the tile's depth {IN_TILE} into steps that a product can take")
    n_token_tiles = plan.n_tiles(BM)
    launch(
        pair_matmul_kernel, (n_token_tiles * pairs[0].shape[1],), x,
        x, weight, bias, out, plan.token_rows, plan.tiles(BM), *pairs,
        x.stride(0), weight.stride(0), out.stride(0), out_tiles, in_tiles, n_token_tiles,
        TRANSPOSED=transposed, HAS_BIAS=bias is not None, OUT_TILE=OUT_TILE, IN_TILE=IN_TILE, BM=BM, BK=BK,
        GROUP=_GROUP, PRECISION="tf32" if allow_tf32 else "ieee",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


# ---- block sizes

_GROUP = 8  # token tiles that go through the weight side by side


def _choose(x: Tensor, weight_dtype: torch.dtype, depth: int, n_pairs: int, plan: Plan) -> Config:
    """Block sizes by what the host knows of a batch: how many tokens a language has at least on average."""
    tokens, bucket, enough = plan.n_rows // plan.present.shape[0], 256, multiprocessors(x.device)
    while bucket > 64 and (tokens < bucket or plan.n_rows // bucket * n_pairs < enough):
        bucket //= 2
    return _config(chip_of(x.device), x.dtype.itemsize, weight_dtype.itemsize, depth, bucket)


def block_sizes(chip: str, dtype: torch.dtype, weight_dtype: torch.dtype, depth: int) -> list[Config]:
    """Every shipped config for tiles of `depth`, for whoever measures them."""
    return [_config(chip, dtype.itemsize, weight_dtype.itemsize, depth, bucket) for bucket in (256, 128, 64)]


def _config(chip: str, size: int, weight_size: int, depth: int, bucket: int) -> Config:
    """The table: bytes of an element of x and of W, depth of a tile, and about how many tokens a language has.

    Two accumulators of 64 x 256 take 128 registers of each thread of 8 warps, two of 64 x 128 those of 4.
    """
    if size == 4:  # plain float32 arithmetic
        return Config((("BM", 64), ("BK", min(32, depth))), 8, 2)
    # As `tile_matmul`: a float32 weight is rounded in registers, in shorter steps.
    BK, stages = (32, 4) if weight_size == 4 else (64, 3)
    BK = min(BK, depth)
    if chip in ("sm_90", "sm_100"):
        return Config((("BM", bucket), ("BK", BK)), 8 if bucket == 256 else 4, stages)
    return Config((("BM", min(bucket, 128)), ("BK", BK)), 8 if bucket >= 128 else 4, 2 if chip == "gfx942" else 3)
