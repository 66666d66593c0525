"""Training in episodes of meta-learning, and what a run spends on them and on plain batches.

An episode lets every language of a meta-batch take inner steps on a support batch, through its own subnetwork; the
outer step follows FOMAML's gradient on query batches, or Reptile's displacement. Several processes share an episode's
languages, and their gradients are summed.

A *step* of a run is a gradient over `batch_size` examples. An episode counts as many steps as its examples make, so
runs of the same `steps` see the same number of examples with and without meta-learning, up to what is less than an
episode, and their learning rate, scores and checkpoints follow the same axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmask.meta import Draw, EpisodeSampler, MetaLearner
from fastmask.meta import Task as EpisodeTask
from fastmask.meta.inner_rates import rates_of
from fastmask.settings import ConfigError
from fastmask.tasks.task import Task
from fastmask.training.batches import Seen
from fastmask.training.config import TrainConfig
from fastmask.training.engine import sum_gradients

__all__ = ["Budget", "Episodes", "episode_sampler"]


@dataclass(frozen=True)
class Budget:
    """How the steps of a run are spent.

    Attributes:
        steps: of the run, in all.
        plain_steps: of them, optimiser steps on one mixed batch each.
        episodes: optimiser steps on the meta-gradient of one episode each; 0 without meta-learning.
        episode_sentences: that one episode sees, a sentence as often as it is in a batch: each language's support
            batch counts once for each of the K inner steps.
        gradient_passes: forward and backward passes over a batch (of all processes together: a batch that is split
            counts once): one for a plain step; K, and for FOMAML one more, for each language of an episode. What
            looking for better masks takes (method `dynamic`) is not in it.
        sentences: seen in all.
    """

    steps: int
    plain_steps: int
    episodes: int
    episode_sentences: int
    gradient_passes: int
    sentences: int

    @classmethod
    def of(cls, config: TrainConfig, n_languages: int) -> Budget:
        """The budget of a run with `n_languages` training languages.

        Raises:
            ConfigError: the steps after the switch hold less than one episode, or there are fewer languages than a
                meta-batch takes.
        """
        if config.meta == "none":
            return cls(config.steps, config.steps, 0, 0, config.steps, config.steps * config.batch_size)
        members = n_languages if config.meta_batch is None else config.meta_batch
        if members > n_languages:
            raise ConfigError(f"meta_batch is {members} (expected at most the number of languages, {n_languages})")
        query = config.query_sentences if config.meta == "fomaml" else 0
        sentences = members * (config.inner_steps * config.support_sentences + query)
        plain = config.shared_steps
        episodes = (config.steps - plain) * config.batch_size // sentences
        if episodes < 1:
            raise ConfigError(
                f"an episode sees {sentences} sentences ({members} languages, {config.inner_steps} inner steps on "
                f"{config.support_sentences} sentences, {query} query sentences), and the {config.steps - plain} steps "
                f"after the switch have only {(config.steps - plain) * config.batch_size}: expected more steps, or "
                "fewer of inner_steps, support_sentences, query_sentences or meta_batch"
            )
        passes = members * (config.inner_steps + (query > 0))
        return cls(
            steps=config.steps,
            plain_steps=plain,
            episodes=episodes,
            episode_sentences=sentences,
            gradient_passes=plain + episodes * passes,
            sentences=plain * config.batch_size + episodes * sentences,
        )

    def step_after(self, episode: int) -> int:
        """The run's step after episode number `episode` (from 1): its share of the steps, rounded.

        The last step is reached with the last episode and not before, also where an episode is less than a step.
        """
        if episode == self.episodes:
            return self.steps
        share = (self.steps - self.plain_steps) * episode / self.episodes
        return min(self.plain_steps + round(share), self.steps - 1)

    def passes_after(self, episode: int) -> int:
        """`gradient_passes` after `episode` episodes."""
        of_episodes = self.gradient_passes - self.plain_steps
        return self.plain_steps + of_episodes * episode // max(self.episodes, 1)


def episode_sampler(config: TrainConfig, train: Mapping[str, Any]) -> EpisodeSampler:
    """Which sentences the episodes of a run see.

    Raises:
        ValueError: a meta-batch larger than the number of languages, or languages with too few sentences.
    """
    reptile = config.meta == "reptile"
    return EpisodeSampler(
        {code: len(examples) for code, examples in train.items()},
        support_size=config.support_sentences * (config.inner_steps if reptile else 1),
        query_size=0 if reptile else config.query_sentences,
        meta_batch=config.meta_batch,
        seed=config.seed,
    )


class Episodes:
    """Training in episodes, through the subnetworks where some are attached."""

    title = "episodes"

    def __init__(
        self, task: Task, train: Mapping[str, Any], config: TrainConfig, rates: list[float], accelerator: Any
    ) -> None:
        """Set up sampling and inner steps.

        Args:
            task: its model is not wrapped; it autocasts by itself if `accelerator` has prepared it so.
            train: examples by language, named as the subnetworks are.
            config: the settings of meta-learning are read.
            rates: peak learning rate of each parameter group of the optimiser.
            accelerator: that has prepared the model.
        """
        self.rates = rates
        self.task, self.train, self.config, self.accelerator = task, train, config, accelerator
        self.sampler = episode_sampler(config, train)
        self.budget = Budget.of(config, len(train))
        self.learner = MetaLearner(
            task.model,
            lambda batch: task.loss(batch).mean,
            algorithm=config.meta,
            inner_steps=config.inner_steps,
            inner_learning_rate=task.rates(config.inner_lr, config.inner_encoder_lr),
        )
        self.done = 0

    def accumulate(self, step: int) -> Seen:
        """Put the meta-gradient of the next episode into `.grad`, summed over processes."""
        draws = next(self.sampler)
        mine = draws[self.accelerator.process_index :: self.accelerator.num_processes]
        words: list[int] = []
        results = self.learner.episode(self._tasks(mine, words), n_languages=len(draws))
        if self.accelerator.num_processes > 1:
            sum_gradients(self.task.model.parameters())
        if self.config.meta == "reptile":
            self._to_units_of_a_gradient()
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        for result in results:
            query = result.support_losses.new_zeros(()) if result.query_loss is None else result.query_loss
            sums[:3] += torch.stack([result.support_losses[0], result.support_losses[-1], query])
        sums[3] = sum(words)
        first, last, query_loss, n_words = self.accelerator.reduce(sums, "sum").tolist()
        losses = {"support_loss_first": first / len(draws), "support_loss_last": last / len(draws)}
        if self.config.meta == "fomaml":
            losses["query_loss"] = query_loss / len(draws)
        self.done += 1
        return Seen(
            self.budget.step_after(self.done),
            {"loss": losses.get("query_loss", losses["support_loss_last"]), **losses},
            round(n_words),
            [draw.language for draw in draws],
            {"episodes": self.done, "gradient_passes": self.budget.passes_after(self.done)},
        )

    def _tasks(self, draws: list[Draw], words: list[int]) -> Iterator[EpisodeTask]:
        """Tasks, made one at a time; what words they take is appended to `words`."""
        K = self.config.inner_steps
        for draw in draws:
            parts = np.split(draw.support, K if self.config.meta == "reptile" else 1)
            support = [self._batch(draw.language, rows) for rows in parts]
            query = self._batch(draw.language, draw.query)[0] if len(draw.query) else None
            words.append(sum(support[k % len(support)][1] for k in range(K)))
            words.append(int(self.train[draw.language].lengths[draw.query].sum()))
            yield EpisodeTask(draw.language, [batch for batch, _ in support], query)

    def _batch(self, language: str, rows: np.ndarray) -> tuple[Any, int]:
        """A batch of some of a language's examples, and their words."""
        examples = self.train[language].select(rows)
        return self.task.collate(examples).to(self.accelerator.device), int(examples.lengths.sum())

    @torch.no_grad()
    def _to_units_of_a_gradient(self) -> None:
        for parameter, rate in rates_of(self.task.model, self.learner.inner_learning_rate).items():
            if parameter.grad is not None:
                parameter.grad.div_(rate * self.config.inner_steps)

    def state_dict(self) -> dict[str, Any]:
        """Counters, between two episodes."""
        return {"done": self.done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last episode that was done."""
        self.sampler.load_state_dict(state["sampler"])
        self.done = int(state["done"])
