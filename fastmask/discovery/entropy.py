"""The score `entropy`: how much a unit's activity is one language's own, without any gradient.

Language activation probability entropy (LAPE; Tang et al. 2024, arXiv 2402.16438) takes the probability p of each
language that a neuron is active on a token, and keeps the neurons for which p, divided by its sum over languages, has a
low entropy: a few languages hold most of the sum. A mask ranks every unit for every language, so a unit's score is what
that entropy is made of, the language's share of the sum. It says whose a unit is, not what it is worth: it compares
languages, goes to any density, and does not fall when other units are dropped.

A neuron is active where its (gate) projection is above zero, as ReLU, GELU and SiLU are then. Heads have no such thing:
the mean L2 norm of what a head hands on takes the place of p, which is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen
from fastmask.discovery.importance import Importance
from fastmask.models.attach import attached, language, owner_of
from fastmask.models.structure import UnitGroup

__all__ = ["entropy"]

RARE = 0.01
"""Added to every p: of neurons active on fewer tokens than this, chance decides which language has the most."""


def entropy(
    model: nn.Module, batches: Mapping[str, Iterable[Any]], loss: Callable[[Any], Tensor]
) -> dict[str, Importance]:
    """Score every unit of the full network for each language.

    Args:
        model: with subnetworks over heads, neurons or both attached; put in eval mode for the time of the call. Padding
            is left out where it is called with `attention_mask`, [B, T]; all tokens of a batch count otherwise.
        batches: of two languages or more, what `loss` takes.
        loss: runs `model` on a batch; what it returns is not read.

    Returns:
        By language, scores between 0 and 1 that add up to 1 over languages.

    Raises:
        ValueError: a single language, or no batch of one.
    """
    if len(batches) < 2:
        raise ValueError(f"the score 'entropy' compares languages: expected two or more, given {', '.join(batches)}")
    subnets = attached(model).subnets
    found: dict[str, dict[str, Tensor]] = {}
    for name, scoring in batches.items():
        with frozen(model), language(model, None), torch.no_grad(), _Activity(model).watching() as activity:
            for batch in scoring:
                loss(batch)
            if not activity.sums:
                raise ValueError(f"no batch to score the units of {name!r} on")
            found[name] = {
                kind: activity.rates(kind, getattr(subnets, kind).shape[1:])
                for kind in ("heads", "neurons")
                if getattr(subnets, kind) is not None
            }
    every = list(found.values())
    totals = {kind: torch.stack([rates[kind] for rates in every]).sum(0).clamp(min=1e-30) for kind in every[0]}
    return {
        name: Importance(**{kind: (rate / totals[kind]).float() for kind, rate in rates.items()})
        for name, rates in found.items()
    }


class _Activity:
    """Sums over the tokens of all passes: of each head's norm, and of how often each neuron is active."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[tuple[str, int], float] = {}
        self.present: Tensor | None = None  # of the running pass: bool [B, T], which tokens are no padding

    @contextmanager
    def watching(self) -> Iterator[_Activity]:
        """See every pass of the model."""
        state, owner = attached(self.model), owner_of(self.model)
        with ExitStack() as stack:

            def see_padding(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                mask = kwargs.get("attention_mask")
                self.present = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

            stack.callback(owner.register_forward_pre_hook(see_padding, with_kwargs=True).remove)
            for index, group, _ in state.structure.masked(state.subnets):
                if group.stacked:
                    raise ValueError(f"neurons of experts cannot be scored ({group.name!r}): mask heads alone")
                if group.kind == "heads":
                    consumer = owner.get_submodule(group.columns[0])
                    stack.callback(consumer.register_forward_pre_hook(self._heads(index, group)).remove)
                else:
                    producer = owner.get_submodule(next(iter(group.rows)))
                    stack.callback(producer.register_forward_hook(self._neurons(index, group)).remove)
            yield self

    def _heads(self, index: int, group: UnitGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._add("heads", index, inputs[0].unflatten(-1, (group.units, -1)).float().norm(dim=-1))

        return see

    def _neurons(self, index: int, group: UnitGroup) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._add("neurons", index, output[..., : group.units] > 0)  # gate first, where gate and up are in one

        return see

    def _add(self, kind: str, index: int, values: Tensor) -> None:
        """Add up values [B, ..., units] over tokens."""
        values = values.double()
        present = self.present if self.present is not None and self.present.shape == values.shape[:-1] else None
        values = values.flatten(0, -2) if present is None else values[present.to(values.device)]
        place = kind, index
        self.sums[place] = self.sums.get(place, 0) + values.sum(0).cpu()
        self.tokens[place] = self.tokens.get(place, 0) + len(values)

    def rates(self, kind: str, shape: Iterable[int]) -> Tensor:
        """The mean over tokens, float64 [layers, units]."""
        found = torch.zeros(*shape, dtype=torch.float64)
        for (of, index), total in self.sums.items():
            if of == kind:
                found[index, : len(total)] = total / self.tokens[of, index] + (RARE if kind == "neurons" else 0.0)
        return found
