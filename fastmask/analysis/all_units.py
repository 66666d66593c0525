"""One language's subnetwork, computed with all units of the model.

A dead unit is normally not computed, so nobody knows what it would be worth. Here every unit is computed, and
multiplied by a gate, 1 where the language owns it and 0 where it does not. The function is that of the language's
subnetwork, but its derivative with respect to the gates exists for the dead units as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.discovery.gates import Probe, frozen, gate_gradients, gated, probes_of
from fastmask.models.attach import attached, language
from fastmask.models.layers import AttachedLinear
from fastmask.models.routing import Route, Router

__all__ = ["GateGradients", "all_gate_gradients", "all_units_computed"]


@dataclass(frozen=True)
class GateGradients:
    """Gradients of gates by kind of unit ("heads", "neurons"): sums over examples, float64 [layers, units], on CPU.

    Attributes:
        examples: how many examples were summed.
        absolute: sum of |dL_example / dgate|.
        signed: sum of dL_example / dgate; negative where more of the unit lowers the loss.
    """

    examples: int
    absolute: dict[str, Tensor]
    signed: dict[str, Tensor]


def all_gate_gradients(
    model: nn.Module, language_name: str, batch: Any, loss: Callable[[Any], Tensor]
) -> GateGradients:
    """Gradients of the gates of all units, live and dead, of one language's subnetwork.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached. It is put in eval mode for
            the time of the call, and its parameters get no gradient.
        language_name: one of the attached subnetworks' languages.
        batch: what `loss` takes; a few examples, all of this language.
        loss: runs `model` on the batch, once, and returns one loss for each example, [B]. It must not give
            `language_ids`: it is called inside `fastmask.language(model, language_name)`.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: subnetworks over weights only, or a loss of another shape.
        FloatingPointError: a gradient is not finite.
    """
    subnets = attached(model).subnets
    row = subnets.index(language_name)
    probes = probes_of(model)
    if not probes:
        raise ValueError("gates need subnetworks over heads or neurons; these have only weights")
    values = [getattr(subnets, probe.kind)[row, probe.layer, : probe.units] for probe in probes]
    with (
        frozen(model),
        language(model, language_name),
        all_units_computed(model),
        gated(model, probes, values) as gates,
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),  # a compiled model would be compiled again for the gates
    ):
        losses = loss(batch)
        grads = [grad.double() for grad in gate_gradients(losses, gates, probes)]
    found = GateGradients(
        losses.shape[0],
        _by_kind(probes, [grad.abs().sum(0) for grad in grads]),
        _by_kind(probes, [grad.sum(0) for grad in grads]),
    )
    if not all(bool(sums.isfinite().all()) for sums in found.absolute.values()):
        raise FloatingPointError(f"scoring {language_name!r}: the loss or a gradient of it is not finite")
    return found


@contextmanager
def all_units_computed(model: nn.Module) -> Iterator[None]:
    """Let the layers of heads and neurons run the full network; masks over single weights stay in force."""
    full = Router(attached(model).subnets.languages)
    full.running.route = Route(-1, (-1,))
    layers = [m for m in model.modules() if isinstance(m, AttachedLinear) and m.unit is not None]
    routers = [layer.router for layer in layers]
    for layer in layers:
        layer.router = full
    try:
        yield
    finally:
        for layer, router in zip(layers, routers, strict=True):
            layer.router = router


def _by_kind(probes: Sequence[Probe], sums: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack what belongs to the layers of each kind of unit."""
    layers: dict[str, list[Tensor]] = {}
    for probe, of_layer in zip(probes, sums, strict=True):
        layers.setdefault(probe.kind, []).append(of_layer)
    most = {kind: max(map(len, of_kind)) for kind, of_kind in layers.items()}
    return {
        kind: torch.stack([F.pad(of_layer, (0, most[kind] - len(of_layer))) for of_layer in of_kind]).cpu()
        for kind, of_kind in layers.items()
    }
