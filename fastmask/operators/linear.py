"""`fastmask::masked_linear` and `fastmask::masked_linear_backward`: one masked layer, whatever the kind of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.masks import UNPACKED, StoredMask
from fastmask.operators.paths import as_examples, path_for, traced
from fastmask.torch_path.activations import activate, activation_grad

__all__ = ["run"]


def run(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    """Compute `masked_linear`; `arguments` are those of `_forward` after x and weight."""
    y: Tensor = (torch.ops.fastmask.masked_linear if traced(x, weight) else _Eager.apply)(x, weight, *arguments)
    return y


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    language_ids: Tensor,
    index: Tensor,
    extents: Tensor,
    kind: str,
    geometry: list[int],
    n_languages: int,
    packed_width: int,
    activation: str,
) -> Tensor:
    mask = StoredMask(kind, geometry, index, extents, packed_width)
    return _output(x, weight, bias, language_ids, mask, n_languages, activation, None)


def _output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    language_ids: Tensor,
    mask: StoredMask,
    n_languages: int,
    activation: str,
    kept: list[Tensor] | None,
) -> Tensor:
    """Compute the layer; `kept` as in `torch_path.layers.forward`."""
    examples = activate(as_examples(x), activation)
    (y,) = path_for(x, [weight]).forward([mask], examples, [weight], [bias], language_ids, n_languages, kept)
    return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[2])


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    language_ids: Tensor,
    index: Tensor,
    extents: Tensor,
    kind: str,
    geometry: list[int],
    n_languages: int,
    packed_width: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    mask = StoredMask(kind, geometry, index, extents, packed_width)
    return _grads(dy, x, weight, language_ids, mask, n_languages, activation, needs, ())


def _grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    language_ids: Tensor,
    mask: StoredMask,
    n_languages: int,
    activation: str,
    needs: list[bool],
    kept: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, examples = as_examples(dy), activate(as_examples(x), activation)
    wanted = (needs[0], [needs[1]], [needs[2]], kept)
    backward = path_for(x, [weight]).backward
    dx, (dw,), (db,) = backward([mask], [upstream], examples, [weight], language_ids, n_languages, *wanted)
    # An operator cannot return None: what was not asked for comes back empty.
    return (
        x.new_empty(0) if dx is None else activation_grad(dx.view(x.shape), x, activation),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, language_ids, index, extents, *ctx.settings = inputs
        kind, geometry, n_languages, packed_width, activation = ctx.settings
        mask = StoredMask(kind, geometry, index, extents, packed_width)
        kept: list[Tensor] | None = [] if ctx.needs_input_grad[0] else None
        y = _output(x, weight, bias, language_ids, mask, n_languages, activation, kept)
        ctx.save_for_backward(x, weight, language_ids, index, extents, *(kept or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, language_ids, index, extents, *kept = ctx.saved_tensors
        kind, geometry, n_languages, packed_width, activation = ctx.settings
        mask = StoredMask(kind, geometry, index, extents, packed_width)
        needs = list(ctx.needs_input_grad[:3])
        return _asked(_grads(dy, x, weight, language_ids, mask, n_languages, activation, needs, kept), needs)


def _asked(found: tuple[Tensor, Tensor, Tensor], needs: list[bool]) -> tuple[Any, ...]:
    """A gradient, or None, for each input of the forward pass."""
    return (*(grad if needed else None for grad, needed in zip(found, needs, strict=True)), *[None] * 8)


# ---- custom operators, which keep nothing but their inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, language_ids, index, extents, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, language_ids, index, extents)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    return _asked(torch.ops.fastmask.masked_linear_backward(dy, *ctx.saved_tensors, *ctx.settings, needs), needs)


_forward_op = torch.library.custom_op("fastmask::masked_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastmask::masked_linear_backward", _backward, mutates_args=())
_forward_op.register_autograd(_gradients, setup_context=_setup_context)


@_forward_op.register_fake
def _(x, weight, bias, language_ids, index, extents, kind, geometry, n_languages, packed_width, activation):  # type: ignore[no-untyped-def]
    packed_rows = kind == "rows" and packed_width != UNPACKED
    return x.new_empty(*x.shape[:-1], packed_width if packed_rows else weight.shape[0])


@_backward_op.register_fake
def _(dy, x, weight, language_ids, index, extents, kind, geometry, n_languages, packed_width, activation, needs):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )
