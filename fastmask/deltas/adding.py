"""Changes on models: put on one after the other, taken off in any order, to the last bit.

A model is what it was, and then each change in the order in which it came. What a change was put on is kept beside it:
taking one off puts that back, and what came later is put on anew. So no rounding is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmask.deltas.part import Part, digest_of

if TYPE_CHECKING:
    from fastmask.deltas.delta import Change

__all__ = ["add", "remove"]

Layer = tuple["Change", dict[str, Tensor]]  # a change, and the live part of each parameter before it

# Beside the models, not on them: copies and pickles are models of their own, with nothing to take off.
_layers: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()


@torch.no_grad()
def add(model: nn.Module, changes: Sequence[Change]) -> None:
    """Put changes on a model; see `Delta.add`."""
    layers = _layers.setdefault(model, [])
    for change in changes:
        _check_fit(model, change)
        if any(other.digest == change.digest for other, _ in layers):
            raise ValueError(f"the delta of {change.language!r} was added to this {type(model).__name__} already")
    with _taken_off(model, layers):
        for change in changes:
            _check_base(model, change)
    for change in changes:
        layers.append((change, _put_on(model, change)))


@torch.no_grad()
def remove(model: nn.Module, changes: Sequence[Change]) -> None:
    """Take changes off a model; see `Delta.remove`."""
    layers, gone = _layers.get(model, []), {change.digest for change in changes}
    there = {change.digest for change, _ in layers}
    for change in changes:
        if change.digest not in there:
            names = ", ".join(repr(other.language) for other, _ in layers) or "none"
            raise ValueError(
                f"the delta of {change.language!r} was never added to this {type(model).__name__} (added: {names})"
            )
    with _taken_off(model, layers):
        layers[:] = [layer for layer in layers if layer[0].digest not in gone]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _put_on(model: nn.Module, change: Change) -> dict[str, Tensor]:
    """Change a model; what there was before."""
    parameters, before = _parameters(model), {}
    for name, part in change.parts.items():
        before[name] = part.read(parameters[name])
        part.write(parameters[name], part.added_to(before[name]))
    return before


@contextmanager
def _taken_off(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """The model without changes inside; those that are in `layers` then are put on again.

    Raises:
        ValueError: somebody else has changed what they had left there. The model is as it was.
    """
    off: list[Change] = []
    try:
        for change, before in reversed(layers):
            _take_off(model, change, before)
            off.insert(0, change)
    except ValueError:
        for change in off:
            _put_on(model, change)
        raise
    try:
        yield
    finally:
        layers[:] = [(change, _put_on(model, change)) for change, _ in layers]


def _take_off(model: nn.Module, change: Change, before: dict[str, Tensor]) -> None:
    parameters = _parameters(model)
    for name, part in change.parts.items():
        now = _fitting(model, parameters, name, part)
        if not torch.equal(part.read(now), part.added_to(before[name].to(now.device))):
            raise ValueError(
                f"{name!r} has changed since the delta of {change.language!r} was added, which would be lost: take a "
                "new delta of it, or load the parameters that the delta left there"
            )
    for name, part in change.parts.items():
        part.write(parameters[name], before[name].to(parameters[name].device))


def _check_fit(model: nn.Module, change: Change) -> None:
    parameters = _parameters(model)
    for name, part in change.parts.items():
        _fitting(model, parameters, name, part)


def _fitting(model: nn.Module, parameters: dict[str, Tensor], name: str, part: Part) -> Tensor:
    """The parameter that a part is a change of."""
    found = parameters.get(name)
    if found is None:
        raise ValueError(f"this {type(model).__name__} has no parameter {name!r}: the delta is of another model")
    if type(found) not in (Tensor, nn.Parameter) or found.is_meta:
        raise ValueError(f"expected {name!r} as a whole tensor with values, given a {type(found).__name__}")
    if tuple(found.shape) != part.shape or found.dtype != part.dtype:
        raise ValueError(
            f"{name!r} is {found.dtype} {tuple(found.shape)} here, and {part.dtype} {part.shape} in the delta: it is "
            "of another model"
        )
    return found


def _check_base(model: nn.Module, change: Change) -> None:
    parameters = _parameters(model)
    for name, part in change.parts.items():
        if digest_of(part.read(parameters[name])) != part.base:
            raise ValueError(
                f"{name!r} is not what it was when the delta of {change.language!r} was taken: expected the model that "
                "training began with, given another one (or one that was trained since)"
            )
