"""The operators under `masked_linear`: two for every mask kind, so that autograd and `torch.compile` see one thing,
`fastmask::masked_linear` and `fastmask::masked_linear_backward`.

Eager calls run the same two functions as a plain `autograd.Function`, without the operators' Python wrapping, which in
a small layer costs more than the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask.torch_path import batched, segments
from fastmask.torch_path.activations import activate, activation_grad
from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.units import Columns, Rows
from fastmask.torch_path.weights import Weights

__all__ = ["UNPACKED", "run"]

UNPACKED = -1


def run(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    """Compute `masked_linear`; `arguments` are those of `_forward` after x and weight."""
    traced = torch.compiler.is_compiling() or type(x) not in _PLAIN or type(weight) not in _PLAIN
    y: Tensor = (torch.ops.fastmask.masked_linear if traced else _Eager.apply)(x, weight, *arguments)
    return y


_PLAIN = (Tensor, nn.Parameter)  # not the stand-ins that a tracer passes


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
    pieces = _pieces(index, extents, kind, geometry, weight, packed_width)
    ids = _host_ids(language_ids, n_languages)
    _check_packed(pieces, kind, ids, packed_width)
    examples = activate(_examples(x), activation)
    if batched.suits(pieces, examples.shape[1], ids):
        y = batched.Batched(pieces, weight, ids).forward(examples, bias)
    else:
        y = segments.forward(pieces, examples, weight, bias, ids)
    return y.view(*x.shape[:-1], pieces.out_width)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    language_ids: Tensor,
    index: Tensor,
    extents: Tensor,
    kind: str,
    geometry: list[int],
    packed_width: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    pieces = _pieces(index, extents, kind, geometry, weight, packed_width)
    ids: list[int] = language_ids.tolist()
    wanted = (needs[0], needs[1], needs[2])
    dy_examples, examples = _examples(dy), activate(_examples(x), activation)
    if batched.suits(pieces, examples.shape[1], ids):
        dx, dw, db = batched.Batched(pieces, weight, ids).backward(dy_examples, examples, wanted)
    else:
        dx, dw, db = segments.backward(pieces, dy_examples, examples, weight, ids, wanted)
    # An operator cannot return None: what was not asked for comes back empty.
    return (
        x.new_empty(0) if dx is None else activation_grad(dx.view(x.shape), x, activation),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


def _pieces(
    index: Tensor, extents: Tensor, kind: str, geometry: list[int], weight: Tensor, packed_width: int
) -> segments.Pieces:
    N, K = weight.shape
    packed = None if packed_width == UNPACKED else packed_width
    if kind == "rows":
        return Rows(index, extents, geometry[0], N, K, packed)
    if kind == "columns":
        return Columns(index, extents, geometry[0], N, K, packed)
    if kind == "blocks":
        return Blocks(index, extents, (geometry[0], geometry[1]), N, K)
    return Weights(index, N, K)


def _host_ids(language_ids: Tensor, n_languages: int) -> list[int]:
    ids: list[int] = language_ids.tolist()
    for position, language in enumerate(ids):
        if not -1 <= language < n_languages:
            raise ValueError(
                f"language_ids[{position}] is {language}; expected 0 to {n_languages - 1}, or -1 for the full network"
            )
    return ids


def _check_packed(pieces: segments.Pieces, kind: str, ids: list[int], packed_width: int) -> None:
    if packed_width == UNPACKED or not isinstance(pieces, (Rows, Columns)):
        return
    for language in set(ids):
        if pieces.live(language) > packed_width:
            name = "the full network (-1)" if language == -1 else f"language {language}"
            live = pieces.live(language)
            raise ValueError(f"{name} has {live} live {kind}, more than the packed width {packed_width}")


def _examples(x: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]; T is spelled out because -1 is ambiguous in an empty batch."""
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    return x.reshape(x.shape[0], tokens, x.shape[-1])


# ---- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, language_ids, index, extents, ctx.kind, ctx.geometry, _, ctx.packed_width, ctx.activation = inputs
    ctx.save_for_backward(x, weight, language_ids, index, extents)


def _gradients(backward: Callable[..., tuple[Tensor, Tensor, Tensor]], ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, language_ids, index, extents = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = backward(
        dy, x, weight, language_ids, index, extents, ctx.kind, ctx.geometry, ctx.packed_width, ctx.activation, needs
    )
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


# ---- custom operators


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
def _(dy, x, weight, language_ids, index, extents, kind, geometry, packed_width, activation, needs):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )
