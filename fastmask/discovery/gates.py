"""Gates on the heads and neurons of an attached model: numbers that multiply what a unit hands on.

The derivative of a loss with respect to a unit's gate says what the unit is worth. Every example has gates of its own,
so one backward pass gives the derivative of each example's loss. `importance` reads gates of live units, all at 1;
ablations run the full network, and gate all units, dead ones at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmask.models.attach import attached, owner_of
from fastmask.models.contexts import evaluating
from fastmask.models.layers import AttachedLinear
from fastmask.torch_path.layers import NONE, activate


@dataclass(frozen=True)
class Probe:
    """One layer's units of one kind ("heads" or "neurons"), gated at the module that consumes them."""

    kind: str
    layer: int
    consumer: AttachedLinear
    unit: int  # how many of the consumer's inputs belong to one unit
    units: int  # in the full network


def probes_of(model: nn.Module) -> list[Probe]:
    """Where the units of an attached model are gated, in the order of its modules; ValueError where they cannot be."""
    state, owner = attached(model), owner_of(model)
    if state.router.full_forward:
        raise ValueError(
            'these subnetworks were attached with forward="full", under which every unit runs for every language: what '
            'a unit is worth to a subnetwork is found under forward="masked"'
        )
    found: dict[str, Probe] = {}
    for index, group, _ in state.structure.masked(state.subnets):
        name, unit = group.columns
        if group.stacked:
            raise ValueError(f"neurons of experts cannot be scored ({name!r}): mask heads alone, and score those")
        consumer = owner.get_submodule(name)
        if not isinstance(consumer, AttachedLinear):
            raise ValueError(f"units cannot be scored through {name!r}, an adapter or a quantised layer")
        found[name] = Probe(group.kind, index, consumer, unit, group.units)
    return [found[name] for name, _ in owner.named_modules() if name in found]


class Gate(NamedTuple):
    """The gates of one probe in one pass: [B, units], or [B, slots] where the live units travel packed."""

    values: Tensor
    packed: bool
    route: Any  # of the pass
    passes: int  # how many there were so far


Gates = dict[int, Gate]
"""Those of the last pass, by the number of the probe."""


class _Gate(torch.autograd.Function):
    """Multiply each unit of x [B, ..., units * unit] by its example's gate [B, units].

    The gates' gradient is per example, and accumulated in float32 at least. `is_open` says that all gates are 1:
    nothing is multiplied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, unit: int, is_open: bool) -> Tensor:
        ctx.save_for_backward(x, gates)
        ctx.unit, ctx.is_open = unit, is_open
        return x.view_as(x) if is_open else _scaled(x, gates, unit)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gates = ctx.saved_tensors
        # By x as it was before the gate: a closed gate has a gradient, too.
        of_tokens = (x * dy).flatten(1, -2).sum(1, dtype=gates.dtype)
        of_units = of_tokens.unflatten(-1, (-1, ctx.unit)).sum(-1)
        return dy if ctx.is_open else _scaled(dy, gates, ctx.unit), of_units, None, None


def _scaled(x: Tensor, gates: Tensor, unit: int) -> Tensor:
    of_units = gates.to(x.dtype).view(gates.shape[0], *[1] * (x.ndim - 2), -1, 1)
    return (x.unflatten(-1, (-1, unit)) * of_units).flatten(-2)


@contextmanager
def gated(model: nn.Module, probes: Sequence[Probe], values: Sequence[Tensor] | None = None) -> Iterator[Gates]:
    """Gate the input of every consumer; yields the dict that each forward pass fills with its gates.

    A module that the model calls several times in a pass (ALBERT's layers are one) has the same gates each time. To
    count the passes of the next batch alone, clear the dict. `values` are the gates of each probe, bool or float
    [units]; None opens all gates of whatever arrives.
    """
    gates: Gates = {}
    router = attached(model).router
    activations = {probe.consumer: probe.consumer.activation for probe in probes}

    def hook(number: int, probe: Probe, value: Tensor | None) -> Callable[..., tuple[Any, ...]]:
        def gate(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # The gate stands behind the activation, also where the module computes it: it is taken out meanwhile.
            x = activate(inputs[0], activations[probe.consumer])
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (x.shape[0], x.shape[-1] // probe.unit)
            here, there = router.running.route, gates.get(number)
            if here is None or there is None or there.route is not here or there.values.shape != shape:
                own = torch.ones(shape, dtype=dtype, device=x.device)
                if value is not None:
                    own *= value.to(x.device)
                packed = probe.consumer.packs_in(probe.consumer.router.current())
                there = Gate(own.requires_grad_(), packed, here, 1 if there is None else there.passes + 1)
                gates[number] = there
            return (_Gate.apply(x, there.values, probe.unit, value is None), *inputs[1:])

        return gate

    handles = []
    try:
        for consumer in activations:
            consumer.activation = NONE
        for number, probe in enumerate(probes):
            value = None if values is None else values[number]
            handles.append(probe.consumer.register_forward_pre_hook(hook(number, probe, value)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()
        for consumer, activation in activations.items():
            consumer.activation = activation


def gate_gradients(losses: Tensor, gates: Gates, probes: Sequence[Probe]) -> tuple[Tensor, ...]:
    """The derivative of each example's loss [B] with respect to its gates, those of `gated`: [B, units] of each probe.

    ValueError: losses of another shape, or of a model that ran not once but never or several times.
    """
    if losses.ndim != 1:
        raise ValueError(f"expected one loss for each example, [batch], given shape {tuple(losses.shape)}")
    if [gates[number].passes for number in sorted(gates)] != [1] * len(probes):
        ran = sum(gate.passes for gate in gates.values()) / len(probes)
        raise ValueError(f"loss(batch) must run the model once, it ran it {ran:g} times")
    of_probes = [gates[number].values for number in range(len(probes))]
    if of_probes[0].shape[0] != losses.shape[0]:
        raise ValueError(f"loss(batch) gave {losses.shape[0]} losses, its model {of_probes[0].shape[0]} examples")
    return torch.autograd.grad(losses.sum(), of_probes)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for parameters: the weight gradients would cost half of the backward pass."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
