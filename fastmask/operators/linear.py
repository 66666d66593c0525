"""`fastmask::masked_linear` and its backward: one masked layer, or several that share their input (Q, K and V).

There is one operator, over lists; a single layer is a list of one. It exists twice, with one signature: as a custom
operator for tracers, and as a plain `autograd.Function` for eager calls, which spares them the operator's Python
wrapping: in a small layer that costs more than the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.masks import UNPACKED, StoredMask
from fastmask.operators.paths import as_examples, path_for, traced

__all__ = ["Settings", "run"]

Grads = tuple[Tensor, list[Tensor], list[Tensor]]


class Settings(NamedTuple):
    """What is not a tensor of G layers over one input: the arguments of the operator behind its tensors.

    kind, n_languages: of all masks. geometries: two numbers for each, `Mask.geometry` (a unit's second number is 0).
    packed_widths: of each, or -1. activation: a name of `torch_path.activations` that is applied to the input first.
    """

    kind: str
    geometries: list[int]
    n_languages: int
    packed_widths: list[int]
    activation: str

    def masks(self, indices: Sequence[Tensor], extents: Sequence[Tensor]) -> list[StoredMask]:
        """The masks whose tensors these are."""
        sizes = zip(self.geometries[::2], self.geometries[1::2], strict=True)
        return [
            StoredMask(self.kind, (size[0],) if size[1] == 0 else size, index, extent, width)
            for size, index, extent, width in zip(sizes, indices, extents, self.packed_widths, strict=True)
        ]

    @classmethod
    def of(cls, masks: Sequence[StoredMask], n_languages: int, activation: str) -> Settings:
        """The settings of layers with these masks."""
        geometries = [n for mask in masks for n in (*mask.geometry, 0)[:2]]
        return cls(masks[0].kind, geometries, n_languages, [mask.packed_width for mask in masks], activation)


def run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    masks: list[StoredMask],
    n_languages: int,
    activation: str,
) -> Sequence[Tensor]:
    """y_g [B, ..., N_g or its packed width] of x [B, ..., K] for each of G weights; `biases` is empty or has all."""
    if traced(x, *weights):
        indices, extents = [mask.index for mask in masks], [mask.extents for mask in masks]
        settings = Settings.of(masks, n_languages, activation)
        ys: Sequence[Tensor] = torch.ops.fastmask.masked_linear(
            x, weights, biases, language_ids, indices, extents, *settings
        )
        return ys
    return _Eager.apply(masks, n_languages, activation, x, language_ids, *weights, *biases)


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    language_ids: Tensor,
    masks: list[StoredMask],
    n_languages: int,
    activation: str,
    path: ModuleType,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """Compute the layers; `kept` as in `torch_path.layers.forward`."""
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    ys: list[Tensor] = path.forward(masks, as_examples(x), weights, given, language_ids, n_languages, activation, kept)
    return ys if x.ndim == 3 else [y.view(*x.shape[:-1], y.shape[2]) for y in ys]


def _grads(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    language_ids: Tensor,
    masks: list[StoredMask],
    n_languages: int,
    activation: str,
    path: ModuleType,
    needs: tuple[bool, list[bool], list[bool]],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx, dW of each, db of each), each None unless it is needed."""
    upstreams, rest = [as_examples(dy) for dy in dys], (language_ids, n_languages, activation, *needs, kept)
    dx, dws, dbs = path.backward(masks, upstreams, as_examples(x), weights, *rest)
    return dx if dx is None or x.ndim == 3 else dx.view(x.shape), dws, dbs


# ---- eager: autograd.Function takes no lists, so the tensors come one after the other


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, masks: list[StoredMask], n_languages: int, activation: str, x: Tensor, ids: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        G = len(masks)
        weights, biases = tensors[:G], tensors[G:]
        # What the forward pass keeps is for the same path's backward pass.
        path = path_for(x, weights)
        ctx.settings, ctx.has_bias = (masks, n_languages, activation, path), bool(biases)
        kept: list[Tensor] | None = [] if ctx.needs_input_grad[3] else None
        ys = _outputs(x, weights, biases, ids, masks, n_languages, activation, path, kept)
        ctx.save_for_backward(x, ids, *weights, *(kept or ()))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        masks, n_languages, activation, path = ctx.settings
        x, ids, *tensors = ctx.saved_tensors
        G = len(masks)
        needs_x, needs = ctx.needs_input_grad[3], ctx.needs_input_grad[5:]
        needs_bias = list(needs[G:]) if ctx.has_bias else [False] * G
        wanted = (needs_x, list(needs[:G]), needs_bias)
        found = _grads(dys, x, tensors[:G], ids, masks, n_languages, activation, path, wanted, tensors[G:])
        return None, None, None, found[0], None, *found[1], *(found[2] if ctx.has_bias else [])


# ---- custom operators, which keep nothing but their inputs


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    kind: str,
    geometries: list[int],
    n_languages: int,
    packed_widths: list[int],
    activation: str,
) -> list[Tensor]:
    settings = Settings(kind, geometries, n_languages, packed_widths, activation)
    masks, path = settings.masks(indices, extents), path_for(x, weights)
    return _outputs(x, weights, biases, language_ids, masks, n_languages, activation, path)


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    kind: str,
    geometries: list[int],
    n_languages: int,
    packed_widths: list[int],
    activation: str,
    needs_x: bool,
    needs_weight: list[bool],
    needs_bias: list[bool],
) -> Grads:
    settings = Settings(kind, geometries, n_languages, packed_widths, activation)
    masks, needs = settings.masks(indices, extents), (needs_x, needs_weight, needs_bias)
    path = path_for(x, weights)
    dx, dws, dbs = _grads(dys, x, weights, language_ids, masks, n_languages, activation, path, needs)
    # An operator cannot return None: what was not asked for comes back empty.
    return (
        x.new_empty(0) if dx is None else dx,
        [w.new_empty(0) if dw is None else dw for w, dw in zip(weights, dws, strict=True)],
        [w.new_empty(0) if db is None else db for w, db in zip(weights, dbs, strict=True)],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, language_ids, indices, extents, *ctx.settings = inputs
    ctx.has_bias = bool(biases)
    ctx.save_for_backward(x, language_ids, *weights, *indices, *extents)


def _gradients(ctx: Any, dys: list[Tensor]) -> tuple[Any, ...]:
    x, language_ids, *tensors = ctx.saved_tensors
    G = len(tensors) // 3
    weights, indices, extents = list(tensors[:G]), list(tensors[G : 2 * G]), list(tensors[2 * G :])
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs_bias = needs_bias if ctx.has_bias else [False] * G
    dx, dws, dbs = torch.ops.fastmask.masked_linear_backward(
        dys, x, weights, language_ids, indices, extents, *ctx.settings, needs_x, needs_weight, needs_bias
    )
    grads = (dx if needs_x else None, _asked(dws, needs_weight), _asked(dbs, needs_bias) if ctx.has_bias else [])
    return *grads, None, [None] * G, [None] * G, *[None] * 5


def _asked(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


_forward_op = torch.library.custom_op("fastmask::masked_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastmask::masked_linear_backward", _backward, mutates_args=())
_forward_op.register_autograd(_gradients, setup_context=_setup_context)


@_forward_op.register_fake
def _(x, weights, biases, ids, indices, extents, kind, geometries, n_languages, packed_widths, activation):  # type: ignore[no-untyped-def]
    packed = [kind == "rows" and width != UNPACKED for width in packed_widths]
    widths = [p if is_packed else w.shape[0] for w, p, is_packed in zip(weights, packed_widths, packed, strict=True)]
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


@_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    dys, x, weights, ids, indices, extents, kind, geometries, n_languages, packed_widths, activation,
    needs_x, needs_weight, needs_bias,
):  # fmt: skip
    return (
        x.new_empty(x.shape if needs_x else 0),
        [w.new_empty(w.shape if need else 0) for w, need in zip(weights, needs_weight, strict=True)],
        [w.new_empty(w.shape[0] if need else 0) for w, need in zip(weights, needs_bias, strict=True)],
    )
