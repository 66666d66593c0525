"""The score `relative`: how much more a unit matters to one language than to the others on average.

`importance` finds units that matter; most of them matter to every language, and the masks of languages come out alike.
Here a language's score of a unit, by gradients on the full network, loses the mean of the other languages' scores. It
says whose a unit is and, unlike `entropy`, by what the loss depends on. That the difference is taken is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.importance import Importance, importance

__all__ = ["relative"]


def relative(
    model: nn.Module, batches: Mapping[str, Iterable[Any]], loss: Callable[[Any], Tensor]
) -> dict[str, Importance]:
    """Score every unit of the full network for each language.

    Args:
        model: with subnetworks over heads, neurons or both attached that own every unit.
        batches: of two languages or more, what `loss` takes.
        loss: runs `model` on a batch and returns one loss for each example, [B]; see `importance`.

    Returns:
        By language, scores that add up to 0 over languages.

    Raises:
        ValueError: a single language, no batch of one, or a loss of another shape.
    """
    if len(batches) < 2:
        raise ValueError(f"the score 'relative' compares languages: expected two or more, given {', '.join(batches)}")
    found = {name: importance(model, scoring, loss, name) for name, scoring in batches.items()}

    def of_kind(kind: str, name: str) -> Tensor | None:
        scores = [getattr(of, kind) for of in found.values()]
        if scores[0] is None:
            return None
        own: Tensor = getattr(found[name], kind)
        return own - (torch.stack(scores).sum(0) - own) / (len(scores) - 1)

    return {name: Importance(of_kind("heads", name), of_kind("neurons", name)) for name in found}
