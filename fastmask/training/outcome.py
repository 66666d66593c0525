"""What a run hands to its caller: at the switch, at its end, and when it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.training.budget import Budget
from fastmask.training.config import TrainConfig

__all__ = ["SwitchPoint", "TrainResult", "TrainingDiverged"]


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened
    """Loss, gradient or weights are not finite; the message names the step and the last good checkpoint.

    Attributes:
        step: the step that failed, from 1.
        checkpoint: the last checkpoint, all of whose weights are finite, or None.
    """

    def __init__(self, what: str, step: int, checkpoint: Path | None) -> None:
        """Build the message."""
        where = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"{what} at step {step}; {where}. A lower learning rate or longer warm-up may help.")
        self.step, self.checkpoint = step, checkpoint


@dataclass(frozen=True)
class SwitchPoint:
    """What the callback that returns the subnetworks gets.

    Attributes:
        parser: the full network after `step` steps, encoder not attached. Weights must come back unchanged.
        datasets: by language and split, as given to `train`.
        train: the encoded training sentences of every language.
        config: the run's settings.
        step: steps done.
    """

    parser: Parser
    datasets: Mapping[str, Mapping[str, Any]]
    train: dict[str, Encoded]
    config: TrainConfig
    step: int


@dataclass
class TrainResult:
    """What a run leaves.

    Attributes:
        parser: trained, in evaluation mode, its encoder attached if there are subnetworks.
        subnetworks: a `fastmask.Subnetworks`, or None for method `full`; of method `dynamic` the last ones.
        language_ids: what to pass for a language: its place in `subnetworks.languages`, or None for method `full`.
        history: the records of ``metrics.jsonl``.
        run: the run's folder; the model is in its ``model``, the masks in its ``masks.safetensors``.
        budget: how many optimiser steps, episodes, gradient passes and sentences that took.
        scouting_share: share of the time since the switch (or since resuming) that went into looking for better masks;
            None for methods other than `dynamic`.
    """

    parser: Parser = field(repr=False)
    subnetworks: Any
    language_ids: dict[str, int] | None
    history: list[dict[str, Any]] = field(repr=False)
    run: Path
    budget: Budget
    scouting_share: float | None = None
