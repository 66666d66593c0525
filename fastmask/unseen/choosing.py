"""Which subnetwork an unseen language takes: that of a training language, the union of all, or the full network.

`support_losses` and `with_union` need no `Task`: they work on any model that subnetworks are attached to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmask.errors import unknown
from fastmask.linear import MaskedLinear
from fastmask.masks import FULL
from fastmask.models.attach import attached
from fastmask.models.contexts import evaluating
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import full_like

if TYPE_CHECKING:
    from fastmask.tasks.task import Task

CHOICES = ("nearest", "best", "union", "full")
UNION = "union"


@dataclass(frozen=True)
class Choice:
    """The subnetwork that was chosen, and why.

    Attributes:
        language_id: its number in the subnetworks, -1 for the full network.
        name: a training language, "union" or "full".
        losses: what decided, for "best": mean support loss of each candidate, in order; else None.
        similarities: what decided, for "nearest": similarity of each training language; else None.
    """

    language_id: int
    name: str
    losses: dict[str, float] | None = None
    similarities: dict[str, float] | None = None


FULL_CHOICE = Choice(FULL, "full")


def with_union(subnets: Subnetworks) -> Subnetworks:
    """The same languages, and a last one named "union" that owns every unit that one of them owns.

    Raises:
        ValueError: a language is called "union".
    """
    return subnets.append(UNION, subnets.map(lambda keep: keep.any(0, keepdim=True), [UNION]))


def with_language(subnets: Subnetworks, name: str, choice: Choice, model: Any = None) -> Subnetworks:
    """The same languages, and a last one called `name` with the mask that was chosen for it.

    Everything is live for the full network (`model` says how much that is, where layers have different numbers of
    units); the union need not be one of `subnets`.

    Raises:
        ValueError: there is a language of that name.
        KeyError: the chosen language is none of `subnets`.
    """
    if choice.language_id == FULL:
        return subnets.append(name, full_like(subnets.select(subnets.languages[:1]), model))
    known = with_union(subnets) if choice.name == UNION and UNION not in subnets.languages else subnets
    return subnets.append(name, known.select([choice.name]))


def support_losses(
    model: nn.Module, batch: Any, candidates: Sequence[int], loss_per_sentence: Callable[[Any], Tensor]
) -> Tensor:
    """Mean loss of a support batch under each candidate subnetwork, all in one mixed-language forward pass.

    The batch is repeated once for each candidate, each copy with another language id. Runs with dropout off and without
    gradients, and leaves every module in the mode it was in.

    Args:
        model: subnetworks are attached to it or to a part of it.
        batch: B sentences: a mapping of tensors [B, ...] (other values are handed on as they are), or a dataclass with
            `lengths` [B] and a method `tiled(times)`. Their language ids, if there are any, are replaced.
        candidates: language ids, -1 for the full network.
        loss_per_sentence: runs the model on such a batch of n sentences, whose "language_ids" (int64 [n], on the
            CPU) it passes on to the model -> [n].

    Returns:
        float32 or wider [len(candidates)], on the device of the losses.

    Raises:
        ValueError: no candidate, a model without subnetworks, a language id out of range, or losses of another shape.
    """
    if not candidates:
        raise ValueError("no candidate subnetworks to score (expected at least one language id)")
    if any(number != FULL for number in candidates) and not any(isinstance(m, MaskedLinear) for m in model.modules()):
        raise ValueError("the model has no subnetworks attached: only the full network (-1) can be scored")
    repeated, n = _repeated(batch, candidates)
    with evaluating(model), torch.no_grad():
        losses = loss_per_sentence(repeated)
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        given = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(f"expected one loss for each of the {n} sentences, given {given}")
    return losses.view(len(candidates), -1).mean(1, dtype=torch.promote_types(losses.dtype, torch.float32))


def _repeated(batch: Any, numbers: Sequence[int]) -> tuple[Any, int]:
    """The batch once for each language id, with the ids; and how many sentences that makes.

    Ids stay on the CPU, where -1 may be among them (see `fastmask.models.routing.Route`).
    """
    times = len(numbers)
    if not isinstance(batch, Mapping):
        ids = torch.tensor(numbers, device="cpu").repeat_interleave(len(batch.lengths))
        return replace(batch.tiled(times), language_ids=ids), len(ids)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "language_ids"}
    sizes = {name: value.shape[0] if value.ndim else None for name, value in tensors.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(f"expected a batch of tensors [B, ...] of one size B, given sizes {sizes}")
    wide = {name: torch.cat([value] * times) for name, value in tensors.items()}
    ids = torch.tensor(numbers, device="cpu").repeat_interleave(len(next(iter(tensors.values()))))
    return {**batch, **wide, "language_ids": ids}, len(ids)


def choose(
    task: Task, subnets: Subnetworks, support: Any, how: str, *, similarity: Mapping[str, float] | None = None
) -> Choice:
    """Choose a subnetwork for an unseen language; ties go to the first training language in order.

    Args:
        task: its encoder has `subnets` attached; only "best" runs its model.
        subnets: of the training languages, and perhaps their union (`with_union`), which is a candidate for "union"
            only.
        support: `Examples` of the unseen language, for "best"; None or empty where there are none.
        how: "best": lowest mean support loss; "nearest": highest of `similarity`; "union"; "full".
        similarity: of each training language to the unseen one, for "nearest"; see `fastmask.unseen.typology` and
            `fastmask.tasks.data.head_direction`.

    Raises:
        KeyError: `how` is not one of `CHOICES`, or `similarity` lacks a training language.
        ValueError: "best" without support sentences, "nearest" without `similarity`, "union" without a union in
            `subnets`, losses or similarities that are not finite, or a model with other subnetworks attached.
    """
    if how not in CHOICES:
        raise unknown("way of choosing a subnetwork", how, CHOICES)
    if how == "full":
        return FULL_CHOICE
    if how == "union":
        if UNION not in subnets.languages:
            raise ValueError(f"the subnetworks hold no {UNION!r}: attach fastmask.unseen.with_union(subnets)")
        return Choice(subnets.index(UNION), UNION)
    names = [name for name in subnets.languages if name != UNION]
    if how == "nearest":
        if similarity is None:
            raise ValueError("choosing the nearest language needs the similarity of each training language, given none")
        for name in names:
            if name not in similarity:
                raise unknown("language", name, similarity)
        values = _finite("similarity", {name: float(similarity[name]) for name in names})
        nearest = max(values, key=values.__getitem__)  # the first of equals
        return Choice(subnets.index(nearest), nearest, similarities=values)
    if support is None or not len(support):
        raise ValueError(
            "choosing the best subnetwork needs support sentences, given none: choose nearest (by typology), union or "
            "full, which do without"
        )
    there = attached(task.encoder).subnets.languages
    if there != subnets.languages:
        raise ValueError(f"the model has subnetworks of {', '.join(there)} (expected {', '.join(subnets.languages)})")
    batch, ids = task.collate(support).to(task.device), [subnets.index(name) for name in names]
    losses = support_losses(task.model, batch, ids, lambda some: task.loss(some).each).tolist()
    values = _finite("support loss", dict(zip(names, losses, strict=True)))
    best = min(values, key=values.__getitem__)
    return Choice(subnets.index(best), best, losses=values)


def _finite(what: str, values: dict[str, float]) -> dict[str, float]:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"the {what} of {name!r} is {value} (expected a finite number)")
    return values
