"""Training in episodes of meta-learning, and what a run spends on them and on plain batches.

An episode lets every language of a meta-batch take inner steps on a support batch, through its own subnetwork; the
outer step follows FOMAML's gradient on query batches, or Reptile's displacement. Several processes share an episode's
languages, and their gradients are summed.

A *step* of a run is what a plain batch of `batch_size` examples moves it on by; learning rate, scores and checkpoints
follow that axis with and without meta-learning. How many steps an episode moves it on by follows from what runs with
and without meta-learning have in common (`meta_budget`): the examples that they draw, or the optimizer's steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmask.meta import Draw, EpisodeSampler, MetaLearner
from fastmask.meta import Task as EpisodeTask
from fastmask.settings import ConfigError
from fastmask.tasks.task import Task
from fastmask.training.batches import Seen
from fastmask.training.config import TrainConfig
from fastmask.training.engine import inner_rates, peak_rates, sum_gradients

__all__ = ["Budget", "Episodes", "episode_sampler"]


@dataclass(frozen=True)
class Budget:
    """What a run spends, by which runs with and without meta-learning are compared.

    An episode draws, for each of its languages, a support batch once however many inner steps it takes (Reptile draws
    one for each of them), and FOMAML's query batch. Gradient passes are forward and backward passes over a batch, one
    that is split over processes counting once: one for a plain step; K, and for FOMAML one more, for each language of
    an episode. What looking for better masks takes (method `dynamic`) is not in it.
    """

    steps: int  # of the run, in all
    plain_steps: int  # of them, optimizer steps on one mixed batch each
    episodes: int  # optimizer steps on the meta-gradient of one episode each; 0 without meta-learning
    outer_steps: int  # steps of the optimizer in all: `plain_steps` + `episodes`
    episode_sentences: int  # different sentences that one episode draws
    sentences: int  # drawn in all; several epochs draw one several times
    gradient_passes: int

    @classmethod
    def of(cls, config: TrainConfig, n_languages: int) -> Budget:
        """The budget of a run with `n_languages` training languages.

        Raises:
            ConfigError: the steps after the switch hold less than one episode, or there are fewer languages than a
                meta-batch takes.
        """
        plain, episodes, drawn, passes = config.steps, 0, 0, 0
        if config.meta != "none":
            members = n_languages if config.meta_batch is None else config.meta_batch
            if members > n_languages:
                raise ConfigError(f"meta_batch is {members} (expected at most the number of languages, {n_languages})")
            support, query = _sizes(config)
            drawn, passes = members * (support + query), members * (config.inner_steps + (query > 0))
            plain, left = config.shared_steps, config.steps - config.shared_steps
            episodes = left if config.meta_budget == "updates" else left * config.batch_size // drawn
            if episodes < 1:
                raise ConfigError(
                    f"an episode draws {drawn} sentences ({members} languages, {support} support and {query} query "
                    f"sentences), and the {left} steps after the switch have only {left * config.batch_size}: expected "
                    "more steps, fewer of support_sentences, query_sentences or meta_batch, or meta_budget updates"
                )
        sentences, gradient_passes = plain * config.batch_size + episodes * drawn, plain + episodes * passes
        return cls(config.steps, plain, episodes, plain + episodes, drawn, sentences, gradient_passes)

    def step_after(self, episode: int) -> int:
        """The run's step after episode number `episode` (from 1): its share of the steps, rounded.

        The last step is reached with the last episode and not before, also where an episode is less than a step.
        """
        if episode == self.episodes:
            return self.steps
        share = (self.steps - self.plain_steps) * episode / self.episodes
        return min(self.plain_steps + round(share), self.steps - 1)

    def after(self, episode: int) -> dict[str, int]:
        """What is spent after `episode` episodes (of at least one): `outer_steps`, `sentences`, `gradient_passes`."""
        to_come = self.episodes - episode
        passes = (self.gradient_passes - self.plain_steps) // self.episodes
        return {
            "outer_steps": self.outer_steps - to_come,
            "sentences": self.sentences - to_come * self.episode_sentences,
            "gradient_passes": self.gradient_passes - to_come * passes,
        }

    def __str__(self) -> str:
        """One line for people."""
        of_episodes = f" ({self.plain_steps:,} plain, {self.episodes:,} episodes)" if self.episodes else ""
        return (
            f"{self.outer_steps:,} optimizer steps{of_episodes}, {self.sentences:,} training examples drawn, "
            f"{self.gradient_passes:,} gradient passes"
        )


def episode_sampler(config: TrainConfig, train: Mapping[str, Any]) -> EpisodeSampler:
    """Which sentences the episodes of a run see; raises ValueError where a language has too few of them."""
    sizes = {code: len(examples) for code, examples in train.items()}
    return EpisodeSampler(sizes, *_sizes(config), meta_batch=config.meta_batch, seed=config.seed)


def _sizes(config: TrainConfig) -> tuple[int, int]:
    """Different support and query sentences of a language in an episode; Reptile has a batch for each inner step."""
    if config.meta == "reptile":
        return config.support_sentences * config.inner_steps, 0
    return config.support_sentences, config.query_sentences


class Episodes:
    """Training in episodes, through the subnetworks where some are attached.

    The inner steps of FOMAML are those of `fastmask.unseen.adapted`, to the bit: dropout is off in them, as it is when
    the model is tested, so the meta-gradient is taken at the very weights that a language will be adapted to. It is on
    in the query pass, whose gradient trains the model. Reptile has no other gradients than those of its inner steps,
    and keeps dropout in them.
    """

    title = "episodes"

    def __init__(self, task: Task, train: Mapping[str, Any], config: TrainConfig, accelerator: Any) -> None:
        """Set up sampling and inner steps; raises what `Budget.of` and `episode_sampler` do.

        The model of `task` is not wrapped; it autocasts by itself if `accelerator` has prepared it so.
        """
        self.rates = peak_rates(task, config, episodes=True)
        self.task, self.train, self.config, self.accelerator = task, train, config, accelerator
        self.budget = Budget.of(config, len(train))
        self.sampler = episode_sampler(config, train)
        self.learner = MetaLearner(
            task.model,
            lambda batch: task.loss(batch).mean,
            algorithm=config.meta,
            inner_steps=config.inner_steps,
            inner_learning_rate=task.rates(*inner_rates(task, config)),
            inner_dropout=config.meta == "reptile",
        )
        self.done = 0

    def accumulate(self, step: int) -> Seen:
        """Put the meta-gradient of the next episode into `.grad`, summed over processes."""
        draws = next(self.sampler)
        mine = draws[self.accelerator.process_index :: self.accelerator.num_processes]
        words = sum(map(self._words, mine))
        results = self.learner.episode(map(self._task, mine), n_languages=len(draws))
        if self.accelerator.num_processes > 1:
            sum_gradients(self.task.model.parameters())
        if self.config.meta == "reptile":
            for parameter, rate in self.learner.rates().items():
                if parameter.grad is not None:  # a distance, to the units of a gradient
                    parameter.grad.div_(rate * self.config.inner_steps)
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        for result in results:
            query = result.support_losses.new_zeros(()) if result.query_loss is None else result.query_loss
            sums[:3] += torch.stack([result.support_losses[0], result.support_losses[-1], query])
        sums[3] = words
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
            {"episodes": self.done, **self.budget.after(self.done)},
        )

    def _task(self, draw: Draw) -> EpisodeTask:
        """Its batches; made one draw at a time."""
        support = [self._batch(draw.language, rows) for rows in self._parts(draw)]
        return EpisodeTask(draw.language, support, self._batch(draw.language, draw.query) if len(draw.query) else None)

    def _parts(self, draw: Draw) -> list[np.ndarray]:
        """The rows of each support batch."""
        return np.split(draw.support, self.config.inner_steps if self.config.meta == "reptile" else 1)

    def _batch(self, language: str, rows: np.ndarray) -> Any:
        return self.task.collate(self.train[language].select(rows)).to(self.accelerator.device)

    def _words(self, draw: Draw) -> int:
        """Words of a draw that go through the model."""
        lengths, repeated = self.train[draw.language].lengths, self.config.inner_steps // len(self._parts(draw))
        return int(lengths[draw.support].sum()) * repeated + int(lengths[draw.query].sum())

    def state_dict(self) -> dict[str, Any]:
        """Counters, between two episodes."""
        return {"done": self.done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last episode that was done."""
        self.sampler.load_state_dict(state["sampler"])
        self.done = int(state["done"])
