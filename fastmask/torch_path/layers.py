"""Running one batch: one masked layer, or several that share their input (Q, K and V; gate and up).

All languages at once where `batched` suits, else one language after the other. Layers that share their input look up a
language's tokens once and sum their input gradients in the products that make them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fastmask.masks import UNPACKED, StoredMask, live_blocks
from fastmask.torch_path import batched
from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.segments import FULL, Pieces, Split, Target, cast, dtype_of_sums, take
from fastmask.torch_path.units import Columns, Rows
from fastmask.torch_path.weights import Weights

__all__ = ["backward", "forward"]


def forward(
    masks: Sequence[StoredMask],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    language_ids: Tensor,
    n_languages: int,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """Run x [B, T, K_in] through each masked weight -> y of each, [B, T, its N_out].

    What had to be cast of the weights is put into `kept`, if it is a list: `backward` need not cast it again.

    Raises:
        ValueError: an id out of range, or a language with more live units than the packed side holds.
    """
    split = Split.of(language_ids, n_languages)
    layers = [_pieces_of(mask, weight) for mask, weight in zip(masks, weights, strict=True)]
    for mask, layer in zip(masks, layers, strict=True):
        _check_packed(mask, layer, split)
    if _at_once(layers, x, split):
        return [
            batched.Batched(layer, weight, split).forward(x, bias)
            for layer, weight, bias in zip(layers, weights, biases, strict=True)
        ]
    read = _laid_out(layers, weights, split, x)
    if kept is not None and any(weight.dtype != x.dtype for weight in weights):
        kept += read
    if len(split.parts) == 1:
        ((language, _),) = split.parts
        tokens = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        return [
            layer.forward(language, tokens, weight, bias, None).view(x.shape[0], x.shape[1], layer.out_width)
            for layer, weight, bias in zip(layers, read, biases, strict=True)
        ]
    ys = [x.new_empty(*x.shape[:2], layer.out_width) for layer in layers]
    for language, where in split.parts:
        tokens = take(x, where)
        for layer, weight, bias, y in zip(layers, read, biases, ys, strict=True):
            target = Target(y, where)
            layer.forward(language, tokens, weight, bias, target.tokens)
            target.done()
    return ys


def backward(
    masks: Sequence[StoredMask],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    language_ids: Tensor,
    n_languages: int,
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of `forward`: (dx, dW of each, db of each), each None unless it is needed.

    `kept` is what the forward pass left there. dW is one buffer that every language adds its live part to.
    Half-precision weights are summed in float32 when several languages add to them.
    """
    split = Split.of(language_ids, n_languages)
    layers = [_pieces_of(mask, weight) for mask, weight in zip(masks, weights, strict=True)]
    if _at_once(layers, x, split):
        found = [
            batched.Batched(layer, weight, split).backward(dy, x, (needs_x, needs_weight[g], needs_bias[g]))
            for g, (layer, weight, dy) in enumerate(zip(layers, weights, dys, strict=True))
        ]
        parts_of_dx = [dx for dx, _, _ in found if dx is not None]
        dx = functools.reduce(torch.add, parts_of_dx) if parts_of_dx else None
        return dx, [dw for _, dw, _ in found], [db for _, _, db in found]

    read = kept or _laid_out(layers, weights, split, x)
    if len(split.parts) == 1:
        return _of_one_language(split.parts[0][0], layers, dys, x, weights, read, needs_x, needs_weight, needs_bias)
    dx = x.new_empty(x.shape) if needs_x else None
    parts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in layers]
    for language, where in split.parts:
        tokens = take(x, where)
        target = None if dx is None else Target(dx, where)
        for g, (layer, weight) in enumerate(zip(layers, read, strict=True)):
            upstream = take(dys[g], where)
            parts[g].append((language, upstream, tokens))
            if target is not None:
                add = layer.add_input_grad if g else layer.input_grad
                add(language, upstream, weight, target.tokens)
        if target is not None:
            target.done()
    dws = [
        layer.summed_weight_grad(parts[g], weights[g], read[g]) if needs_weight[g] else None
        for g, layer in enumerate(layers)
    ]
    dbs = [_bias_grad(layer, parts[g], weights[g]) if needs_bias[g] else None for g, layer in enumerate(layers)]
    return dx, dws, dbs


def _bias_grad(layer: Pieces, parts: Sequence[tuple[int, Tensor, Tensor]], weight: Tensor) -> Tensor:
    """The db [N] of a batch, in the weight's dtype."""
    grad = weight.new_zeros(weight.shape[0], dtype=dtype_of_sums(weight))
    for language, dy, _ in parts:
        layer.add_bias_grad(language, dy, grad)
    return cast(grad, weight.dtype)


def _of_one_language(
    language: int,
    layers: Sequence[Pieces],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    read: Sequence[Tensor],
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward` of a batch of one language: nothing to split, and no second language to add."""
    M = x.shape[0] * x.shape[1]
    tokens, dx = x.reshape(M, x.shape[2]), None
    dws: list[Tensor | None] = [None] * len(layers)
    dbs: list[Tensor | None] = [None] * len(layers)
    for g, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        upstream = dys[g].reshape(M, dys[g].shape[2])
        if needs_x and dx is None:
            dx = layer.input_grad(language, upstream, read[g], None)
        elif dx is not None:
            layer.add_input_grad(language, upstream, read[g], dx)
        if needs_weight[g]:
            dws[g] = layer.weight_grad(language, upstream, tokens, weight)
        if needs_bias[g]:
            dbs[g] = _bias_grad(layer, [(language, upstream, tokens)], weight)
    return None if dx is None else dx.view(x.shape), dws, dbs


def _pieces_of(mask: StoredMask, weight: Tensor) -> Pieces:
    """The mask of one weight in the form that is run; made once for a mask and a packed width."""
    # Kept with the tensor that holds the mask, because operators receive tensors only; masks never change.
    made: dict[int, Pieces] | None = getattr(mask.index, "_fastmask_pieces", None)
    if made is None:
        made = mask.index._fastmask_pieces = {}  # type: ignore[attr-defined]
    pieces = made.get(mask.packed_width)
    if pieces is None:
        pieces = made[mask.packed_width] = _made_from(mask, *weight.shape)
    return pieces


def _made_from(mask: StoredMask, N: int, K: int) -> Pieces:
    index = mask.index.detach()  # not the tensor that holds what is made here: they would hold each other
    packed = None if mask.packed_width == UNPACKED else mask.packed_width
    if mask.kind == "rows":
        return Rows(index, mask.extents, mask.geometry[0], N, K, packed)
    if mask.kind == "columns":
        return Columns(index, mask.extents, mask.geometry[0], N, K, packed)
    if mask.kind == "blocks":
        keep = live_blocks(index, mask.extents, mask.geometry, (N, K))
        return Blocks(keep, (mask.geometry[0], mask.geometry[1]), N, K)
    return Weights(index, N, K)


def _check_packed(mask: StoredMask, pieces: Pieces, split: Split) -> None:
    if mask.packed_width == UNPACKED or not isinstance(pieces, (Rows, Columns)):
        return
    for language in split.positions:
        live = pieces.live(language)
        if live > mask.packed_width:
            name = "the full network (-1)" if language == FULL else f"language {language}"
            raise ValueError(f"{name} has {live} live {mask.kind}, more than the packed width {mask.packed_width}")


def _at_once(layers: Sequence[Pieces], x: Tensor, split: Split) -> TypeGuard[Sequence[Rows | Columns]]:
    return len(split.parts) > 1 and all(batched.suits(layer, x, split) for layer in layers)


def _laid_out(layers: Sequence[Pieces], weights: Sequence[Tensor], split: Split, x: Tensor) -> Sequence[Tensor]:
    languages = list(split.positions)
    return [layer.laid_out(weight, languages, x) for layer, weight in zip(layers, weights, strict=True)]
