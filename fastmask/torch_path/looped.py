"""One language after the other: its live weights times its tokens.

Layers that share their input look up a language's tokens once and sum their input gradients in the products that make
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.torch_path.segments import Grads, Needs, Pieces, Split, Target, cast, dtype_of_sums, take

__all__ = ["backward", "forward"]


def forward(
    layers: Sequence[Pieces],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    split: Split,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Each layer's y, and the weights for `backward` if they had to be cast."""
    read = _laid_out(layers, weights, split, x)
    cast_weights = read if any(weight.dtype != x.dtype for weight in weights) else []
    if len(split.parts) == 1:
        ((language, _),) = split.parts
        tokens = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        return [
            layer.forward(language, tokens, weight, bias, None).view(x.shape[0], x.shape[1], layer.out_width)
            for layer, weight, bias in zip(layers, read, biases, strict=True)
        ], cast_weights
    ys = [x.new_empty(*x.shape[:2], layer.out_width) for layer in layers]
    for language, where in split.parts:
        tokens = take(x, where)
        for layer, weight, bias, y in zip(layers, read, biases, ys, strict=True):
            target = Target(y, where)
            layer.forward(language, tokens, weight, bias, target.tokens)
            target.done()
    return ys, cast_weights


def backward(
    layers: Sequence[Pieces],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    split: Split,
    needs: Needs,
    kept: Sequence[Tensor],
) -> Grads:
    """Gradients of `forward`, which has left `kept`."""
    read = kept or _laid_out(layers, weights, split, x)
    if len(split.parts) == 1:
        return _of_one_language(split.parts[0][0], layers, dys, x, weights, read, needs)
    dx = x.new_empty(x.shape) if needs.x else None
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
        layer.summed_weight_grad(parts[g], weights[g], read[g]) if needs.weights[g] else None
        for g, layer in enumerate(layers)
    ]
    dbs = [_bias_grad(layer, parts[g], weights[g]) if needs.biases[g] else None for g, layer in enumerate(layers)]
    return dx, dws, dbs


def _of_one_language(
    language: int,
    layers: Sequence[Pieces],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    read: Sequence[Tensor],
    needs: Needs,
) -> Grads:
    """`backward` of a batch of one language: nothing to split, and no second language to add."""
    M = x.shape[0] * x.shape[1]
    tokens, dx = x.reshape(M, x.shape[2]), None
    dws: list[Tensor | None] = [None] * len(layers)
    dbs: list[Tensor | None] = [None] * len(layers)
    for g, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        upstream = dys[g].reshape(M, dys[g].shape[2])
        if needs.x and dx is None:
            dx = layer.input_grad(language, upstream, read[g], None)
        elif dx is not None:
            layer.add_input_grad(language, upstream, read[g], dx)
        if needs.weights[g]:
            dws[g] = layer.weight_grad(language, upstream, tokens, weight)
        if needs.biases[g]:
            dbs[g] = _bias_grad(layer, [(language, upstream, tokens)], weight)
    return None if dx is None else dx.view(x.shape), dws, dbs


def _bias_grad(layer: Pieces, parts: Sequence[tuple[int, Tensor, Tensor]], weight: Tensor) -> Tensor:
    """The db [N] of a batch, in the weight's dtype."""
    grad = weight.new_zeros(weight.shape[0], dtype=dtype_of_sums(weight))
    for language, dy, _ in parts:
        layer.add_bias_grad(language, dy, grad)
    return cast(grad, weight.dtype)


def _laid_out(layers: Sequence[Pieces], weights: Sequence[Tensor], split: Split, x: Tensor) -> Sequence[Tensor]:
    languages = list(split.positions)
    return [layer.laid_out(weight, languages, x) for layer, weight in zip(layers, weights, strict=True)]
