"""What a training step computes its gradient on. First: a batch that mixes the languages.

A phase leaves a gradient on the parameters and says what it saw; clipping, the optimiser step, scores and checkpoints
are the loop's. `episodes` is the other phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.training.config import TrainConfig
from fastmask.training.sampler import MixedLanguageSampler

__all__ = ["MixedBatches", "Phase", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What one gradient was computed on.

    Attributes:
        step: of the run, once the optimiser has taken this gradient.
        losses: by name, means over all processes; "loss" is the one whose gradient it is.
        words: of the batches that went through the parser, over all processes.
        languages: whose sentences they were, at least those of this process.
        counts: what else a line of the metrics says.
    """

    step: int
    losses: dict[str, float]
    words: int
    languages: list[str]
    counts: dict[str, int] = field(default_factory=dict)


class Phase(Protocol):
    """A way to compute gradients.

    Attributes:
        title: what the progress bar calls it.
        rates: peak learning rate of each parameter group of the optimiser.
    """

    title: str
    rates: list[float]

    def accumulate(self, step: int) -> Seen:
        """Put the next gradient into `.grad`, which is empty, after `step` steps of the run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class MixedBatches:
    """Plain training: one batch over all languages, through the full network or each language's subnetwork."""

    def __init__(
        self,
        model: torch.nn.Module,
        parser: Parser,
        train: Mapping[str, Encoded],
        config: TrainConfig,
        rates: list[float],
        accelerator: Any,
    ) -> None:
        """Set up the sampling.

        Args:
            model: `parser`, or what wraps it where there are several processes.
            parser: collates batches.
            train: sentences by language.
            config: `batch_size`, `temperature` and `seed` are read.
            rates: see `Phase`.
            accelerator: that has prepared `model`.
        """
        self.title = "full network"
        self.rates = rates
        self.model, self.parser, self.accelerator = model, parser, accelerator
        self.joined = Encoded.join(list(train.values()))
        self.languages = list(train)
        self.ids: torch.Tensor | None = None
        self.sampler = MixedLanguageSampler(
            [encoded.lengths for encoded in train.values()],
            config.batch_size,
            config.temperature,
            config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    def use_subnetworks(self, language_ids: Mapping[str, int]) -> None:
        """From now on send each sentence through its language's subnetwork."""
        self.title = "subnetworks"
        self.ids = torch.tensor([language_ids[code] for code in self.languages], dtype=torch.int64)

    def accumulate(self, step: int) -> Seen:
        """Put the gradient of this process's part of the next batch into `.grad`, averaged over processes."""
        rows, languages = next(self.sampler)
        batch = self.parser.features.collate(self.joined.select(rows))
        if self.ids is not None:
            batch.language_ids = self.ids[torch.from_numpy(languages)]
        batch = batch.to(self.accelerator.device)
        loss, words = self.model(batch).loss, batch.n_words
        if self.accelerator.num_processes > 1 and self.parser.config.loss_over == "words":
            # Gradients are averaged over processes; a process with more words has more to say.
            total = self.accelerator.reduce(torch.tensor(float(words), device=loss.device), "sum")
            loss = loss * (words * self.accelerator.num_processes / total)
            words = int(total.item())
        self.accelerator.backward(loss)
        mean = self.accelerator.reduce(loss.detach(), "mean").item()
        return Seen(step + 1, {"loss": mean}, words, [self.languages[number] for number in np.unique(languages)])

    def state_dict(self) -> dict[str, Any]:
        """The sampler's counters."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them."""
        self.sampler.load_state_dict(state)
