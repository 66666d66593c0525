"""What each mask kind launches, forward and backward; the twin of `torch_path.layers`.

Rows are gathered in the kernels. Columns are rows of the transposed weight, which is copied once for a forward and
backward pass, however many the languages. Masks that are not packed are packed on the way in or spread on the way out.
Blocks and single weights are walked in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastmask_kernels.chips import has_tf32
from fastmask_kernels.packing import pack, unpack
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad
from torch import Tensor

from fastmask.masks import UNPACKED, StoredMask
from fastmask.torch_path import full
from fastmask.torch_path.activations import NONE, activate, activation_grad
from fastmask.triton_path.tables import layout_of, plan_of, positions_of

__all__ = ["backward", "forward"]


def forward(
    masks: Sequence[StoredMask],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    language_ids: Tensor,
    n_languages: int,
    activation: str = NONE,
    kept: list[Tensor] | None = None,
    full_forward: bool = False,
) -> list[Tensor]:
    """As `torch_path.layers.forward`; of a column mask the transposed weight is kept, nothing of others."""
    B, T, _ = x.shape
    plan, tf32 = plan_of(language_ids, T, n_languages, x.device), _tf32(x)
    rows = activate(_rows(x), activation)
    if full_forward:  # no kernel of ours is faster than the library's where nothing is left out
        return full.full_forward(rows.view(B, T, rows.shape[1]), [w.to(x.dtype) for w in weights], biases)
    if masks[0].kind == "rows":
        ys = _rows_forward(masks, rows, weights, biases, plan, tf32)
    elif masks[0].kind == "columns":
        transposed = _transposed(weights[0], rows)
        if kept is not None:
            kept.append(transposed)
        ys = [_columns_forward(masks[0], rows, transposed, biases[0], plan, tf32)]
    else:
        weight = weights[0]
        ys = [tile_matmul(rows, weight, layout_of(masks[0], *weight.shape), plan, _as(biases[0], x), allow_tf32=tf32)]
    return [y.view(B, T, y.shape[1]) for y in ys]


def backward(
    masks: Sequence[StoredMask],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    language_ids: Tensor,
    n_languages: int,
    activation: str,
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
    kept: Sequence[Tensor] = (),
    full_forward: bool = False,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """As `torch_path.layers.backward`."""
    if full_forward:
        dx = full.full_input_grad(dys, [weight.to(x.dtype) for weight in weights]) if needs_x else None
        dx = None if dx is None else activation_grad(dx, x, activation)
        about = (language_ids, n_languages, activation)
        return dx, *backward(masks, dys, x, weights, *about, False, needs_weight, needs_bias)[1:]
    plan, tf32 = plan_of(language_ids, x.shape[1], n_languages, x.device), _tf32(x)
    before, upstreams = _rows(x), [_rows(dy) for dy in dys]
    # A packed column mask's kernel applies the activation, and its derivative, where it writes the gradient of x.
    fused = activation != NONE and needs_x and masks[0].kind == "columns" and masks[0].packed_width != UNPACKED
    rows = before if fused else activate(before, activation)
    if masks[0].kind == "rows":
        dx, dws, dbs = _rows_backward(masks, upstreams, rows, weights, plan, tf32, needs_x, needs_weight, needs_bias)
    else:
        needs, db = (needs_x, needs_weight[0], needs_bias[0]), None
        if masks[0].kind == "columns":
            dx, dw, db = _columns_backward(
                masks[0], upstreams[0], rows, weights[0], plan, tf32, activation if fused else NONE, *needs, kept
            )
        else:
            dx, dw = _tiles_backward(masks[0], upstreams[0], rows, weights[0], plan, tf32, *needs[:2])
        if needs_bias[0] and db is None:
            db = upstreams[0].sum(0, dtype=weights[0].dtype)
        dws, dbs = [dw], [db]
    if dx is not None and not fused:
        dx = activation_grad(dx, before, activation)
    return None if dx is None else dx.view(x.shape), dws, dbs


# ---- rows


def _rows_forward(
    masks: Sequence[StoredMask],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: Plan,
    tf32: bool,
) -> list[Tensor]:
    given = [_as(bias, x) for bias in biases if bias is not None]
    ys = row_matmul(
        x,
        [weight.contiguous() for weight in weights],
        [mask.index for mask in masks],
        [mask.extents for mask in masks],
        plan,
        [_packed_width(mask, weight.shape[0]) for mask, weight in zip(masks, weights, strict=True)],
        given or None,
        allow_tf32=tf32,
    )
    return [
        _spread(y, mask, plan, y.shape[1]) if mask.packed_width == UNPACKED else y
        for y, mask in zip(ys, masks, strict=True)
    ]


def _rows_backward(
    masks: Sequence[StoredMask],
    dys: list[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    plan: Plan,
    tf32: bool,
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    indices, counts = [mask.index for mask in masks], [mask.extents for mask in masks]
    dys = [
        pack(dy, mask.index, mask.extents, plan, dy.shape[1]) if mask.packed_width == UNPACKED else dy
        for dy, mask in zip(dys, masks, strict=True)
    ]
    dx = None
    if needs_x:
        dx = row_matmul_t(dys, [w.contiguous() for w in weights], indices, counts, plan, allow_tf32=tf32)
    dws: list[Tensor | None] = [None] * len(masks)
    dbs: list[Tensor | None] = [None] * len(masks)
    wanted = [g for g in range(len(masks)) if needs_weight[g] or needs_bias[g]]
    if wanted:
        found_w, found_b = row_weight_grad(
            [dys[g] for g in wanted],
            x,
            [indices[g] for g in wanted],
            [counts[g] for g in wanted],
            plan,
            [weights[g].shape[0] for g in wanted],
            weight_dtype=weights[0].dtype,
            units=[masks[g].geometry[0] for g in wanted],
            with_bias=any(needs_bias),
            allow_tf32=tf32,
        )
        for place, g in enumerate(wanted):
            dws[g] = found_w[place] if needs_weight[g] else None
            dbs[g] = found_b[place] if found_b is not None and needs_bias[g] else None
    return dx, dws, dbs


# ---- columns


def _columns_forward(
    mask: StoredMask, x: Tensor, transposed: Tensor, bias: Tensor | None, plan: Plan, tf32: bool
) -> Tensor:
    if mask.packed_width == UNPACKED:
        x = pack(x, mask.index, mask.extents, plan, x.shape[1])
    return row_matmul_t([x], [transposed], [mask.index], [mask.extents], plan, _as(bias, x), allow_tf32=tf32)


def _columns_backward(
    mask: StoredMask,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    tf32: bool,
    activation: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    kept: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    K, unpacked = weight.shape[1], mask.packed_width == UNPACKED
    index, counts = [mask.index], [mask.extents]
    dx = dw = db = None
    if needs_x:
        width, transposed = _packed_width(mask, K), kept[0] if kept else _transposed(weight, dy)
        before, active = (x, torch.empty_like(x) if needs_weight else None) if activation != NONE else (None, None)
        (dx,) = row_matmul(
            dy, [transposed], index, counts, plan, [width], activation=activation, before=before, active=active,
            allow_tf32=tf32,
        )  # fmt: skip
        dx = _spread(dx, mask, plan, K) if unpacked else dx
        x = x if active is None else active
    if needs_weight:
        x = pack(x, mask.index, mask.extents, plan, K) if unpacked else x
        (dw,), sums = row_weight_grad(
            [x], dy, index, counts, plan, [K], weight_dtype=weight.dtype, units=[mask.geometry[0]], transposed=True,
            column_sums=needs_bias, allow_tf32=tf32,
        )  # fmt: skip
        db = None if sums is None else sums[0]
    return dx, dw, db


def _transposed(weight: Tensor, like: Tensor) -> Tensor:
    """The weight [N, K] as [K, N] in the dtype of the activations: the copy that autocast would make anyway."""
    return weight.to(like.dtype).t().contiguous()


# ---- blocks and single weights


def _tiles_backward(
    mask: StoredMask, dy: Tensor, x: Tensor, weight: Tensor, plan: Plan, tf32: bool, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    layout = layout_of(mask, *weight.shape)
    dx = dw = None
    if needs_x:
        dx = tile_matmul(dy, weight, layout, plan, transposed=True, allow_tf32=tf32)
    if needs_weight:
        dw = tile_weight_grad(dy, x, layout, plan, weight_dtype=weight.dtype, allow_tf32=tf32)
    return dx, dw


def _rows(x: Tensor) -> Tensor:
    """Activations [B, T, width] as contiguous [B * T, width], without a copy where that is possible."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    return rows if rows.is_contiguous() else rows.contiguous()


def _packed_width(mask: StoredMask, size: int) -> int:
    """Of a mask that is not packed, the width that holds even the full network."""
    return size if mask.packed_width == UNPACKED else mask.packed_width


def _spread(packed: Tensor, mask: StoredMask, plan: Plan, size: int) -> Tensor:
    return unpack(packed, mask.index, mask.extents, plan, size, table=positions_of(mask, size))


def _tf32(x: Tensor) -> bool:
    """Whether products of x may use TF32: PyTorch's own setting for matrix products of float32.

    The one way to ask that answers whether it was made by `torch.set_float32_matmul_precision`, by `allow_tf32` or by
    `torch.backends.fp32_precision`; the others raise after some of them.
    """
    wanted = x.dtype == torch.float32 and bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return wanted and has_tf32(x.device)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
