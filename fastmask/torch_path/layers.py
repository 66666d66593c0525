"""Running one batch: one masked layer, or several that share their input (Q, K and V; gate and up).

The live part of each weight is gathered and multiplied with a language's tokens: languages that are alike in their
numbers of tokens and units in one call, others one after the other. Where that takes longer than the whole weight with
gates (`gated`), every language is the full network in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kept import Kept
from fastmask.masks import FULL, UNPACKED, StoredMask
from fastmask.torch_path import full
from fastmask.torch_path.activations import NONE, activate, activation_grad
from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.gated import enter, is_cheaper, leave
from fastmask.torch_path.gemm import cast
from fastmask.torch_path.split import Split
from fastmask.torch_path.units import Units
from fastmask.torch_path.weights import Weights

__all__ = ["backward", "forward"]

Layer = Units | Blocks | Weights
Grads = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]  # dx, and of each layer dW and db
HALF = (torch.bfloat16, torch.float16)


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
    """Run x [B, T, K_in], activated, through each masked weight -> y of each, [B, T, its N_out].

    The weights as the products read them are put into `kept`, if it is a list: `backward` need not make them again.
    With `full_forward` all examples go through the whole weights, whatever their languages.

    Raises:
        ValueError: an id out of range, or a language with more live units than the packed side holds.
    """
    layers, split, gated = _prepared(masks, x, weights, language_ids, n_languages, full_forward)
    for mask, layer in zip(masks, layers, strict=True):
        _check_packed(mask, layer, split)
    active = activate(x, activation)
    if full_forward:
        read = [cast(weight, x.dtype) for weight in weights]
    else:
        read = _read(layers, weights, x, split.full if gated else split)
    if kept is not None:
        kept += read
    if full_forward:
        return full.full_forward(active, read, biases)
    widths = [
        weight.shape[0] if mask.kind != "rows" or mask.packed_width == UNPACKED else mask.packed_width
        for mask, weight in zip(masks, weights, strict=True)
    ]
    if not gated:
        return _run(layers, active, read, biases, widths, split)
    if not gated[0].of_rows:
        return _run(layers, enter(active, gated[0], split), read, biases, widths, split.full)
    ys = _run(layers, active, read, biases, [layer.size for layer in gated], split.full)
    return [leave(y, layer, split, width) for y, layer, width in zip(ys, gated, widths, strict=True)]


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
) -> Grads:
    """Gradients of `forward`: (dx, dW of each, db of each), each None unless it is needed.

    `kept` is what the forward pass left there. Half-precision weights are summed in float32 when several languages add
    to them. With `full_forward` only dW and db are of the languages, and zero at what they do not own.
    """
    layers, split, gated = _prepared(masks, x, weights, language_ids, n_languages, full_forward)
    active = activate(x, activation)
    needs = _Needs(needs_x and not full_forward, needs_weight, needs_bias)
    if full_forward:
        read = kept or [cast(weight, x.dtype) for weight in weights]
    else:
        read = kept or _read(layers, weights, x, split.full if gated else split)
    if not gated:
        dx, dws, dbs = _grads(layers, dys, active, weights, read, split, needs)
    elif gated[0].of_rows:
        upstreams = [enter(dy, layer, split) for dy, layer in zip(dys, gated, strict=True)]
        dx, dws, dbs = _grads(layers, upstreams, active, weights, read, split.full, needs)
    else:
        wide = enter(active, gated[0], split)
        dx, dws, dbs = _grads(layers, dys, wide, weights, read, split.full, needs)
        dx = None if dx is None else leave(dx, gated[0], split, x.shape[2])
    if full_forward and needs_x:
        dx = full.full_input_grad(dys, read)
    return None if dx is None else activation_grad(dx, x, activation), dws, dbs


def _read(layers: Sequence[Layer], weights: Sequence[Tensor], x: Tensor, split: Split) -> list[Tensor]:
    return [layer.read(weight, x.dtype, len(split.parts)) for layer, weight in zip(layers, weights, strict=True)]


def _run(
    layers: Sequence[Layer],
    x: Tensor,
    read: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    widths: Sequence[int],
    split: Split,
) -> list[Tensor]:
    """All languages, each with its own part of the weights `read`: y [B, T, width] of each layer."""
    T, tokens = x.shape[1], split.sorted(x)
    pieces, found = split.pieces(tokens, T), []
    for layer, w, bias, width in zip(layers, read, biases, widths, strict=True):
        y = tokens.new_empty(tokens.shape[0], width)
        layer.forward(split.present, pieces, w, split.pieces(y, T))
        y = split.unsorted(y, T)
        if bias is not None:
            layer.add_bias(y, bias, split)
        found.append(y)
    return found


class _Needs(NamedTuple):
    """Which gradients are needed: of the input, and of each layer's weight and bias."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


def _grads(
    layers: Sequence[Layer],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    read: Sequence[Tensor],
    split: Split,
    needs: _Needs,
) -> Grads:
    """Gradients of `_run`, those of weights and biases in the dtype of `weights`."""
    T, tokens = x.shape[1], split.sorted(x)
    dx = torch.empty_like(tokens) if needs.x else None
    pieces, of_dx = split.pieces(tokens, T), None if dx is None else split.pieces(dx, T)
    dws: list[Tensor | None] = [None] * len(layers)
    dbs: list[Tensor | None] = [None] * len(layers)
    for g, (layer, dy, weight) in enumerate(zip(layers, dys, weights, strict=True)):
        # What the languages of a batch add up in.
        dtype = torch.float32 if weight.dtype in HALF and len(split.parts) > 1 else weight.dtype
        upstreams = split.pieces(split.sorted(dy), T)
        if of_dx is not None:
            layer.input_grad(split.present, upstreams, read[g], of_dx, add=g > 0)
        if needs.weights[g]:
            dw = layer.weight_grad(split.present, upstreams, pieces, weight, dtype)
            dws[g] = cast(dw if split.parts else dw.zero_(), weight.dtype)
        if needs.biases[g]:
            dbs[g] = cast(layer.bias_grad(dy, split, dtype), weight.dtype)
    return None if dx is None else split.unsorted(dx, T), dws, dbs


def _prepared(
    masks: Sequence[StoredMask],
    x: Tensor,
    weights: Sequence[Tensor],
    language_ids: Tensor,
    n_languages: int,
    full_forward: bool,
) -> tuple[Sequence[Layer], Split, Sequence[Units]]:
    """The layers, the batch, and the layers once more if they are to be run with gates."""
    layers = [
        _layers.of(mask.index, functools.partial(_made, mask, weight), mask.packed_width != UNPACKED)
        for mask, weight in zip(masks, weights, strict=True)
    ]
    split, T = Split.of(language_ids, n_languages), x.shape[1]
    return split.once((T, full_forward, *layers), lambda: _planned(layers, split, T, full_forward))


def _planned(
    layers: Sequence[Layer], split: Split, T: int, full_forward: bool
) -> tuple[Sequence[Layer], Split, Sequence[Units]]:
    split = split.merged([layer.same_as for layer in layers])
    units = [layer for layer in layers if isinstance(layer, Units)]
    can = len(units) == len(layers) and (units[0].of_rows or len(units) == 1)
    masked = can and any(not layer.whole(language) for layer in units for language, _, _ in split.parts)
    return layers, split, units if masked and is_cheaper(units, T, split, full_forward) else ()


_layers: Kept[Layer] = Kept()


def _made(mask: StoredMask, weight: Tensor) -> Layer:
    shape = (weight.shape[0], weight.shape[1])
    if mask.kind == "blocks":
        return Blocks(mask, shape)
    return Weights(mask, shape) if mask.kind == "weights" else Units(mask, shape, mask.packed_width != UNPACKED)


def _check_packed(mask: StoredMask, layer: Layer, split: Split) -> None:
    if mask.packed_width == UNPACKED or not isinstance(layer, Units):
        return
    for language, _, _ in split.parts:
        if layer.live[language] > mask.packed_width:
            name = "the full network (-1)" if language == FULL else f"language {language}"
            raise ValueError(
                f"{name} has {layer.live[language]} live {mask.kind}, more than the packed width {mask.packed_width}"
            )
