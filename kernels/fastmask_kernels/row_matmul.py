"""Products with the live rows of a weight, many languages in one launch.

A mask over rows is given as `index` (the live rows of each language) and `counts` (how many). Nothing is copied: a
kernel gathers the rows it needs, and activations on the masked side are packed, a language's live units in front.

`row_matmul` is the forward pass of a row mask and the input gradient of a column mask (given W^T); `row_matmul_t`, in a
file of its own, the other two. Up to three weights that share the activation on the unmasked side (Q, K and V) go in
one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels import row_arguments as rows
from fastmask_kernels.configs import ROW_MATMUL, Config, choose, kind_of, tuned
from fastmask_kernels.launching import Prepared, described, described_masks, prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.program_order import grouped
from fastmask_kernels.row_arguments import filled, live_count, pick, positions

__all__ = ["row_matmul"]

ACTIVATIONS = ("", "gelu", "relu")


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """What an activation function, GELU (by the error function) or ReLU, makes of z."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """The gradient at z for an upstream gradient."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return dy * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def put_through_activation(
    y, before, before_stride, active, acc, token_rows, first, last, j, live, width,
    ACTIVATION: tl.constexpr, ACTIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Writes acc [BN, BM] as the gradient of `before`, in PIECES of its tokens: registers hold no second tile."""
    if PIECES > 1:
        halves = tl.permute(tl.reshape(acc, (BN, 2, BM // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        put_through_activation(
            y, before, before_stride, active, left, token_rows, first, last, j, live, width,
            ACTIVATION, ACTIVE, BM // 2, BN, PIECES // 2,
        )  # fmt: skip
        put_through_activation(
            y, before, before_stride, active, right, token_rows, first + BM // 2, last, j, live, width,
            ACTIVATION, ACTIVE, BM // 2, BN, PIECES // 2,
        )  # fmt: skip
    else:
        m = first + tl.arange(0, BM)
        token = tl.load(token_rows + tl.minimum(m, last - 1)).to(tl.int64)
        stored = (m < last)[None, :] & (j < width)[:, None]
        place = token[None, :] * before_stride + j[:, None]
        z = tl.load(before + place, mask=stored & live[:, None], other=0.0).to(tl.float32)
        result = through_activation(acc, z, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + token[None, :] * width + j[:, None], tl.where(live[:, None], result, 0.0), mask=stored)
        if ACTIVE:
            there = active + token[None, :] * width + j[:, None]
            tl.store(there, activated(z, ACTIVATION).to(active.dtype.element_ty), mask=stored)  # 0 is mapped to 0


# One program computes y_g of one tile of at most BM tokens of one language and BN packed rows. It sums over K in steps
# of BK. With an activation, y is the gradient of an activation function's output, and is turned into that of its input
# `before`; the output itself is computed again beside it, each element once. Grid: (token tiles) x (blocks of BN packed
# rows of all weights), one-dimensional, ordered by `grouped`.
@triton.jit(do_not_specialize=["n_tiles", "N0", "N1", "N2", "most0", "most1", "most2"])
def row_matmul_kernel(
    x, w0, w1, w2, index0, index1, index2, counts0, counts1, counts2, b0, b1, b2, y0, y1, y2,
    before, active, token_rows, tiles,
    n_tiles, K, x_stride, N0, N1, N2, most0, most1, most2, width0, width1, width2,
    before_stride, G: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, ACTIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    n_columns = rows.blocks_of(width0, width1, width2, G, BN)
    tile, column = grouped(tl.program_id(0), n_tiles, n_columns, GROUP)
    segment = tl.load(tiles + 3 * tile)
    if segment < 0:
        return  # a spare tile
    first = tl.load(tiles + 3 * tile + 1)
    last = tl.load(tiles + 3 * tile + 2)

    g, column = rows.weight_of(column, width0, width1, G, BN)
    w = pick(g, w0, w1, w2, G)
    index = pick(g, index0, index1, index2, G)
    y = pick(g, y0, y1, y2, G)
    width = pick(g, width0, width1, width2, G)
    count = live_count(pick(g, counts0, counts1, counts2, G), segment, pick(g, N0, N1, N2, G), width)

    m = first + tl.arange(0, BM)
    token = tl.load(token_rows + tl.minimum(m, last - 1)).to(tl.int64)  # the last token again, never stored
    j = column * BN + tl.arange(0, BN)
    y_tile = y + token[None, :] * width + j[:, None]
    stored = (m < last)[None, :] & (j < width)[:, None]
    if ACTIVE:
        active_tile = active + token[None, :] * width + j[:, None]
    if column * BN >= count:
        tl.store(y_tile, tl.zeros([BN, BM], y.dtype.element_ty), mask=stored)
        if ACTIVE:
            tl.store(active_tile, tl.zeros([BN, BM], active.dtype.element_ty), mask=stored)
        return

    # A row behind the live ones is row 0 of the weight: it is there to be read, and its product is not used.
    live = j < count
    row = rows.live_rows(index, pick(g, most0, most1, most2, G), segment, count, j)

    # The weight is the left operand: where it is float32 it is cast in registers, and only a left operand may come
    # from there (wgmma).
    k = tl.arange(0, BK)
    w_tile = w + row[:, None] * K + k[None, :]
    x_tile = x + token[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            a = tl.load(w_tile)
            b = tl.load(x_tile)
        else:
            rest = K - step * BK
            a = tl.load(w_tile, mask=(k < rest)[None, :], other=0.0)
            b = tl.load(x_tile, mask=(k < rest)[:, None], other=0.0)
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
        w_tile += BK
        x_tile += BK

    if HAS_BIAS:
        acc += tl.load(pick(g, b0, b1, b2, G) + row).to(tl.float32)[:, None]
    else:
        acc += 0.0  # without an addition after the loop, ptxas (sm_90) runs the products in it one by one
    if ACTIVATION == "":
        result = acc.to(y.dtype.element_ty)
        tl.store(y_tile, tl.where(live[:, None], result, 0.0), mask=stored)
    else:
        put_through_activation(
            y, before, before_stride, active, acc, token_rows, first, last, j, live, width,
            ACTIVATION, ACTIVE, BM, BN, BM // (16 if EVEN_K else 8),
        )  # fmt: skip


def row_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    counts: Sequence[Tensor],
    plan: Plan,
    widths: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str = "",
    before: Tensor | None = None,
    active: Tensor | None = None,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> list[Tensor]:
    """y_g[m, j] = x[m] . W_g[index_g[l, j]] (+ bias) for j < counts_g[l], exactly 0 behind; l is the language of row m.

    With an activation f the result is multiplied by f' at `before`: where x is the gradient of what a column mask's
    layer made of f(before), it becomes the gradient of `before`, in one launch.

    Args:
        x: [M, K], float16, bfloat16 or float32.
        weights: one to three contiguous [N_g, K] of x's dtype or all float32.
        indices: the live rows of each, int64 [L, most_g].
        counts: how many they are, int64 [L].
        plan: the batch; its rows of the full network take row j of the weight as column j.
        widths: of each output; at least the counts of every language present, and N_g with the full network. Multiples
            of 16 or the copies are slow.
        biases: [N_g] of each weight, or None.
        activation: "gelu" (by the error function), "relu" or "" for none; with one weight only.
        before: [M, width_0] of x's dtype, the activation's input; what lies behind the live units is never used.
        active: where to write f(before), exactly 0 behind the live units; contiguous and of x's dtype. None: not
            wanted.
        config: block sizes BM (tokens), BN (packed rows), BK and GROUP; None chooses.
        allow_tf32: lets float32 products use TF32 (10 bits of mantissa).

    Returns:
        The outputs, [M, width_g] in x's dtype.

    Raises:
        TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
    """
    more = [tensor for tensor in (before, active) if tensor is not None]
    key = (
        "row_matmul", described(x, *weights, *(biases or ()), *more), described_masks(*indices, *counts), plan.sizes,
        tuple(widths), biases is None, before is None, active is None, activation, config, allow_tf32,
    )  # fmt: skip
    BM, run = prepared(
        key,
        lambda: _prepare(
            x, weights, indices, counts, plan, widths, biases, activation, before, active, config, allow_tf32
        ),
    )
    ys = [torch.empty(plan.n_rows, width, dtype=x.dtype, device=x.device) for width in widths]
    if run is not None:
        run(x, *weights, *indices, *counts, *(biases or ()), *ys, *more, plan.token_rows, plan.tiles(BM))
    return ys


def _prepare(
    x: Tensor, weights: Sequence[Tensor], indices: Sequence[Tensor], counts: Sequence[Tensor], plan: Plan,
    widths: Sequence[int], biases: Sequence[Tensor] | None, activation: str, before: Tensor | None,
    active: Tensor | None, config: Config | None, allow_tf32: bool,
) -> tuple[int, Prepared | None]:  # fmt: skip
    """Check the arguments of `row_matmul`; the tokens of a tile, and the launch, None for an empty batch."""
    rows.check_activation("x", x, plan)
    K, G = x.shape[1], len(weights)
    rows.check_rows(indices, counts, G, plan, x.device)
    rows.check_parameters("weights", weights, [(w.shape[0], K) for w in weights], x)
    if len(widths) != G or min(widths) < 1:
        raise ValueError(f"widths: expected {G} positive integers, given {list(widths)}")
    if biases is not None:
        rows.check_parameters("biases", biases, [(w.shape[0],) for w in weights], x)
    _check_activation_function(activation, before, active, list(widths), x, plan)
    if plan.n_rows == 0:
        return 0, None
    config = config or tuned("row_matmul", x, weights[0].dtype, widths, [K], plan, allow_tf32)
    if config is None:
        even = all(width % 16 == 0 for width in widths)
        fits = rows.aligned(x, *weights) and (before is None or (even and rows.aligned(before)))
        config = choose(
            ROW_MATMUL, x.device, kind_of(x, weights[0].dtype, allow_tf32), fits,
            {"BM": [plan.n_rows], "BN": list(widths)}, ("BK", K), segments=plan.present.shape[0],
            usable=lambda config: even or config["BM"] <= 128,  # elements are stored one by one, each with an address
        )  # fmt: skip
    xs, ws, lists, sizes, bs, ys, befores, actives, batch = positions(
        1, G, G, G, 0 if biases is None else G, G, before is not None, active is not None, 2
    )
    places = [*xs, *filled(ws), *filled(lists), *filled(sizes), *filled(bs or ws), *filled(ys)]
    n_tiles = plan.n_tiles(config["BM"])
    columns = sum(triton.cdiv(width, config["BN"]) for width in widths)
    return config["BM"], Prepared(
        row_matmul_kernel, (n_tiles * columns,), [*places, *(befores or xs), *(actives or xs), *batch],
        n_tiles, K, x.stride(0), *filled([weight.shape[0] for weight in weights]),
        *filled([index.shape[1] for index in indices]), *filled(widths),
        0 if before is None else before.stride(0),
        G=G, HAS_BIAS=biases is not None, EVEN_K=K % config["BK"] == 0, PRECISION="tf32" if allow_tf32 else "ieee",
        ACTIVATION=activation, ACTIVE=active is not None,
        **config.options,
    )  # fmt: skip


def _check_activation_function(
    name: str, before: Tensor | None, active: Tensor | None, widths: list[int], x: Tensor, plan: Plan
) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, given {name!r}")
    if not name and (before is not None or active is not None):
        raise ValueError("before and active are an activation's input and output: expected an activation")
    if name and (len(widths) != 1 or before is None):
        raise ValueError(f"activation {name!r}: expected one weight and `before`, given {len(widths)} and {before}")
    for what, tensor in (("before", before), ("active", active)):
        if tensor is not None:
            rows.check_activation(what, tensor, plan, widths[0], like=x)
    if active is not None and not active.is_contiguous():
        raise ValueError(f"active: expected contiguous rows, given strides {active.stride()}")
