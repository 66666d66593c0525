"""Method `dynamic` in a run: when and on which sentences masks are updated, and what is kept of their history."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastmask.dynamic import DynamicSubnetworks
from fastmask.files import FileError, read_sealed, write_sealed
from fastmask.models.attach import attached
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.parsing.batch import Batch, Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.training import checkpoints
from fastmask.training.config import TrainConfig
from fastmask.training.random_state import preserved_random_state

__all__ = ["DYNAMIC_FILE", "DynamicMasks"]

DYNAMIC_FILE = checkpoints.DYNAMIC


class DynamicMasks:
    """The masks of a run whose encoder has subnetworks attached, updated about every `config.update_every` steps.

    That is: when the run's step, which an episode may move by several, reaches or passes a multiple of it.

    Each update scouts `config.scout_sentences` training sentences of every language. Which ones depends on the seed,
    the step and the language alone, so a resumed run scouts the same.
    """

    def __init__(self, parser: Parser, train: Mapping[str, Encoded], config: TrainConfig, accelerator: Any) -> None:
        self.parser, self.train, self.config, self.accelerator = parser, train, config, accelerator
        self.masks = DynamicSubnetworks(parser.encoder, config.strategy, every=1)  # when is decided here
        self._began = (0.0, time.perf_counter())

    @property
    def subnetworks(self) -> Subnetworks:
        """The masks as they are now."""
        subnets: Subnetworks = attached(self.parser.encoder).subnets
        return subnets

    @property
    def scouting_share(self) -> float:
        """Share of the time, since this object was made or resumed, that went into looking for better masks."""
        seconds, since = self._began
        return (self.masks.seconds - seconds) / (time.perf_counter() - since)

    def update(self, step: int) -> list[str]:
        """Update the masks after `step` steps; returns the languages whose masks changed."""
        was_training = self.parser.training
        self.parser.eval()  # dropout would add noise to the scores
        try:
            with preserved_random_state():
                for position, (language, encoded) in enumerate(self.train.items()):
                    self.masks.scout(language, self._batch(step, position, encoded), self._loss)
        finally:
            self.parser.train(was_training)
        several = self.accelerator.num_processes > 1
        return self.masks.update(step, self._sum_over_processes if several else None)

    def _batch(self, step: int, position: int, encoded: Encoded) -> Batch:
        seed = [self.config.seed, step, position, self.accelerator.process_index]
        rows = np.random.default_rng(seed).permutation(len(encoded))[: self.config.scout_sentences]
        return self.parser.features.collate(encoded.select(rows)).to(self.accelerator.device)

    def _loss(self, batch: Batch) -> Tensor:
        losses = self.parser(batch).loss_per_sentence
        assert losses is not None  # training sentences have gold heads
        return losses

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return summed.to(tensor.device)

    def save(self, path: Path) -> None:
        """Write averages, scores and the history of all masks, for `fastmask.analysis.movement.read_history`."""
        state = self.masks.state_dict()
        write_sealed(path, state["tensors"], {"header": json.dumps(state["header"])})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; the masks attached to the encoder become those of the file.

        Raises:
            FileError: the file is damaged, or of other masks.
        """
        tensors, header = read_sealed(path)
        try:
            self.masks.load_state_dict({"tensors": tensors, "header": json.loads(header["header"])})
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(path, f"does not fit the run's subnetworks: {error}") from None
        self._began = (self.masks.seconds, time.perf_counter())
