"""The neurons of a mixture of experts: where they lie in parameters that hold all experts of a layer, [experts, ...].

Neuron i of a layer is neuron i of each of its routed experts: which expert a token goes to is up to the router, so a
language owns the same part of all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models.families import Projections

__all__ = ["Stacked", "stacked_in"]


@dataclass(frozen=True)
class Stacked:
    """A parameter that holds something of every expert, and where the neurons lie in it.

    Attributes:
        name: of the parameter, below its module.
        dim: along which neurons lie.
        parts: how many entries along `dim` a neuron has: 2 where gate and up are one parameter, otherwise 1.
        interleaved: whether these lie side by side; otherwise all gates come first, and then all ups.
        read: whether it reads neurons (down), and does not compute them.
    """

    name: str
    dim: int
    parts: int = 1
    interleaved: bool = False
    read: bool = False

    def entries(self, neurons: Tensor, n: int) -> Tensor:
        """Where some neurons (int64 [live]) of n lie along `dim`, int64 [live * parts]."""
        if self.interleaved:
            return (neurons[:, None] * self.parts + torch.arange(self.parts, device=neurons.device)).flatten()
        return torch.cat([neurons + part * n for part in range(self.parts)])

    def beside(self, keep: Tensor, parameter: Tensor) -> Tensor:
        """Flags of neurons, [n], as flags that broadcast to the parameter."""
        entries = keep.repeat_interleave(self.parts) if self.interleaved else keep.repeat(self.parts)
        return entries.view(*[-1 if dim == self.dim else 1 for dim in range(parameter.ndim)])


def stacked_in(module: nn.Module, layout: Projections) -> tuple[int, tuple[Stacked, ...]] | None:
    """How many neurons each of a module's experts has, and the parameters they lie in; None if it holds no experts.

    A module of experts has the projections of a layout as parameters of its own, [experts, out, in] or [experts, in,
    out], perhaps with biases, and nothing else. It is called with tokens, the experts of each token and their weights:
    what was sorted by experts before has lost which example it belongs to.
    """
    parameters: dict[str, Any] = module._parameters
    *makers, reader = names = (*layout.rows, layout.columns)
    weights: list[Any] = [parameters.get(name) for name in names]
    biases = {f"{name}_bias" for name in names}
    if any(weight is None or weight.ndim != 3 for weight in weights) or parameters.keys() - biases - {*names}:
        return None
    if len(inspect.signature(getattr(module, "plain", module).forward).parameters) != 3:
        return None
    for out, into in _orders(module):
        n, shapes = weights[-1].shape[into], [weight.shape for weight in weights[:-1]]
        parts = [shape[out] // n for shape in shapes]
        wanted = [(part * n, weights[-1].shape[out]) for part in parts]
        if [(shape[out], shape[into]) for shape in shapes] == wanted and parts in ([1], [2], [1, 1]):
            break
    else:
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    found = [Stacked(reader, into, read=True)]
    for name, part in zip(makers, parts, strict=True):
        found.append(Stacked(name, out, part, interleaved and part > 1))
        if parameters.get(f"{name}_bias") is not None:
            found.append(Stacked(f"{name}_bias", 1, part, interleaved and part > 1))
    return n, tuple(found)


def _orders(module: nn.Module) -> Sequence[tuple[int, int]]:
    """(dimension of outputs, of inputs) of the weights, the likelier first: shapes do not always tell."""
    orders = (1, 2), (2, 1)
    return orders[::-1] if getattr(module, "is_transposed", False) else orders
