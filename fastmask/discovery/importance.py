"""How much each live head and neuron matters to a language: the score that pruning drops units by.

I_h = mean over sentences of |dL_sentence / d xi_h|, where xi_h is a gate that multiplies the output of unit h, at 1
(Michel, Levy and Neubig 2019). Every sentence has gates of its own, so one backward pass gives each sentence's
derivative and the score does not depend on how sentences fall into batches. Scores are then divided by the L2 norm of
their layer, so that layers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen, gate_gradients, gated, probes_of
from fastmask.models.attach import attached, language

__all__ = ["Importance", "importance"]


@dataclass(frozen=True)
class Importance:
    """Scores of the live units, float32; dead units have 0. None for a kind of unit that is not masked."""

    heads: Tensor | None = None  # [layers, heads]
    neurons: Tensor | None = None  # [layers, ffn]


def importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], language_name: str
) -> Importance:
    """Score every live unit of one language.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached; skipped units cost nothing
            here either. It is put in eval mode for the time of the call: dropout would add noise to the scores.
        batches: what `loss` takes; one language each, any sizes.
        loss: runs `model` on a batch and returns one loss for each example, [B]. It must not give `language_ids`:
            it is called inside `fastmask.language(model, language_name)`.
        language_name: one of the attached subnetworks' languages.

    Returns:
        Scores >= 0; within a layer they have L2 norm 1.

    Raises:
        ValueError: no batch, or a loss of another shape.
    """
    subnets = attached(model).subnets
    row = subnets.index(language_name)
    probes = probes_of(model)
    if not probes:
        raise ValueError("importance needs subnetworks over heads or neurons; these have only weights")

    lives = [getattr(subnets, probe.kind)[row, probe.layer].nonzero().flatten().cpu() for probe in probes]
    totals = [torch.zeros(len(live), dtype=torch.float64) for live in lives]
    sentences = 0
    with (
        frozen(model),
        language(model, language_name),
        gated(model, probes) as gates,
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),  # a compiled model would be compiled again for the gates
    ):
        for batch in batches:
            gates.clear()
            losses = loss(batch)
            grads = gate_gradients(losses, gates, probes)
            sentences += losses.shape[0]
            for gate, live, total in zip(sorted(gates, key=lambda gate: gate.number), lives, totals, strict=True):
                summed = grads[gate.number].abs().sum(0).cpu()
                # Slot j of a packed activation is the j-th live unit; slots behind them belong to no unit.
                total += summed[: len(live)] if gate.packed else summed[live]
    if not sentences:
        raise ValueError(f"no batch to score the units of {language_name!r} on")

    kinds = dict.fromkeys(probe.kind for probe in probes)
    scores = {kind: torch.zeros(getattr(subnets, kind).shape[1:]) for kind in kinds}
    for probe, live, total in zip(probes, lives, totals, strict=True):
        mean = total.float() / sentences
        scores[probe.kind][probe.layer, live] = mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
    return Importance(**scores)
