"""Which languages a gradient came from, noticed while the backward pass brings it.

A forward hook on each masked layer marks its output with the languages of the pass; when the backward pass comes
through the output and then adds to `.grad` of the layer's weight, those languages have arrived. So forward passes that
are never differentiated do not count, nor does what `torch.autograd.grad` hands out (inner loops, importance
scores), and a note lives as long as the gradient it is about: one that is set to None begins anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastmask.linear import MaskedLinear
from fastmask.models.layers import AttachedLinear

__all__ = ["Arrivals"]

Ids = Sequence[int] | Tensor
"""Language ids; those on a GPU stay a tensor until somebody has to know them."""


class Arrivals:
    """What has arrived at the masked layers of a model; layers are watched from `watch` on.

    A compiled graph shows none of its passes, and gradients that are put into `.grad` by hand come from nowhere.
    """

    def __init__(self) -> None:
        self._notes: weakref.WeakKeyDictionary[nn.Module, _Note] = weakref.WeakKeyDictionary()
        self._hooked: Any = WeakIdKeyDictionary()

    def watch(self, layers: Sequence[MaskedLinear]) -> None:
        """Hook layers that are new (attached since), and parameters that are."""
        for layer in layers:
            if layer not in self._notes:
                self._notes[layer] = _Note()
                layer.register_forward_hook(self._notes[layer].passed_forward, with_kwargs=True)
            carrier = _carrier(layer)
            if carrier is not None and carrier not in self._hooked:
                note = self._notes[layer]
                carrier.register_hook(partial(note.gradient_is_coming, weakref.ref(layer)))
                carrier.register_post_accumulate_grad_hook(note.gradient_has_come)
                self._hooked[carrier] = True

    def languages(self, layer: MaskedLinear) -> set[int]:
        """Ids of the languages in the gradients of a layer; empty where nothing is known.

        Raises:
            RuntimeError: ids have become those of other languages since.
        """
        note, now = self._notes[layer], _names(layer)
        if any(then != now[: len(then)] for then in note.names):
            raise RuntimeError(
                "a language was removed since the gradients came, and ids are those of others now: set them to zero, "
                "or call step(languages=...)"
            )
        note.arrived.update(*(ids.tolist() for ids in note.unread))
        note.unread = []
        return note.arrived

    def forget(self) -> None:
        """All gradients were set to zero."""
        for note in self._notes.values():
            note.forget()


class _Note:
    """What is known of one layer. It refers to no module and no tensor but ids: copies of a model stay light."""

    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.unread: list[Tensor] = []  # ids on a GPU that have arrived, too
        self.names: set[tuple[str, ...]] = set()  # of all languages, when those ids were given
        self._pending: list[tuple[Ids, tuple[str, ...]]] = []
        self._pass = -1  # which backward pass the pending ones are of
        self._begins = True

    def forget(self) -> None:
        self.arrived, self.unread, self.names = set(), [], set()

    def passed_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(partial(self._passed_backward, _ids(layer, args, kwargs), _names(layer)))

    def _passed_backward(self, ids: Ids, names: tuple[str, ...], _: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass, self._pending = current, []
        self._pending.append((ids, names))

    def gradient_is_coming(self, layer: weakref.ref[MaskedLinear], _: Tensor) -> None:
        there = layer()
        carrier = None if there is None else _carrier(there)
        self._begins = carrier is None or carrier.grad is None

    def gradient_has_come(self, _: Tensor) -> None:
        if self._begins:
            self.forget()
        if self._pass == torch._C._current_graph_task_id():
            for ids, names in self._pending:
                self.names.add(names)
                if isinstance(ids, Tensor):
                    self.unread.append(ids)
                else:
                    self.arrived.update(ids)
        self._pending = []


def _carrier(layer: nn.Module) -> Tensor | None:
    """The parameter whose gradient tells for the layer: the weight, or the bias where only that is trained."""
    return next((p for p in (layer.weight, layer.bias) if isinstance(p, Tensor) and p.requires_grad), None)


def _names(layer: nn.Module) -> tuple[str, ...]:
    return layer.router.languages if isinstance(layer, AttachedLinear) else ()


def _ids(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ids:
    if isinstance(layer, AttachedLinear):
        route = layer.router.current()
        if route.present is not None:
            return route.present
        ids = route.language_ids
        return (ids,) if isinstance(ids, int) else ids.detach()
    ids = args[1] if len(args) > 1 else kwargs["language_ids"]
    return ids.detach() if ids.device.type != "cpu" else tuple(set(ids.tolist()))
