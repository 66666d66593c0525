"""How good a subnetwork is, by what pruning goes by: a development metric, or the loss where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import frozen
from fastmask.models.attach import attach, detach, language
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["Quality", "attached_to", "measured"]


@dataclass(frozen=True)
class Quality:
    """One of two numbers; both None where nothing was measured.

    Attributes:
        metric: on development data, higher is better.
        loss: of a language without development data: the mean over its scoring examples, lower is better.
    """

    metric: float | None = None
    loss: float | None = None

    def keeps(self, tau: float, full: Quality) -> bool:
        """Whether this is at least tau times as good as the full network.

        Of losses: whether exp(-loss), the likelihood where the loss is a cross entropy, is at least tau times as large;
        the loss may rise by -ln(tau), 0.05 at tau = 0.95.
        """
        if self.metric is not None and full.metric is not None:
            return self.metric >= tau * full.metric
        assert self.loss is not None
        assert full.loss is not None
        return self.loss <= full.loss - math.log(tau)


def measured(
    model: nn.Module,
    name: str,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    metric: Callable[[str], float | None] | None,
) -> Quality:
    """Measure the subnetwork of one language in a model that has it attached.

    Args:
        model: with subnetworks attached.
        name: the language.
        batches: its scoring examples.
        loss: see `discover`.
        metric: see `discover`; the loss is taken where it is None or returns None.
    """
    with language(model, name):
        value = None if metric is None else metric(name)
        if value is not None:
            return Quality(metric=float(value))
        with frozen(model), torch.no_grad():
            return Quality(loss=float(torch.cat([loss(batch) for batch in batches]).mean()))


@contextmanager
def attached_to(model: nn.Module, subnets: Subnetworks) -> Iterator[None]:
    """Subnetworks on a plain model, for a while."""
    attach(model, subnets)
    try:
        yield
    finally:
        detach(model)
