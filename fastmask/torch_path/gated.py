"""Row and column masks when languages have few tokens: the whole weight, and gates on the masked side of activations.

One language after the other, live weights are gathered and dW is added for each, which takes as long as the products of
a hundred tokens. With fewer it is less work to multiply all tokens of the batch by the whole weight at once, dead units
and all, and to close gates on the activations of units that a language does not own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.torch_path.columns import Columns
from fastmask.torch_path.products import add_multiply, multiply, over_tokens
from fastmask.torch_path.rows import Rows
from fastmask.torch_path.segments import Grads, Needs, Split, cast

__all__ = ["backward", "forward"]


def forward(
    layers: Sequence[Rows | Columns],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    split: Split,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Each layer's y, and the weights for `backward` if they had to be cast."""
    read = [cast(weight, x.dtype) for weight in weights]
    ys = []
    for layer, weight, bias in zip(layers, read, biases, strict=True):
        gates, bias = _Gates(layer, split, x), None if bias is None else cast(bias, x.dtype)
        if isinstance(layer, Rows):
            ys.append(gates.leave(multiply(_tokens(x), weight.t(), bias), x))
        else:
            ys.append(multiply(gates.enter(x), weight.t(), bias).view(*x.shape[:2], layer.out_width))
    return ys, read if any(weight.dtype != x.dtype for weight in weights) else []


def backward(
    layers: Sequence[Rows | Columns],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    split: Split,
    needs: Needs,
    kept: Sequence[Tensor],
) -> Grads:
    """Gradients of `forward`, which has left `kept`."""
    dx: Tensor | None = None
    dws: list[Tensor | None] = [None] * len(layers)
    dbs: list[Tensor | None] = [None] * len(layers)
    for g, (layer, weight, dy) in enumerate(zip(layers, weights, dys, strict=True)):
        gates, of_rows = _Gates(layer, split, x), isinstance(layer, Rows)
        read = kept[g] if kept else cast(weight, x.dtype)
        upstream = gates.enter(dy) if of_rows else _tokens(dy)
        if needs.x and of_rows and dx is not None:
            add_multiply(dx, upstream, read)
        elif needs.x:
            part = multiply(upstream, read)
            part = part if of_rows else _tokens(gates.leave(part, x))
            dx = part if dx is None else dx.add_(part)
        if needs.weights[g]:
            tokens = _tokens(x) if of_rows else gates.enter(x)
            dws[g] = cast(over_tokens(upstream, tokens, upstream.new_empty(weight.shape)), weight.dtype)
        if needs.biases[g]:
            dbs[g] = cast(upstream.sum(0), weight.dtype)
    return None if dx is None else dx.view(x.shape), dws, dbs


class _Gates:
    """What lies between the whole weight and the masked side of a layer's activations in one batch."""

    def __init__(self, layer: Rows | Columns, split: Split, x: Tensor) -> None:
        languages, of = split.once(_languages, x.device), layer.live_units
        self.size = layer.size
        self.units: Tensor | None = None  # [B, 1, packed width]: what each place holds; a dead row behind the live ones
        self.closed: Tensor | None = None  # [B, 1, packed width or size]: what is closed to an example's language
        if layer.packed_width is None:
            self.closed = of.dead()[languages, None]
            return
        self.units = of.ordered()[languages, None, : layer.width].long()
        if min(map(layer.live, split.positions)) < layer.width:
            self.closed = torch.arange(layer.width, device=x.device) >= of.numbers()[languages, None, None]

    def enter(self, given: Tensor) -> Tensor:
        """[B, T, packed width or size] -> [B * T, size], zero at what is dead, whatever it held."""
        if self.closed is not None:
            given = given.masked_fill(self.closed, 0)
        if self.units is not None:
            B, T, _ = given.shape
            given = given.new_zeros(B, T, self.size).scatter_(2, self.units.expand(-1, T, -1), given)
        return _tokens(given)

    def leave(self, wide: Tensor, like: Tensor) -> Tensor:
        """[B * T, size] -> [B, T, packed width or size], zero at what is dead; `like` is [B, T, ...]."""
        B, T, _ = like.shape
        given = wide.view(B, T, self.size)
        if self.units is not None:
            given = given.gather(2, self.units.expand(-1, T, -1))
        return given if self.closed is None else given.masked_fill_(self.closed, 0)


def _languages(split: Split, device: torch.device) -> Tensor:
    """The language of each example, int64 [B]."""
    return torch.tensor(split.languages, dtype=torch.int64, device=device)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])
