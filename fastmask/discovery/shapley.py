"""The score `shapley`: what a head adds to a language's loss, averaged over the heads that are there beside it.

The gradient at a head's gate sees each head alone, beside all others. The Shapley value is the mean, over all orders in
which heads are removed, of what the loss rises by when the head's turn comes (Shapley 1953; for pruning heads per
language, Held and Yang 2023, "Shapley Head Pruning"). Orders are sampled, each together with its reverse; one ends
early where the loss has risen half of the way to that of a network without heads, as nothing is learnt of heads that
are removed from a ruin (truncation; Ghorbani and Zou 2019). A head below zero is harmful to the language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen, gated, probes_of
from fastmask.discovery.importance import Importance
from fastmask.models.attach import attached, language

__all__ = ["shapley"]

ORDERS = 16
TRUNCATION = 0.5


def shapley(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    *,
    orders: int = ORDERS,
    truncation: float = TRUNCATION,
    seed: int = 0,
) -> dict[str, Importance]:
    """Estimate the Shapley value of every head of the full network, for each language.

    It runs all batches of a language once for each head and order, forward only: give few examples.

    Args:
        model: with subnetworks over heads attached; put in eval mode for the time of the call.
        batches: by language, what `loss` takes.
        loss: runs `model` on a batch, once, and returns one loss for each example, [B].
        orders: of removing the heads; each odd one is the reverse of the one before.
        truncation: an order ends where the mean loss has risen by more than this share of what it rises by without any
            head; at 1, none ends early, and the values of a language add up to that rise.
        seed: of the orders, which are those of all languages.

    Returns:
        By language, the mean over the orders that came to a head, in units of the loss; 0 where none did.

    Raises:
        ValueError: masks over anything but heads, or no batch of a language.
    """
    subnets = attached(model).subnets
    if subnets.heads is None or subnets.neurons is not None:
        raise ValueError("the score 'shapley' removes heads one by one, which takes too long for neurons: units heads")
    probes = probes_of(model)
    places = [(number, unit) for number, probe in enumerate(probes) for unit in range(probe.units)]
    found = {}
    for name, scoring in batches.items():
        alive = [torch.ones(probe.units) for probe in probes]  # the gates, which each pass reads

        with (
            frozen(model),
            language(model, None),
            torch.no_grad(),
            gated(model, probes, alive) as gates,
        ):

            def mean_loss(scoring: Iterable[Any] = scoring, name: str = name, gates: Any = gates) -> float:
                losses = []
                for batch in scoring:
                    gates.clear()
                    losses.append(loss(batch))
                if not losses:
                    raise ValueError(f"no batch to score the units of {name!r} on")
                return float(torch.cat(losses).double().mean())

            full = mean_loss()
            for gate in alive:
                gate.zero_()
            end = full + truncation * (mean_loss() - full)
            sums = torch.zeros(len(places), dtype=torch.float64)
            counts = torch.zeros(len(places), dtype=torch.float64)
            generator = torch.Generator().manual_seed(seed)
            order: list[int] = []
            for number in range(orders):
                order = order[::-1] if number % 2 else torch.randperm(len(places), generator=generator).tolist()
                for gate in alive:
                    gate.fill_(1)
                before = full
                for place in order:
                    probe, unit = places[place]
                    alive[probe][unit] = 0
                    after = mean_loss()
                    sums[place] += after - before
                    counts[place] += 1
                    before = after
                    if truncation < 1 and after > end:
                        break
        scores = torch.zeros(subnets.heads.shape[1:])
        for place, value in enumerate((sums / counts.clamp(min=1)).tolist()):
            probe, unit = places[place]
            scores[probes[probe].layer, unit] = value
        found[name] = Importance(scores)
    return found
