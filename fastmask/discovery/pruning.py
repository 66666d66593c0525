"""Static discovery: find a language's subnetwork by iterative pruning, in one draw or several.

Score the live units, drop the least important tenth of all, score again with the rest, and stop before the development
metric falls below tau times that of the full network (Michel et al. 2019; Prasanna et al. 2020). Pruned units are
skipped, not multiplied by zero, so every round is cheaper than the one before. A language without development data goes
by its loss on the examples that units are scored on, which is ours.

Scores that are not gradients rank the units of the full network once, for all languages; pruning then goes down that
ranking without scoring again.

One draw of scoring examples is noisy: `combine` joins the subnetworks of several draws, or of several models, by vote,
and `stability` says how noisy they are. Draws of one language must agree more than those of two, or a mask is no
language's own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen
from fastmask.discovery.scores import COMPARING, RANKINGS, SCORES, Gather, Importance, importance
from fastmask.errors import unknown
from fastmask.models.attach import attach, attached, detach, is_attached, language
from fastmask.models.editing import set_subnetwork
from fastmask.subnetworks.subnetworks import KINDS, UNITS, Subnetworks


@dataclass(frozen=True)
class Round:
    """What one round of pruning left, and how good it is."""

    language: str
    number: int  # 0 is the full network
    units: dict[str, int]  # live ones by kind ("heads", "neurons")
    value: float | None  # the metric on development data, or the loss; None where pruning goes to a density
    by_loss: bool  # whether it is the mean loss on the scoring examples, as without development data
    kept: bool  # False where it fell, or the loss rose, too far


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
    gather: Gather | None = None,
) -> Subnetworks:
    """Find one subnetwork for each language.

    Args:
        model: a plain Hugging Face model (nothing attached), fine-tuned on the task. It comes back as it was.
        batches: for each language the batches its units are scored on; read once or twice a round.
        loss: runs `model` on a batch -> one loss for each example, [B]; called inside `fastmask.language`.
        metric: the development metric of a language, higher is better; called inside `fastmask.language` with
            the masks of the round. Needed unless `density` is given. None for a language that has no development data:
            it goes by its mean loss on `batches` instead, as does, with a warning, one whose full network has a metric
            that is not above 0. The loss may rise by -ln(tau), 0.05 at tau = 0.95: where it is a cross entropy, the
            likelihood exp(-loss) is then at least tau times as large.
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
        gather: where several processes each find the subnetworks of some languages, and the score compares languages:
            called once, in every process, with what this one measured, float [layers, units] by kind for each language
            of `batches`; returns that of all languages, in the same order in every process.

    Returns:
        Subnetworks over the languages of `batches`, in their order, with at least one unit in every layer.

    Raises:
        ValueError: an option out of range, subnetworks attached already, no metric where tau needs one, or a score that
            is not for these languages or units.
        KeyError: an unknown kind of unit or score.
        FloatingPointError: scores of units that are not finite.
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
    name, share = ("tau", tau) if density is None else ("density", density)
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, given {share}")
    if not batches:
        raise ValueError("no language to find a subnetwork for")
    if is_attached(model):
        raise ValueError("this model has subnetworks attached: call fastmask.detach(model) first")

    def prune(name: str, scoring: Iterable[Any], ranking: Importance | None) -> tuple[Subnetworks, Importance]:
        """One language's subnetwork, and the last score of each unit; that in the attached model follows the rounds."""
        by_loss = False

        def measured(masks: _Masks) -> float | None:
            nonlocal by_loss
            set_subnetwork(model, name, **masks)
            if metric is None or density is not None:
                return None
            with language(model, name):
                if not by_loss and (value := metric(name)) is not None:
                    return float(value)
                by_loss = True
                with frozen(model), torch.no_grad():
                    return float(torch.cat([loss(batch) for batch in scoring]).mean())

        def report(number: int, masks: _Masks, value: float | None, kept: bool = True) -> None:
            if on_round is not None:
                units = {kind: int(keep.sum()) for kind, keep in masks.items()}
                on_round(Round(name, number, units, value, by_loss, kept))

        masks = {kind: keep[0] for kind, keep in attached(model).subnets.select([name]).units.items()}
        last = {kind: torch.zeros(keep.shape, device=keep.device) for kind, keep in masks.items()}
        full = measured(masks)
        if full is not None and not by_loss and not full > 0:  # of which no share says anything
            warnings.warn(
                f"{name}: the metric of the full network is {full:g} (expected one above 0, higher is better): "
                "pruning goes by the loss on the scoring examples",
                stacklevel=3,
            )
            by_loss = True
            full = measured(masks)
        if density is None:
            report(0, masks, full)
        for number, drops in enumerate(_rounds(masks, drop, density), start=1):
            scores = ranking or importance(model, scoring, loss, name)
            for kind, keep in masks.items():
                if not bool(torch.isfinite(scores[kind][keep]).all()):
                    raise FloatingPointError(f"{name}: scores of {kind} are not finite, as the loss or its gradient")
            last = {kind: torch.where(keep, scores[kind], last[kind]) for kind, keep in masks.items()}
            smaller = {kind: _without_lowest(keep, scores[kind], drops[kind]) for kind, keep in masks.items()}
            if all(torch.equal(smaller[kind], keep) for kind, keep in masks.items()):
                break  # one unit left in every layer
            value = measured(smaller)
            kept = value is None or full is None or (value <= full - math.log(tau) if by_loss else value >= tau * full)
            report(number, smaller, value, kept)
            if not kept:
                break
            masks = smaller
        return Subnetworks.of([name], {kind: keep[None] for kind, keep in masks.items()}), last

    found = []
    attach(model, Subnetworks.full(model, list(batches), units))
    try:
        more = {"gather": gather} if score in COMPARING else {}
        rankings = RANKINGS[score](model, batches, loss, **more) if score in RANKINGS else {}
        for name, scoring in batches.items():
            subnets, scores = prune(name, scoring, rankings.get(name))
            found.append(subnets)
            if on_scores is not None:
                on_scores(name, scores)
    finally:
        detach(model)
    return Subnetworks.stack(found)


def live_units(density: float, layers: int, units: int) -> int:
    """How many of the units of all layers together a density keeps: at least one in each layer."""
    return max(layers, round(density * units))


_Masks = dict[str, Tensor]  # "heads", "neurons" or both -> bool [layers, units]


def _rounds(masks: _Masks, drop: float, density: float | None) -> Iterator[dict[str, int]]:
    """How many units of each kind each round drops: without a density always as many."""
    steps = {kind: max(1, int(drop * int(keep.sum()))) for kind, keep in masks.items()}
    if density is None:
        yield from itertools.repeat(steps)
        return
    # Of the units that there are: layers may have different numbers of them.
    surplus = {
        kind: max(0, int(keep.sum()) - live_units(density, len(keep), int(keep.sum()))) for kind, keep in masks.items()
    }
    # Rounds of one size: a last one for what is left over would cost as much as any other.
    rounds = max(math.ceil(surplus[kind] / step - 0.5) for kind, step in steps.items())
    for left in range(max(rounds, int(any(surplus.values()))), 0, -1):
        drops = {kind: math.ceil(count / left) for kind, count in surplus.items()}
        surplus = {kind: count - drops[kind] for kind, count in surplus.items()}
        yield drops


def _without_lowest(keep: Tensor, score: Tensor, count: int) -> Tensor:
    """The mask without its `count` least important units; the best unit of each layer stays."""
    best = score.masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
    candidates = score.masked_fill(~keep, torch.inf).scatter(1, best, torch.inf).flatten()
    order = candidates.argsort(stable=True)[:count]
    smaller = keep.flatten().clone()
    smaller[order[torch.isfinite(candidates[order])]] = False
    return smaller.view_as(keep)


# ---- several draws


VOTES = ("majority", "union", "intersection", "most")


@dataclass(frozen=True)
class Draw:
    """What one call of `discover` found."""

    subnetworks: Subnetworks  # of some languages of one model, or all
    scores: Mapping[str, Importance]  # language -> what `discover` gave to `on_scores`


def combine(draws: Sequence[Draw], vote: str = "majority") -> Subnetworks:
    """Combine what several draws found for the units of one model.

    A language's subnetwork comes from the draws that have it: draws may be over the same languages, or each over one,
    found in a model that was fine-tuned on that language alone. Units are ordered by the number of draws that keep them
    and, with equal votes, by their mean score over the draws. The best unit of every layer always stays.

    Args:
        draws: one or more, over the same units.
        vote: "majority" keeps a unit that more than half of the draws keep (of two draws: both, as a tie is no
            majority), "union" any, "intersection" all of them. The result is of whatever size this gives. "most" keeps
            as many units as a draw does on average, the first ones in that order: draws of one density give a result
            of this density.

    Returns:
        Subnetworks of all languages, in the order in which the draws name them first.

    Raises:
        KeyError: an unknown vote.
        ValueError: nothing to combine, or draws over different units.
    """
    if vote not in VOTES:
        raise unknown("vote", vote, VOTES)
    if not draws:
        raise ValueError("no subnetworks to combine")
    shapes = [{kind: keep.shape[1:] for kind, keep in draw.subnetworks.units.items()} for draw in draws]
    for kind in KINDS:
        if len({shape.get(kind) for shape in shapes}) > 1:
            raise ValueError(f"cannot combine subnetworks over different {kind}")
    names = dict.fromkeys(name for draw in draws for name in draw.subnetworks.languages)
    return Subnetworks.stack([_combined(name, draws, vote) for name in names])


def _combined(name: str, draws: Sequence[Draw], vote: str) -> Subnetworks:
    """One language's subnetwork."""
    own = [draw for draw in draws if name in draw.subnetworks.languages]
    masks = [draw.subnetworks.select([name]).units for draw in own]
    kept = {}
    for kind in masks[0]:
        votes = torch.stack([mask[kind][0] for mask in masks]).sum(0)
        score = torch.stack([draw.scores[name][kind] for draw in own]).double().mean(0)
        kept[kind] = _kept(votes, len(own), score, vote)[None]
    return Subnetworks.of([name], kept)


def _kept(votes: Tensor, draws: int, scores: Tensor, vote: str) -> Tensor:
    """One language's mask, bool [layers, units], of how many draws keep each unit and of its mean score."""
    order = scores.flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    key = (votes.flatten() * len(order) + rank).view_as(votes)  # no two units have the same
    best = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, key.argmax(1, keepdim=True), True)
    if vote == "most":
        count = max(len(votes), round(int(votes.sum()) / draws))
    else:
        elected = {"majority": 2 * votes > draws, "union": votes > 0, "intersection": votes == draws}[vote]
        count = int((elected | best).sum())
    first = key.masked_fill(best, int(key.max()) + 1).flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(votes.numel(), dtype=torch.bool, device=votes.device).scatter_(0, first, True).view_as(votes)


@dataclass(frozen=True)
class Stability:
    """How much masks of single draws agree: mean Jaccard similarities, |A and B| / |A or B|."""

    draws: float | None  # of two draws of one language, mean over languages; None where no language has two
    languages: float | None  # of draws of two languages; None where there is one language
    chance: float  # expected of random masks that keep as many units in every layer as these


def stability(draws: Sequence[Draw]) -> dict[str, Stability]:
    """By kind of unit ("heads", "neurons"), how much single draws agree within a language and between two.

    Chance is (sum of a * b / n over layers) / (units in either), of masks with a and b of a layer's n units: the
    expectation of the intersection is exact, that of the quotient to first order.

    Raises:
        ValueError: fewer than two masks, of one language or several.
    """
    names = [name for draw in draws for name in draw.subnetworks.languages]
    if len(names) < 2:
        raise ValueError(f"expected two masks or more to compare, given {len(names)}")
    distinct = list(dict.fromkeys(names))
    number = torch.tensor([distinct.index(name) for name in names], device="cpu")
    first, second = torch.triu_indices(len(names), len(names), 1)  # of each pair
    same = number[first] == number[second]
    found = {}
    for kind in draws[0].subnetworks.units:
        keep = torch.cat([draw.subnetworks.units[kind] for draw in draws]).double()
        flat, counts, sizes = keep.flatten(1), keep.sum(2), keep.sum((1, 2))
        both, chance = flat @ flat.t(), counts @ counts.t() / keep.shape[2]
        agreement, by_chance = (
            shared[first, second] / (sizes[first] + sizes[second] - shared[first, second]) for shared in (both, chance)
        )
        within = [agreement[same & (number[first] == own)] for own in range(len(distinct))]
        known = [float(values.mean()) for values in within if len(values)]
        between = agreement[~same]
        found[kind] = Stability(
            fmean(known) if known else None, float(between.mean()) if len(between) else None, float(by_chance.mean())
        )
    return found
