"""`fastmask::masked_projections` and its backward: several packed row masks over one input (Q, K, V; gate and up)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.masks import UNPACKED, StoredMask
from fastmask.operators.paths import as_examples, path_for, traced

__all__ = ["run_projections"]


def run_projections(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    units: list[int],
    n_languages: int,
    widths: list[int],
) -> Sequence[Tensor]:
    """y_g [B, ..., widths[g]] of x [B, ..., K] for each of G weights [N_g, K]; `biases` is empty if there are none."""
    settings = (units, n_languages, widths)
    ys: Sequence[Tensor]
    if traced(x, *weights):
        ys = torch.ops.fastmask.masked_projections(x, weights, biases, language_ids, indices, extents, *settings)
    else:
        ys = _Eager.apply(settings, x, language_ids, *weights, *biases, *indices, *extents)
    return ys


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    units: list[int],
    n_languages: int,
    widths: list[int],
) -> list[Tensor]:
    masks = _masks(indices, extents, units, widths)
    return _outputs(x, weights, biases, language_ids, masks, n_languages, None)


def _outputs(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    masks: list[StoredMask],
    n_languages: int,
    kept: list[Tensor] | None,
) -> list[Tensor]:
    """Compute the layers; `kept` as in `torch_path.layers.forward`."""
    given: list[Any] = biases or [None] * len(weights)
    ys: list[Tensor] = path_for(x, weights).forward(
        masks, as_examples(x), weights, given, language_ids, n_languages, kept
    )
    return ys if x.ndim == 3 else [y.view(*x.shape[:-1], y.shape[2]) for y in ys]


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    units: list[int],
    n_languages: int,
    widths: list[int],
    needs_x: bool,
    needs_weight: list[bool],
    needs_bias: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    masks = _masks(indices, extents, units, widths)
    return _grads(dys, x, weights, language_ids, masks, n_languages, (needs_x, needs_weight, needs_bias), ())


def _grads(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: list[Tensor],
    language_ids: Tensor,
    masks: list[StoredMask],
    n_languages: int,
    needs: tuple[bool, list[bool], list[bool]],
    kept: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    upstreams, backward = [as_examples(dy) for dy in dys], path_for(x, weights).backward
    dx, dws, dbs = backward(masks, upstreams, as_examples(x), weights, language_ids, n_languages, *needs, kept)
    empty = x.new_empty  # an operator cannot return None: what was not asked for comes back empty
    return (
        empty(0) if dx is None else dx.view(x.shape),
        [w.new_empty(0) if dw is None else dw for w, dw in zip(weights, dws, strict=True)],
        [w.new_empty(0) if db is None else db for w, db in zip(weights, dbs, strict=True)],
    )


def _masks(indices: list[Tensor], extents: list[Tensor], units: list[int], widths: list[int]) -> list[StoredMask]:
    return [
        StoredMask("rows", [unit], index, extent, width)
        for index, extent, unit, width in zip(indices, extents, units, widths, strict=True)
    ]


# ---- eager: autograd.Function takes no lists, so the tensors come one after the other


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x: Tensor, language_ids: Tensor, *tensors: Tensor) -> Any:
        ctx.settings = units, n_languages, widths = settings
        ctx.G = G = len(widths)
        ctx.has_bias = len(tensors) == 4 * G
        weights, biases = list(tensors[:G]), list(tensors[G : -2 * G])
        indices, extents = list(tensors[-2 * G : -G]), list(tensors[-G:])
        kept: list[Tensor] | None = [] if ctx.needs_input_grad[1] else None
        masks = _masks(indices, extents, units, widths)
        ys = _outputs(x, weights, biases, language_ids, masks, n_languages, kept)
        ctx.save_for_backward(x, language_ids, *weights, *indices, *extents, *(kept or ()))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        G, (units, n_languages, widths) = ctx.G, ctx.settings
        x, language_ids, *tensors = ctx.saved_tensors
        weights, indices, extents, kept = tensors[:G], tensors[G : 2 * G], tensors[2 * G : 3 * G], tensors[3 * G :]
        needs = ctx.needs_input_grad
        needs_weight = list(needs[3 : 3 + G])
        needs_bias = list(needs[3 + G : 3 + 2 * G]) if ctx.has_bias else [False] * G
        masks, wanted = _masks(indices, extents, units, widths), (needs[1], needs_weight, needs_bias)
        dx, dws, dbs = _grads(dys, x, weights, language_ids, masks, n_languages, wanted, kept)
        grads = [*_asked(dws, needs_weight), *(_asked(dbs, needs_bias) if ctx.has_bias else [])]
        return (None, dx if needs[1] else None, None, *grads, *[None] * (2 * G))


def _asked(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


# ---- custom operators

_forward_op = torch.library.custom_op("fastmask::masked_projections", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastmask::masked_projections_backward", _backward, mutates_args=())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, language_ids, indices, extents, *ctx.settings = inputs
    ctx.G = len(weights)
    ctx.has_bias = bool(biases)
    ctx.save_for_backward(x, language_ids, *weights, *indices, *extents)


def _gradients(ctx: Any, dys: list[Tensor]) -> tuple[Any, ...]:
    G = ctx.G
    x, language_ids, *tensors = ctx.saved_tensors
    weights, indices, extents = list(tensors[:G]), list(tensors[G : 2 * G]), list(tensors[2 * G :])
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_bias = needs_bias if ctx.has_bias else [False] * G
    wanted = (needs_x, needs_weight, needs_bias)
    dx, dws, dbs = torch.ops.fastmask.masked_projections_backward(
        dys, x, weights, language_ids, indices, extents, *ctx.settings, *wanted
    )
    grads = (dx if needs_x else None, _asked(dws, needs_weight), _asked(dbs, needs_bias) if ctx.has_bias else [])
    return (*grads, None, [None] * G, [None] * G, None, None, None)


_forward_op.register_autograd(_gradients, setup_context=_setup_context)


@_forward_op.register_fake
def _(x, weights, biases, language_ids, indices, extents, units, n_languages, widths):  # type: ignore[no-untyped-def]
    return [
        x.new_empty(*x.shape[:-1], weight.shape[0] if width == UNPACKED else width)
        for weight, width in zip(weights, widths, strict=True)
    ]


@_backward_op.register_fake
def _(dys, x, weights, language_ids, indices, extents, units, n_languages, widths, needs_x, needs_weight, needs_bias):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if needs_x else 0),
        [w.new_empty(w.shape if need else 0) for w, need in zip(weights, needs_weight, strict=True)],
        [w.new_empty(w.shape[0] if need else 0) for w, need in zip(weights, needs_bias, strict=True)],
    )
