"""What each mask kind launches, forward and backward: what `torch_path.layers` computes, by `fastmask_kernels`.

Rows are gathered in the kernels. Columns are rows of the transposed weight, which is copied once for a forward and
backward pass, however many the languages. Masks that are not packed are packed on the way in or spread on the way out.
Blocks and single weights are walked in tiles.
"""

from __future__ import annotations

from itertools import compress

import torch
import torch.nn.functional as F
from fastmask_kernels.chips import has_tf32
from fastmask_kernels.packing import pack, unpack
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_arguments import aligned
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad
from torch import Tensor

from fastmask.masks import UNPACKED, Mask
from fastmask.torch_path.layers import NONE, Grads, Layers, Needs, Tensors, activate, activation_grad, full_input_grad
from fastmask.triton_path.tables import layout_of, plan_of, positions_of, size_of


def prepare(layers: Layers, x: Tensor, language_ids: Tensor) -> Plan:
    """As `torch_path.layers.prepare`."""
    return plan_of(language_ids, x.shape[1], layers.masks[0].n_languages, x.device)


def forward(
    layers: Layers, plan: Plan, x: Tensor, weights: Tensors, biases: Tensors, kept: list[Tensor] | None = None
) -> list[Tensor]:
    """As `torch_path.layers.forward`; of a column mask the transposed weight is kept, nothing of others."""
    (B, T, _), tf32, mask = x.shape, _tf32(x), layers.masks[0]
    rows = activate(_rows(x), layers.activation)
    if layers.full_forward:  # no kernel of ours is faster than the library's where nothing is left out
        given: list[Tensor | None] = [bias.to(x.dtype) for bias in biases] or [None] * len(weights)
        x = rows.view(B, T, rows.shape[1])
        return [F.linear(x, w.to(x.dtype), bias) for w, bias in zip(weights, given, strict=True)]
    biases = _biases(biases, x)
    bias = biases[0] if biases else None
    if mask.kind == "rows":
        widths, matrices = layers.widths, [weight.contiguous() for weight in weights]
        if UNPACKED in widths:
            widths = list(map(_wide, widths, layers.masks))
        indices, counts = [mask.index for mask in layers.masks], [mask.extents for mask in layers.masks]
        packed = row_matmul(rows, matrices, indices, counts, plan, widths, biases or None, allow_tf32=tf32)
        ys = packed
        if UNPACKED in layers.widths:
            ys = [_spread(y, m, w, plan) for y, m, w in zip(packed, layers.masks, layers.widths, strict=True)]
    elif mask.kind == "columns":
        transposed = _transposed(weights[0], rows)
        if kept is not None:
            kept.append(transposed)
        rows = _packed(rows, mask, layers.widths[0], plan)
        ys = [row_matmul_t([rows], [transposed], [mask.index], [mask.extents], plan, bias, allow_tf32=tf32)]
    else:
        layout = layout_of(mask)
        ys = [tile_matmul(rows, weights[0], layout, plan, bias, allow_tf32=tf32)]
    return [y.view(B, T, y.shape[1]) for y in ys]


def backward(
    layers: Layers, plan: Plan, dys: Tensors, x: Tensor, weights: Tensors, needs: Needs, kept: Tensors = ()
) -> Grads:
    """As `torch_path.layers.backward`."""
    mask, activation = layers.masks[0], layers.activation
    if layers.full_forward:
        dx = full_input_grad(dys, [weight.to(x.dtype) for weight in weights]) if needs.x else None
        dx = None if dx is None else activation_grad(dx, x, activation)
        own = layers._replace(full_forward=False)
        return dx, *backward(own, plan, dys, x, weights, needs._replace(x=False))[1:]
    before, upstreams = _rows(x), [_rows(dy) for dy in dys]
    # A packed column mask's kernel applies the activation, and its derivative, where it writes the gradient of x.
    fused = activation != NONE and needs.x and mask.kind == "columns" and layers.widths[0] != UNPACKED
    rows = before if fused else activate(before, activation)
    if mask.kind == "rows":
        dx, dws, dbs = _rows_backward(layers, upstreams, rows, weights, plan, needs)
    elif mask.kind == "columns":
        dx, dws, dbs = _columns_backward(layers, upstreams[0], rows, weights[0], kept, plan, fused, needs)
    else:
        layout, (dy,), (weight,), tf32 = layout_of(mask), upstreams, weights, _tf32(x)
        dws, dbs = [None], [None]
        dx = tile_matmul(dy, weight, layout, plan, transposed=True, allow_tf32=tf32) if needs.x else None
        if needs.weights[0]:
            dws[0] = tile_weight_grad(dy, rows, layout, plan, weight_dtype=weight.dtype, allow_tf32=tf32)
    for g, (dy, each) in enumerate(zip(upstreams, layers.masks, strict=True)):
        if needs.biases[g] and dbs[g] is None:  # of tiles, or where the bias alone is trained: no product brings it
            if each.kind == "rows":
                dy = _spread(_packed(dy, each, layers.widths[g], plan), each, UNPACKED, plan)
            dbs[g] = dy.sum(0, dtype=weights[g].dtype)
    if dx is not None and not fused:
        dx = activation_grad(dx, before, activation)
    return None if dx is None else dx.view(x.shape), dws, dbs


def _rows_backward(layers: Layers, dys: Tensors, x: Tensor, weights: Tensors, plan: Plan, needs: Needs) -> Grads:
    masks, tf32 = layers.masks, _tf32(x)
    indices, counts = [mask.index for mask in masks], [mask.extents for mask in masks]
    if UNPACKED in layers.widths:
        dys = [_packed(dy, m, w, plan) for dy, m, w in zip(dys, masks, layers.widths, strict=True)]
    dx = None
    if needs.x:
        dx = row_matmul_t(dys, [w.contiguous() for w in weights], indices, counts, plan, allow_tf32=tf32)
    dws: list[Tensor | None] = [None] * len(masks)
    dbs: list[Tensor | None] = [None] * len(masks)
    wanted = [*compress(range(len(masks)), needs.weights)]
    if wanted:
        own = [*compress(masks, needs.weights)]
        found_w, found_b = row_weight_grad(
            [*compress(dys, needs.weights)], x, [*compress(indices, needs.weights)], [*compress(counts, needs.weights)],
            plan, [mask.out_features for mask in own], weight_dtype=weights[0].dtype,
            units=[mask.geometry[0] for mask in own], with_bias=any(compress(needs.biases, needs.weights)),
            allow_tf32=tf32,
        )  # fmt: skip
        for place, g in enumerate(wanted):
            dws[g], dbs[g] = found_w[place], found_b[place] if found_b is not None and needs.biases[g] else None
    return dx, dws, dbs


def _columns_backward(
    layers: Layers, dy: Tensor, x: Tensor, weight: Tensor, kept: Tensors, plan: Plan, fused: bool, needs: Needs
) -> Grads:
    (mask,), (width,), tf32 = layers.masks, layers.widths, _tf32(x)
    K, index, counts = weight.shape[1], [mask.index], [mask.extents]
    dx = dw = db = None
    if needs.x:
        active = x.new_empty(x.shape) if fused and needs.weights[0] else None
        (dx,) = row_matmul(
            dy, [*kept] or [_transposed(weight, dy)], index, counts, plan, [_wide(width, mask)],
            activation=layers.activation if fused else NONE, before=x if fused else None, active=active,
            allow_tf32=tf32,
        )  # fmt: skip
        dx = _spread(dx, mask, width, plan)
        x = x if active is None else active
    if needs.weights[0]:
        (dw,), sums = row_weight_grad(
            [_packed(x, mask, width, plan)], dy, index, counts, plan, [K], weight_dtype=weight.dtype,
            units=[mask.geometry[0]], transposed=True, column_sums=needs.biases[0], allow_tf32=tf32,
        )  # fmt: skip
        db = None if sums is None else sums[0]
    return dx, [dw], [db]


def _biases(biases: Tensors, x: Tensor) -> Tensors:
    """As kernels read them: without gaps, of x's dtype or float32, all of one; so nearly always as they are."""
    if {bias.dtype for bias in biases} not in ({x.dtype}, {torch.float32}):
        biases = [bias.to(x.dtype) for bias in biases]
    return [bias.contiguous() for bias in biases]


def _transposed(weight: Tensor, like: Tensor) -> Tensor:
    """The weight [N, K] as [K, N] in the dtype of the activations: in one copy, which autocast would make anyway."""
    return torch.empty(weight.shape[::-1], dtype=like.dtype, device=weight.device).copy_(weight.t())


def _rows(x: Tensor) -> Tensor:
    """Activations [B, T, width] as [B * T, width]; rows may lie apart, where each begins at a multiple of 16 bytes."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    return rows if rows.is_contiguous() or (rows.stride(1) == 1 and aligned(rows)) else rows.contiguous()


def _wide(width: int, mask: Mask) -> int:
    """Of a mask that is not packed, the width that holds even the full network."""
    return size_of(mask) if width == UNPACKED else width


def _packed(x: Tensor, mask: Mask, width: int, plan: Plan) -> Tensor:
    """The masked side of an activation as kernels read it."""
    return pack(x, mask.index, mask.extents, plan, x.shape[1]) if width == UNPACKED else x


def _spread(packed: Tensor, mask: Mask, width: int, plan: Plan) -> Tensor:
    """Undo `_packed`."""
    return unpack(packed, positions_of(mask), plan) if width == UNPACKED else packed


def _tf32(x: Tensor) -> bool:
    """Whether products of x may use TF32: PyTorch's own setting for matrix products of float32.

    The one way to ask that answers whether it was made by `torch.set_float32_matmul_precision`, by `allow_tf32` or by
    `torch.backends.fp32_precision`; the others raise after some of them.
    """
    wanted = x.dtype == torch.float32 and bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return wanted and has_tf32(x.device)
