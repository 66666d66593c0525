"""What the units of a model are worth to a language: the scores that pruning drops them by.

`importance` is taken of the live units, again in every round. The others rank the units of the full network once, for
all languages: `relative` and `entropy` say whose a unit is, `shapley` what a head is worth beside others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen, gate_gradients, gated, probes_of
from fastmask.models.attach import attached, language, owner_of
from fastmask.models.structure import UnitGroup

RARE = 0.01
"""Added to how often a neuron is active: of one active on fewer tokens, chance decides which language has the most."""

Batches = Mapping[str, Iterable[Any]]  # by language, the batches that its units are scored on
BatchLoss = Callable[[Any], Tensor]  # runs the model on a batch -> one loss for each example, [B]


Importance = dict[str, Tensor]
"""Scores of units, float32 [layers, units], by kind ("heads", "neurons"); dead units have 0."""

Gather = Callable[[dict[str, Importance]], dict[str, Importance]]
"""What one process measured of its languages, by name -> what all did, in one order everywhere."""


def importance(model: nn.Module, batches: Iterable[Any], loss: BatchLoss, language_name: str) -> Importance:
    """Score every live unit of one language by the gradient of its gate.

    I_h = mean over examples of |dL_example / d xi_h|, where the gate xi_h, at 1, multiplies the output of unit h
    (Michel, Levy and Neubig 2019). Every example has gates of its own, so scores do not depend on how examples fall
    into batches. They are divided by the L2 norm of their layer, so that layers can be compared.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached; skipped units cost nothing
            here either. It is put in eval mode for the time of the call: dropout would add noise to the scores.
        batches: what `loss` takes; one language each, any sizes.
        loss: runs `model` on a batch and returns one loss for each example, [B]. It must not give `language_ids`:
            it is called inside `fastmask.language(model, language_name)`.
        language_name: one of the attached subnetworks' languages.

    Returns:
        Scores >= 0 by kind of unit ("heads", "neurons"), float32 [layers, units] on the CPU; those of a layer have L2
        norm 1, dead units have 0.

    Raises:
        ValueError: no batch, or a loss of another shape.
    """
    subnets = attached(model).subnets
    masks = {kind: keep[subnets.index(language_name)] for kind, keep in subnets.units.items()}
    probes = probes_of(model)
    if not probes:
        raise ValueError("importance needs subnetworks over heads or neurons; these have only weights")
    lives = [masks[probe.kind][probe.layer].nonzero().flatten().cpu() for probe in probes]
    totals = [torch.zeros(len(live), dtype=torch.float64, device="cpu") for live in lives]
    examples = 0
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
            examples += losses.shape[0]
            for number, (grad, live, total) in enumerate(zip(grads, lives, totals, strict=True)):
                summed = grad.abs().sum(0).cpu()
                # Slot j of a packed activation is the j-th live unit; slots behind them belong to no unit.
                total += summed[: len(live)] if gates[number].packed else summed[live]
    if not examples:
        raise ValueError(f"no batch to score the units of {language_name!r} on")
    scores = {kind: torch.zeros(keep.shape, device="cpu") for kind, keep in masks.items()}
    for probe, live, total in zip(probes, lives, totals, strict=True):
        mean = total.float() / examples
        scores[probe.kind][probe.layer, live] = mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)
    return scores


def relative(
    model: nn.Module, batches: Batches, loss: BatchLoss, gather: Gather | None = None
) -> dict[str, Importance]:
    """How much more each unit of the full network matters to a language than to the others.

    A language's `importance` less the mean of the other languages' (the difference is ours): units that matter do so
    to most languages, whose masks come out alike. Scores add up to 0 over languages.

    Raises:
        ValueError: a single language, no batch of one, or a loss of another shape.
    """
    found = _of_all("relative", batches, gather, lambda name, scoring: importance(model, scoring, loss, name))
    sums = {kind: torch.stack([of[kind] for of in found.values()]).sum(0) for kind in attached(model).subnets.units}
    others = len(found) - 1
    return {name: {kind: of - (sums[kind] - of) / others for kind, of in own.items()} for name, own in found.items()}


def entropy(model: nn.Module, batches: Batches, loss: BatchLoss, gather: Gather | None = None) -> dict[str, Importance]:
    """How much the activity of each unit of the full network is one language's own, without any gradient.

    Language activation probability entropy (LAPE; Tang et al. 2024, arXiv 2402.16438) takes the probability p of each
    language that a neuron is active on a token, and keeps the neurons for which p, divided by its sum over languages,
    has a low entropy. A mask ranks every unit for every language, so a unit's score is what that entropy is made of:
    the language's share of the sum, from 0 to 1. A neuron is active where its (gate) projection is above zero. Heads
    have no such thing: the mean L2 norm of what a head hands on takes the place of p, which is ours.

    What `loss` returns is not read. Padding is left out where it calls the model with `attention_mask`, [B, T].

    Raises:
        ValueError: a single language, or no batch of one.
    """
    rates = _of_all("entropy", batches, gather, lambda name, scoring: _activity(model, name, scoring, loss))
    kinds = attached(model).subnets.units
    totals = {kind: torch.stack([of[kind] for of in rates.values()]).sum(0).clamp(min=1e-30) for kind in kinds}
    return {name: {kind: (rate / totals[kind]).float() for kind, rate in of.items()} for name, of in rates.items()}


def _activity(model: nn.Module, name: str, batches: Iterable[Any], loss: BatchLoss) -> dict[str, Tensor]:
    """Over tokens, the mean norm of each head, and how often each neuron is active, float64 [layers, units]."""
    state, owner = attached(model), owner_of(model)
    sums: dict[tuple[str, int], Any] = defaultdict(int)
    tokens: dict[tuple[str, int], int] = defaultdict(int)
    config: Any = owner.config
    get_decoder: Any = getattr(owner, "get_decoder", None)
    decoder = set(get_decoder().modules()) if getattr(config, "is_encoder_decoder", False) else set()
    # Of the running pass: bool [B, T], which tokens are no padding; in a decoder behind an encoder its own.
    present: dict[bool, Tensor | None] = {}

    def see_padding(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for of_decoder, prefix in ((False, ""), (True, "decoder_")):
            mask, ids = kwargs.get(f"{prefix}attention_mask"), kwargs.get(f"{prefix}input_ids")
            if mask is None and of_decoder and isinstance(ids, Tensor) and config.pad_token_id is not None:
                mask = ids != config.pad_token_id
                mask[:, 0] = True  # what it begins with may be the piece that fills up
            present[of_decoder] = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def add(group: UnitGroup, index: int, module: nn.Module, values: Tensor) -> None:
        """Add up values [B, ..., units] over tokens."""
        there = present.get(module in decoder)
        if there is not None and there.shape == values.shape[:-1]:
            values = values[there.to(values.device)]
        values = values.double().flatten(0, -2)
        sums[group.kind, index] += values.sum(0).cpu()
        tokens[group.kind, index] += len(values)

    def see_heads(group: UnitGroup, index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add(group, index, module, inputs[0].unflatten(-1, (group.units, -1)).float().norm(dim=-1))

    def see_neurons(group: UnitGroup, index: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        add(group, index, module, output[..., : group.units] > 0)  # gate first, where gate and up are in one

    with ExitStack() as stack:
        stack.callback(owner.register_forward_pre_hook(see_padding, with_kwargs=True).remove)
        for index, group, _ in state.structure.masked(state.subnets):
            if group.stacked:
                raise ValueError(f"neurons of experts cannot be scored ({group.name!r}): mask heads alone")
            if group.kind == "heads":
                consumer = owner.get_submodule(group.columns[0])
                handle = consumer.register_forward_pre_hook(partial(see_heads, group, index))
            else:
                producer = owner.get_submodule(next(iter(group.rows)))
                handle = producer.register_forward_hook(partial(see_neurons, group, index))
            stack.callback(handle.remove)
        with frozen(model), language(model, None), torch.no_grad():
            for batch in batches:
                loss(batch)
    if not sums:
        raise ValueError(f"no batch to score the units of {name!r} on")
    masks = state.subnets.units
    rates = {kind: torch.zeros(keep.shape[1:], dtype=torch.float64, device="cpu") for kind, keep in masks.items()}
    for (kind, index), total in sums.items():
        rates[kind][index, : len(total)] = total / tokens[kind, index] + (RARE if kind == "neurons" else 0.0)
    return rates


def shapley(
    model: nn.Module,
    batches: Batches,
    loss: BatchLoss,
    *,
    orders: int = 16,
    truncation: float = 0.5,
    seed: int = 0,
) -> dict[str, Importance]:
    """Estimate the Shapley value of every head of the full network, for each language, in units of the loss.

    That is the mean, over all orders in which heads are removed, of what the loss rises by when the head's turn comes
    (Shapley 1953; for pruning heads per language, Held and Yang 2023, "Shapley Head Pruning"); a gradient sees each
    head beside all others only. Orders are sampled. One ends early where the loss has risen far enough: nothing is
    learnt of heads that are removed from a ruin (truncation; Ghorbani and Zou 2019). A head below zero is harmful; one
    that no order came to has 0. All batches run once for each head and order, forward only: give few examples.

    Args:
        model: with subnetworks over heads attached, and nothing else; put in eval mode for the time of the call.
        batches: by language, what `loss` takes.
        loss: runs `model` on a batch, once, and returns one loss for each example, [B].
        orders: of removing the heads, the same for all languages; each odd one is the reverse of the one before.
        truncation: an order ends where the mean loss has risen by more than this share of what it rises by without any
            head; at 1, and where the loss falls without any head, none ends early, and the values of a language add up
            to that rise.
        seed: of the orders.

    Raises:
        ValueError: masks over anything but heads, or no batch of a language.
    """
    subnets = attached(model).subnets
    if [*subnets.units] != ["heads"]:
        raise ValueError("the score 'shapley' removes heads one by one, which takes too long for neurons: units heads")
    probes = probes_of(model)
    sizes = [probe.units for probe in probes]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(sum(sizes), generator=generator, device="cpu").tolist() for _ in range(-(-orders // 2))]
    removals = [order[::way] for order in drawn for way in (1, -1)][:orders]

    def values(name: str) -> Tensor:
        """Float64 [heads of all layers]."""
        alive = torch.ones(sum(sizes), device="cpu")  # the gates, which each pass reads
        sums, counts = torch.zeros(2, len(alive), dtype=torch.float64, device="cpu")
        with frozen(model), language(model, None), torch.no_grad(), gated(model, probes, alive.split(sizes)) as gates:

            def mean_loss() -> float:
                losses = []
                for batch in batches[name]:
                    gates.clear()
                    losses.append(loss(batch))
                if not losses:
                    raise ValueError(f"no batch to score the units of {name!r} on")
                return float(torch.cat(losses).double().mean())

            full = mean_loss()
            alive.zero_()
            rise = mean_loss() - full
            # Without any head the loss may be below the full one, as where they are harmful: there is no ruin to see.
            end = full + truncation * rise if truncation < 1 and rise > 0 else math.inf
            for order in removals:
                alive.fill_(1)
                before = full
                for head in order:
                    alive[head] = 0
                    after = mean_loss()
                    sums[head] += after - before
                    counts[head] += 1
                    before = after
                    if after > end:
                        break
        return sums / counts.clamp(min=1)

    found = {}
    for name in batches:
        scores = torch.zeros(subnets.units["heads"].shape[1:], device="cpu")
        for probe, of_layer in zip(probes, values(name).split(sizes), strict=True):
            scores[probe.layer, : probe.units] = of_layer
        found[name] = {"heads": scores}
    return found


def _of_all(
    score: str, batches: Batches, gather: Gather | None, measure: Callable[[str, Iterable[Any]], Importance]
) -> dict[str, Importance]:
    """What `measure` finds of each language of `batches`, and of those that other processes measure."""
    if gather is None:
        _check_several(score, batches)  # before anything is computed
    found = {name: measure(name, scoring) for name, scoring in batches.items()}
    if gather is not None:
        _check_several(score, found := gather(found))
    return found


def _check_several(score: str, languages: Mapping[str, Any]) -> None:
    if len(languages) < 2:
        raise ValueError(f"the score {score!r} compares languages: expected two or more, given {', '.join(languages)}")


COMPARING = {"entropy": entropy, "relative": relative}
"""Scores that compare languages: of some of them alone they are not those of all."""

RANKINGS: dict[str, Callable[..., dict[str, Importance]]] = {**COMPARING, "shapley": shapley}
"""Scores that are taken once: of the attached full network, each language's batches, and the loss."""

SCORES = ("gradient", *RANKINGS)
