"""`fastmask::masked_linear` and `fastmask::masked_linear_backward`: one masked layer, whatever the kind of its mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    examples = activate(as_examples(x), activation)
    (y,) = path_for(x, [weight]).forward([mask], examples, [weight], [bias], language_ids, n_languages)
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
    upstream, examples = as_examples(dy), activate(as_examples(x), activation)
    wanted = (needs[0], [needs[1]], [needs[2]])
    backward = path_for(x, [weight]).backward
    dx, (dw,), (db,) = backward([mask], [upstream], examples, [weight], language_ids, n_languages, *wanted)
    # An operator cannot return None: what was not asked for comes back empty.
    return (
        x.new_empty(0) if dx is None else activation_grad(dx.view(x.shape), x, activation),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, language_ids, index, extents, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, language_ids, index, extents)


def _gradients(backward: Callable[..., tuple[Tensor, Tensor, Tensor]], ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, language_ids, index, extents = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = backward(dy, x, weight, language_ids, index, extents, *ctx.settings, needs)
    grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return (*grads, None, None, None, None, None, None, None, None)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients(_backward, ctx, dy)


_forward_op = torch.library.custom_op("fastmask::masked_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastmask::masked_linear_backward", _backward, mutates_args=())
_forward_op.register_autograd(
    partial(_gradients, torch.ops.fastmask.masked_linear_backward), setup_context=_setup_context
)


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
