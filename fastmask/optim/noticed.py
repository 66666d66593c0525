"""Which languages the gradients of masked layers came from, as `LiveAdamW` notices it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.linear import MaskedLinear
from fastmask.models.layers import AttachedLinear


class Later:
    """Ids that stay on their GPU until somebody has to know them."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.version = ids.detach(), None if ids.is_inference() else ids._version

    def read(self) -> list[int]:
        if self.version is not None and self.ids._version != self.version:
            raise RuntimeError(
                "language ids on a GPU were written to between a forward pass and the optimizer's step, so its "
                "languages are not known: call step(languages=...), or give each batch a tensor of its own"
            )
        return self.ids.tolist()


Ids = Sequence[int] | Later


class Note:
    """Which languages the gradient of one masked layer came from, noticed while the backward pass brings it.

    A forward hook marks the layer's output with the languages of the pass; when the backward pass comes through the
    output and then adds to `.grad` of the layer's weight, those have arrived. So passes that are never differentiated
    do not count, nor does what `torch.autograd.grad` hands out (inner loops, importance scores). A note lives
    as long as the gradient it is about. It refers to no module and no tensor but ids: copies of a model stay light.
    """

    def __init__(self) -> None:
        # Ids of passes, and the names of all languages then.
        self.arrived: list[tuple[Ids, tuple[str, ...]]] = []
        self._pending: list[tuple[Ids, tuple[str, ...]]] = []
        self._pass = -1  # which backward pass the pending ones are of
        self._begins = True
        self._version = -1  # of the gradient, when something was last added to it

    def passed_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(partial(self._passed_backward, ids_of_pass(layer, args, kwargs), names_of(layer)))

    def _passed_backward(self, ids: Ids, names: tuple[str, ...], _: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass, self._pending = current, []
        self._pending.append((ids, names))

    def gradient_is_coming(self, layer: weakref.ref[MaskedLinear], _: Tensor) -> None:
        there = layer()
        carrier = None if there is None else carrier_of(there)
        grad = None if carrier is None else carrier.grad
        # Somebody else may have set it to zero in place.
        self._begins = grad is None or (grad._version != self._version and not bool(grad.any()))

    def gradient_has_come(self, carrier: Tensor) -> None:
        if self._begins:
            self.arrived = []
        self._version = -1 if carrier.grad is None else carrier.grad._version
        if self._pass == torch._C._current_graph_task_id():
            self.arrived += self._pending
        self._pending = []


def carrier_of(layer: MaskedLinear) -> Tensor | None:
    """The parameter whose gradient tells for the layer: the weight, or the bias where only that is trained."""
    return next((p for p in (layer.weight, layer.bias) if isinstance(p, Tensor) and p.requires_grad), None)


def names_of(layer: nn.Module) -> tuple[str, ...]:
    return layer.router.languages if isinstance(layer, AttachedLinear) else ()


def ids_of_pass(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ids:
    if isinstance(layer, AttachedLinear):
        route = layer.router.current()
        if route.present is not None:
            return route.present
        ids = route.language_ids
        return (ids,) if isinstance(ids, int) else Later(ids)
    ids = args[1] if len(args) > 1 else kwargs["language_ids"]
    return Later(ids) if ids.device.type != "cpu" else tuple(set(ids.tolist()))
