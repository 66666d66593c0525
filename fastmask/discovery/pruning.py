"""Static discovery: find a language's subnetwork by iterative pruning.

Score the live units, drop the least important tenth of all, score again with the rest, and stop before the development
metric falls below tau times that of the full network (Michel et al. 2019; Prasanna et al. 2020). Pruned units are
skipped, not multiplied by zero, so every round is cheaper than the one before. A language without development data goes
by its loss on the examples that units are scored on, which is ours.

Scores that are not gradients rank the units of the full network once, for all languages; pruning then goes down that
ranking without scoring again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.entropy import entropy
from fastmask.discovery.importance import Importance, importance
from fastmask.discovery.quality import Quality, attached_to, measured
from fastmask.discovery.relative import relative
from fastmask.discovery.shapley import shapley
from fastmask.errors import unknown
from fastmask.models.attach import attached, is_attached
from fastmask.models.editing import set_subnetwork
from fastmask.subnetworks.subnetworks import UNITS, Subnetworks

__all__ = ["COMPARING", "RANKINGS", "SCORES", "Round", "discover", "live_units"]

COMPARING = {"entropy": entropy, "relative": relative}
"""Scores that compare languages: of some of them alone they are not those of all."""

RANKINGS: dict[str, Callable[..., dict[str, Importance]]] = {**COMPARING, "shapley": shapley}
"""Scores that are taken once: of the attached full network, each language's batches, and the loss."""

SCORES = ("gradient", *RANKINGS)


@dataclass(frozen=True)
class Round:
    """What one round of pruning left: live units, and how good they are; `kept` is False where that fell too far."""

    language: str
    number: int  # 0 is the full network
    heads: int | None
    neurons: int | None
    quality: Quality  # empty where pruning goes to a density
    kept: bool


_KINDS = ("heads", "neurons")
_Masks = dict[str, Tensor]  # "heads", "neurons" or both -> bool [layers, units]


def discover(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    loss: Callable[[Any], Tensor],
    metric: Callable[[str], float | None] | None = None,
    *,
    score: str = "gradient",
    units: str = "heads",
    tau: float = 0.95,
    density: float | None = None,
    drop: float | None = None,
    on_round: Callable[[Round], None] | None = None,
    on_scores: Callable[[str, Importance], None] | None = None,
) -> Subnetworks:
    """Find one subnetwork for each language.

    Args:
        model: a plain Hugging Face model (nothing attached), fine-tuned on the task. It comes back as it was.
        batches: for each language the batches its units are scored on; read once or twice a round.
        loss: runs `model` on a batch -> one loss for each example, [B]; called inside `fastmask.language`.
        metric: the development metric of a language, higher is better; called inside `fastmask.language` with
            the masks of the round. Needed unless `density` is given. None for a language that has no development data:
            it goes by its mean loss on `batches` instead (`Quality.keeps` says how far).
        score: by what units are ranked. "gradient": `importance`, taken again in every round. "entropy": how much a
            unit's activity is the language's own (`entropy`; needs two languages). "relative": how much more it matters
            to the language than to the others (`relative`; needs two). "shapley": what a head is worth beside others
            (`shapley`; heads only). These are taken once, of the full network.
        units: "heads", "neurons" or "both"; each kind is ranked on its own.
        tau: the share of the full network's metric that a subnetwork must keep.
        density: prune to this share of the units instead of down to tau.
        drop: share of all units dropped in a round, at least one. 0.1 if not given, as published, and 0.2 towards a
            density, where rounds are of one size near this: half of the time, and masks as good (docs/log).
        on_round: called after each round.
        on_scores: called with each language and the last score of each of its units, float32 [layers, units]: that by
            which it was dropped, or by which it was not (0 where nothing was ever scored).

    Returns:
        Subnetworks over the languages of `batches`, in their order, with at least one unit in every layer.

    Raises:
        ValueError: an option out of range, subnetworks attached already, no metric where tau needs one, or a score that
            is not for these languages or units.
        KeyError: an unknown kind of unit or score.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    if units not in UNITS:
        raise unknown("kind of unit", units, UNITS)
    if drop is None:
        drop = 0.1 if density is None else 0.2
    if not 0 < drop < 1:
        raise ValueError(f"drop must be between 0 and 1, given {drop}")
    if density is None and metric is None:
        raise ValueError("pruning down to tau needs a development metric; give metric or density")
    if density is None and not 0 < tau <= 1:
        raise ValueError(f"tau must be above 0 and at most 1, given {tau}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, given {density}")
    if not batches:
        raise ValueError("no language to find a subnetwork for")
    if is_attached(model):
        raise ValueError("this model has subnetworks attached: call fastmask.detach(model) first")

    found = []
    with attached_to(model, Subnetworks.full(model, list(batches), units)):
        rankings = RANKINGS[score](model, batches, loss) if score in RANKINGS else {}
        for name, scoring in batches.items():
            pruner = _Pruner(model, name, scoring, loss, metric, drop, on_round, rankings.get(name))
            masks = pruner.to_density(density) if density is not None else pruner.to_tau(tau)
            own = {kind: keep[None] for kind, keep in masks.items()}
            found.append(Subnetworks([name], own.get("heads"), own.get("neurons")))
            if on_scores is not None:
                on_scores(name, Importance(**pruner.scores))
    return Subnetworks.stack(found)


def live_units(density: float, layers: int, units: int) -> int:
    """How many of layers x units a density keeps: at least one in each layer."""
    return max(layers, round(density * layers * units))


class _Pruner:
    """The rounds of one language, whose subnetwork in the attached model follows them."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        metric: Callable[[str], float | None] | None,
        drop: float,
        on_round: Callable[[Round], None] | None,
        ranking: Importance | None,
    ) -> None:
        self.model, self.name, self.batches, self.loss, self.metric = model, name, batches, loss, metric
        self.drop, self.on_round, self.ranking = drop, on_round, ranking
        subnets = attached(model).subnets.select([name])
        self.masks: _Masks = {kind: keep[0] for kind in _KINDS if (keep := getattr(subnets, kind)) is not None}
        self.scores = {kind: torch.zeros(keep.shape) for kind, keep in self.masks.items()}

    def to_tau(self, tau: float) -> _Masks:
        full = self._measure(self.masks)
        self._report(0, self.masks, full, True)
        number = 0
        while True:
            number += 1
            smaller = self._pruned(self._steps())
            if _counts(smaller) == _counts(self.masks):
                return self.masks  # one unit left in every layer
            value = self._measure(smaller)
            kept = value.keeps(tau, full)
            self._report(number, smaller, value, kept)
            if not kept:
                return self.masks
            self.masks = smaller

    def to_density(self, density: float) -> _Masks:
        surplus = {kind: int(keep.sum()) - live_units(density, *keep.shape) for kind, keep in self.masks.items()}
        # Rounds of one size: a last one for what is left over would cost as much as any other.
        rounds = max(math.ceil(surplus[kind] / step - 0.5) for kind, step in self._steps().items())
        rounds = max(rounds, int(max(surplus.values()) > 0))
        for number in range(1, rounds + 1):
            drops = {kind: math.ceil(count / (rounds - number + 1)) for kind, count in surplus.items()}
            surplus = {kind: count - drops[kind] for kind, count in surplus.items()}
            self.masks = self._pruned({kind: max(0, count) for kind, count in drops.items()})
            self._report(number, self.masks, Quality(), True)
        return self.masks

    def _steps(self) -> dict[str, int]:
        return {kind: max(1, int(self.drop * keep.numel())) for kind, keep in self.masks.items()}

    def _pruned(self, drops: Mapping[str, int]) -> _Masks:
        """The current masks without the `drops` least important units of each kind."""
        set_subnetwork(self.model, self.name, **self.masks)
        scores = self.ranking or importance(self.model, self.batches, self.loss, self.name)
        smaller = {}
        for kind, keep in self.masks.items():
            score: Tensor = getattr(scores, kind)
            self.scores[kind] = torch.where(keep, score, self.scores[kind])
            smaller[kind] = _without_lowest(keep, score, drops[kind])
        return smaller

    def _measure(self, masks: _Masks) -> Quality:
        set_subnetwork(self.model, self.name, **masks)
        return measured(self.model, self.name, self.batches, self.loss, self.metric)

    def _report(self, number: int, masks: _Masks, value: Quality, kept: bool) -> None:
        if self.on_round is not None:
            counts = _counts(masks)
            self.on_round(Round(self.name, number, counts.get("heads"), counts.get("neurons"), value, kept))


def _counts(masks: _Masks) -> dict[str, int]:
    return {kind: int(keep.sum()) for kind, keep in masks.items()}


def _without_lowest(keep: Tensor, score: Tensor, count: int) -> Tensor:
    """The mask without its `count` least important units."""
    candidates = score.masked_fill(~keep, float("inf"))
    # The best unit of each layer stays, whatever the others of the network score.
    best = score.masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
    candidates.scatter_(1, best, float("inf"))
    order = candidates.flatten().argsort(stable=True)[:count]
    order = order[torch.isfinite(candidates.flatten()[order])]
    smaller = keep.flatten().clone()
    smaller[order] = False
    return smaller.view_as(keep)
