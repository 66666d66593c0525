"""Fast weights in place: how fast each parameter is adapted, and what puts it back bit for bit afterwards.

Hooks, tied weights, attached layers and kernels all keep working, because the model is the same one. What a step is
about to change is copied first, and only that: the live part of a masked weight, the rows of an embedding that were
looked up, all of any other parameter. A parameter that gets no gradient is neither copied nor changed.

A step is taken parameter by parameter while the backward pass runs, as soon as a gradient is complete, and the gradient
is freed at once: gradients of the whole model never exist together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.live import WHOLE, Live, live_in, masked_parameters
from fastmask.optim import can_be_sparse, sparse_gradients

InnerRates = float | Mapping[str, float]
"""One for all parameters, or one for each beginning of their names."""


def rates_of(model: nn.Module, rates: InnerRates) -> dict[Tensor, float]:
    """The inner learning rate of each trainable parameter that is adapted; a rate of 0 leaves it out.

    Args:
        model: its parameters that require a gradient count, tied ones once, under their first name.
        rates: see `fastmask.MetaLearner`.

    Raises:
        ValueError: a rate that is not a finite number >= 0, a parameter without one, or nothing to adapt.
        KeyError: a group's name that is not the beginning of any parameter's name.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[Tensor, float] = {}
    if isinstance(rates, Mapping):
        for prefix, rate in rates.items():
            _checked(rate, repr(prefix))
            if not any(_is_below(name, prefix) for name, _ in model.named_parameters()):
                raise unknown("parameter group", prefix, [name for name, _ in model.named_modules() if name])
        for name, parameter in trainable.items():
            longest = max((prefix for prefix in rates if _is_below(name, prefix)), key=len, default=None)
            if longest is None:
                raise ValueError(
                    f"parameter {name!r} has no inner learning rate: groups {', '.join(map(repr, rates))}; "
                    "a group named '' takes all that is left, a rate of 0 leaves parameters as they are"
                )
            found[parameter] = float(rates[longest])
    else:
        found = dict.fromkeys(trainable.values(), _checked(rates, "all parameters"))
    adapted = {parameter: rate for parameter, rate in found.items() if rate > 0}
    if not adapted:
        raise ValueError("no parameter would be adapted: every inner learning rate is 0, or all parameters are frozen")
    return adapted


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _checked(rate: Any, what: str) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
        raise ValueError(f"inner learning rate of {what} is {rate!r} (expected a finite number >= 0)")
    return float(rate)


class FastWeights:
    """A context in which `model` may be adapted; on leaving it, parameters and buffers are what they were.

    Buffers (running statistics) are put back too, so theta never learns them from adapted passes.

    Args:
        model: changed in place inside the context.
        rates: learning rate of each parameter to adapt; others stay as they are.
        language: whose part may change, -1 for all; read from the masks that the layers have now.
        keep: leave the adapted weights in place at the end, unless an exception is on its way.
    """

    def __init__(self, model: nn.Module, rates: Mapping[Tensor, float], language: int, keep: bool = False) -> None:
        self.model, self.rates, self.keep = model, rates, keep
        self._live = {p: live_in(layer, p, (language,)) for p, layer in masked_parameters(model).items()}
        self._backups: dict[Tensor, _Backup] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def __enter__(self) -> FastWeights:
        """Remember the buffers, and the weights that a forward pass itself rescales."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers.append((module, name, buffer, buffer.clone()))
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                self._backup(module.weight).save_all(module.weight)
        return self

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Put parameters and buffers back."""
        if kind is None and self.keep:
            return
        for parameter, backup in self._backups.items():
            backup.restore(parameter)
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            if all(stride or size < 2 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)):
                buffer.copy_(value)  # an expanded one could not be written to, by nobody

    def step(self, loss: Callable[[], Tensor], loss_scale: float = 1.0) -> Tensor:
        """One step of SGD on the loss, a scalar; its value, detached, from before the step.

        `loss_scale` multiplies the loss before the backward pass and divides the step (half precision).
        `parameter.grad` is neither read nor written.
        """
        with ExitStack() as stack:
            # Of a large vocabulary a support set looks up little.
            tables = [m for m in self.model.modules() if can_be_sparse(m) and m.weight in self.rates]
            stack.enter_context(sparse_gradients(tables))
            value = loss()
            for parameter, rate in self.rates.items():
                hook = partial(self._take_step, parameter, rate / loss_scale)
                stack.callback(parameter.register_hook(hook).remove)
            scaled = value if loss_scale == 1.0 else value * loss_scale
            torch.autograd.grad(scaled, list(self.rates), allow_unused=True)
        return value.detach()

    @torch.no_grad()
    def add_distance(self, scale: float) -> None:
        """`parameter.grad += scale * (theta - phi)` for every parameter that has changed."""
        for parameter, backup in self._backups.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            backup.add_distance(parameter, parameter.grad, scale)

    def _backup(self, parameter: Tensor) -> _Backup:
        if parameter not in self._backups:
            self._backups[parameter] = _Backup(self._live.get(parameter, WHOLE))
        return self._backups[parameter]

    @torch.no_grad()
    def _take_step(self, parameter: Tensor, rate: float, gradient: Tensor) -> Tensor | None:
        """A tensor hook that takes the step and lets go of the gradient.

        It runs once in a backward pass, when all uses of the parameter have been differentiated, so nothing that is
        still to come needs the old value; something that did would be told so by autograd.
        """
        self._backup(parameter).step(parameter, gradient, rate)
        # `autograd.grad` collects what a hook returns: one number that looks like the gradient. A sparse one is small,
        # and cannot be replaced by a dense one.
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)


class _Backup:
    """What one parameter held before it was changed: its live part, or the rows that sparse gradients reached."""

    def __init__(self, part: Live) -> None:
        self.part = part
        self.live: Tensor | None = None
        self.rows: tuple[Tensor, Tensor] | None = None  # int64 [n], and what they held [n, ...]

    def step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        if gradient.is_sparse and self.part is WHOLE:
            gradient = gradient.coalesce()
            rows = gradient.indices()[0]
            if self.live is None:
                self._save_rows(parameter, rows)
            parameter.index_add_(0, rows, gradient.values().to(parameter.dtype), alpha=-rate)
        else:
            self.save_all(parameter)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            parameter.sub_(self.part.only(dense), alpha=rate)  # subtracting +0 changes no bit of what is dead

    def save_all(self, parameter: Tensor) -> None:
        """Copy all that may change; rows that have changed already, as they were."""
        if self.live is None:
            live = self.part.read(parameter.detach())
            self.live = live if self.rows is None else live.index_copy_(0, *self.rows)

    def _save_rows(self, parameter: Tensor, rows: Tensor) -> None:
        if self.rows is None:
            self.rows = rows, parameter.index_select(0, rows)
        else:
            known, values = self.rows
            new = rows[~torch.isin(rows, known)]
            self.rows = torch.cat([known, new]), torch.cat([values, parameter.index_select(0, new)])

    def restore(self, parameter: Tensor) -> None:
        if self.live is not None:
            self.part.write(parameter, self.live)
        elif self.rows is not None:
            parameter.index_copy_(0, *self.rows)

    def add_distance(self, parameter: Tensor, grad: Tensor, scale: float) -> None:
        if self.live is not None:
            distance = self.live - self.part.read(parameter)
            self.part.write(grad, self.part.read(grad).add_(distance, alpha=scale))
        elif self.rows is not None:
            rows, values = self.rows
            grad.index_add_(0, rows, values - parameter.index_select(0, rows), alpha=scale)
