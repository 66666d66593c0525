"""Products of packed activations with the live rows of a weight as they are, many languages in one launch.

The transposed counterpart of `row_matmul`: the input gradient of a row mask and, given W^T, the forward pass of a
column mask. Up to three weights that share the result (the input of Q, K and V) go in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels import row_arguments as rows
from fastmask_kernels.configs import ROW_MATMUL_T, Config, choose, kind_of, tuned
from fastmask_kernels.launching import Prepared, described, described_masks, prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.program_order import grouped
from fastmask_kernels.row_arguments import filled, live_count, pick, positions

__all__ = ["row_matmul_t"]


@triton.jit
def add_live_rows(
    acc, x, x_stride, w, index, counts, N, most, width, K, segment, token, k,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds to acc [BM, BK] the product of packed activations [BM, count] and live rows [count, BK]."""
    count = live_count(counts, segment, N, width)
    index += tl.maximum(segment - 1, 0).to(tl.int64) * most
    indexed = tl.where(segment == 0, 0, count)  # the full network reads no index: row j is row j
    whole = count // BN * BN
    n = tl.arange(0, BN)
    x_tile = x + token[:, None] * x_stride + n[None, :]
    for j in range(0, whole, BN):
        row = tl.load(index + j + n, mask=j + n < indexed, other=0).to(tl.int32)
        row = tl.where(segment == 0, j + n, row)
        w_tile = w + row.to(tl.int64)[:, None] * K + k[None, :]
        a = tl.load(x_tile)
        b = tl.load(w_tile) if EVEN_K else tl.load(w_tile, mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
        x_tile += BN
    if whole < count:
        # What lies behind the live units may be anything, NaN included: it is replaced, not multiplied by zero. Rows
        # behind the live ones are the last live one again: a dead row might hold what times zero is not zero.
        place = tl.minimum(whole + n, count - 1)
        row = tl.load(index + place, mask=place < indexed, other=0).to(tl.int32)
        row = tl.where(segment == 0, place, row)
        w_tile = w + row.to(tl.int64)[:, None] * K + k[None, :]
        a = tl.load(x_tile, mask=(whole + n < width)[None, :], other=0.0)
        a = tl.where((whole + n < count)[None, :], a, 0.0)
        b = tl.load(w_tile, mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    return acc


# One program computes y of one tile of at most BM tokens of one language and BK columns. It sums over the live rows of
# each weight in turn, in steps of BN. Grid: (token tiles) x (blocks of BK columns), ordered by `grouped`.
@triton.jit(do_not_specialize=["n_tiles", "N0", "N1", "N2", "most0", "most1", "most2"])
def row_matmul_t_kernel(
    x0, x1, x2, w0, w1, w2, index0, index1, index2, counts0, counts1, counts2, bias, y, token_rows, tiles,
    n_tiles, K, N0, N1, N2, most0, most1, most2, width0, width1, width2, x_stride0, x_stride1, x_stride2,
    G: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = grouped(tl.program_id(0), n_tiles, tl.cdiv(K, BK), GROUP)
    segment = tl.load(tiles + 3 * tile)
    if segment < 0:
        return  # a spare tile
    first = tl.load(tiles + 3 * tile + 1)
    last = tl.load(tiles + 3 * tile + 2)
    m = first + tl.arange(0, BM)
    token = tl.load(token_rows + tl.minimum(m, last - 1)).to(tl.int64)  # the last token again, never stored
    k = column * BK + tl.arange(0, BK)
    acc = tl.zeros([BM, BK], tl.float32)
    for g in range(G):  # a loop, though G is known: written out three times it takes registers of three products
        acc = add_live_rows(
            acc, pick(g, x0, x1, x2, G), pick(g, x_stride0, x_stride1, x_stride2, G), pick(g, w0, w1, w2, G),
            pick(g, index0, index1, index2, G), pick(g, counts0, counts1, counts2, G), pick(g, N0, N1, N2, G),
            pick(g, most0, most1, most2, G), pick(g, width0, width1, width2, G), K, segment, token, k,
            EVEN_K, PRECISION, BN,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    y_tile = y + token[:, None] * K + k[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=(m < last)[:, None] & (k < K)[None, :])


def row_matmul_t(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    counts: Sequence[Tensor],
    plan: Plan,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """y[m] = sum over g and j < counts_g[l] of xs_g[m, j] W_g[index_g[l, j]] (+ bias); l is the language of row m.

    Args:
        xs: one to three packed activations [M, width_g]; what lies behind a language's live units is never used.
        weights: contiguous [N_g, K] of the activations' dtype or all float32.
        indices: the live rows of each, int64 [L, most_g].
        counts: how many they are, int64 [L].
        plan: the batch; its rows of the full network take column j of xs_g to row j of the weight.
        bias: [K], or None.
        config: block sizes BM (tokens), BN (live rows in one step), BK (columns) and GROUP; None chooses.
        allow_tf32: lets float32 products use TF32 (10 bits of mantissa).

    Returns:
        y [M, K] in the activations' dtype.

    Raises:
        TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
    """
    given = () if bias is None else (bias,)
    key = (
        "row_matmul_t", described(*xs, *weights, *given), described_masks(*indices, *counts), plan.sizes, len(xs),
        len(given), config, allow_tf32,
    )  # fmt: skip
    BM, run = prepared(key, lambda: _prepare(xs, weights, indices, counts, plan, bias, config, allow_tf32))
    y = torch.empty(plan.n_rows, weights[0].shape[1], dtype=xs[0].dtype, device=xs[0].device)
    if run is not None:
        run(*xs, *weights, *indices, *counts, *given, y, plan.token_rows, plan.tiles(BM))
    return y


def _prepare(
    xs: Sequence[Tensor], weights: Sequence[Tensor], indices: Sequence[Tensor], counts: Sequence[Tensor], plan: Plan,
    bias: Tensor | None, config: Config | None, allow_tf32: bool,
) -> tuple[int, Prepared | None]:  # fmt: skip
    """Check the arguments of `row_matmul_t`; the tokens of a tile, and the launch, None for an empty batch."""
    G = len(weights)
    if not xs or len(xs) != G:
        raise ValueError(f"expected as many activations as weights, given {len(xs)} and {G}")
    for number, x in enumerate(xs):
        rows.check_activation(f"xs[{number}]", x, plan, like=xs[0])
    x, K = xs[0], weights[0].shape[-1]
    rows.check_rows(indices, counts, G, plan, x.device)
    rows.check_parameters("weights", weights, [(w.shape[0], K) for w in weights], x)
    if bias is not None:
        rows.check_parameters("bias", [bias], [(K,)], x)
    if plan.n_rows == 0:
        return 0, None
    widths = [given.shape[1] for given in xs]
    config = config or tuned("row_matmul_t", x, weights[0].dtype, widths, [K], plan, allow_tf32)
    if config is None:
        config = choose(
            ROW_MATMUL_T, x.device, kind_of(x, weights[0].dtype, allow_tf32), rows.aligned(*xs, *weights),
            {"BM": [plan.n_rows], "BK": [K]}, ("BN", sum(widths)), segments=plan.present.shape[0],
        )  # fmt: skip
    acts, ws, lists, lengths, bs, batch = positions(G, G, G, G, bias is not None, 3)
    n_tiles = plan.n_tiles(config["BM"])
    return config["BM"], Prepared(
        row_matmul_t_kernel, (n_tiles * triton.cdiv(K, config["BK"]),),
        [*filled(acts), *filled(ws), *filled(lists), *filled(lengths), *(bs or ws[:1]), *batch],
        n_tiles, K, *filled([weight.shape[0] for weight in weights]),
        *filled([index.shape[1] for index in indices]), *filled(widths),
        *filled([x.stride(0) for x in xs]),
        G=G, HAS_BIAS=bias is not None, EVEN_K=K % config["BK"] == 0, PRECISION="tf32" if allow_tf32 else "ieee",
        **config.options,
    )  # fmt: skip
