"""Meta-learning in a run: one episode after the other, each the gradient of one outer step.

Support and query sentences are drawn once for each language and episode. FOMAML takes all K inner steps on one support
batch. Reptile, whose outer gradient comes from the inner steps alone, takes each of them on a batch of its own, as
published (Nichol et al. 2018: on one batch the term that makes batches' gradients agree is lost), and no query.

Reptile's outer gradient [ours]: (theta - phi) / n is about K inner learning rates times a gradient, much smaller than
one, while the optimiser goes on with the moments of the plain steps before, and clipping has a threshold for gradients.
With AdamW's beta2 of 0.999 the steps would be too small for about a thousand updates. So every parameter's part is
divided by K times its inner learning rate, which makes it the mean gradient along the inner path. That changes the
direction only by a factor for each group of parameters, which AdamW cancels in the long run anyhow.

With several processes each takes its share of an episode's languages, and gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fastmask.meta import Draw, EpisodeSampler, MetaLearner, Task
from fastmask.meta.inner_rates import rates_of
from fastmask.tasks.parsing.batch import Batch, Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.training.budget import Budget
from fastmask.training.config import TrainConfig
from fastmask.training.gradients import sum_gradients
from fastmask.training.phases import Seen

__all__ = ["Episodes", "episode_sampler"]


def episode_sampler(config: TrainConfig, train: Mapping[str, Encoded]) -> EpisodeSampler:
    """Which sentences the episodes of a run see.

    Raises:
        ValueError: a meta-batch larger than the number of languages, or languages with too few sentences.
    """
    reptile = config.meta == "reptile"
    return EpisodeSampler(
        {code: len(encoded) for code, encoded in train.items()},
        support_size=config.support_sentences * (config.inner_steps if reptile else 1),
        query_size=0 if reptile else config.query_sentences,
        meta_batch=config.meta_batch,
        seed=config.seed,
    )


class Episodes:
    """Training in episodes, through the subnetworks where some are attached."""

    title = "episodes"

    def __init__(
        self, parser: Parser, train: Mapping[str, Encoded], config: TrainConfig, rates: list[float], accelerator: Any
    ) -> None:
        """Set up sampling and inner steps.

        Args:
            parser: not wrapped; autocasts by itself if `accelerator` has prepared it so.
            train: sentences by language, named as the subnetworks are.
            config: the settings of meta-learning are read.
            rates: see `Phase`.
            accelerator: that has prepared the parser.
        """
        self.rates = rates
        self.parser, self.train, self.config, self.accelerator = parser, train, config, accelerator
        self.sampler = episode_sampler(config, train)
        self.budget = Budget.of(config, len(train))
        self.learner = MetaLearner(
            parser,
            lambda batch: parser(batch).loss,
            algorithm=config.meta,
            inner_steps=config.inner_steps,
            inner_learning_rate=parser.rates(config.inner_lr, config.inner_encoder_lr),
        )
        self.done = 0

    def accumulate(self, step: int) -> Seen:
        """Put the meta-gradient of the next episode into `.grad`, summed over processes."""
        draws = next(self.sampler)
        mine = draws[self.accelerator.process_index :: self.accelerator.num_processes]
        words: list[int] = []
        results = self.learner.episode(self._tasks(mine, words), n_languages=len(draws))
        if self.accelerator.num_processes > 1:
            sum_gradients(self.parser.parameters())
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

    def _tasks(self, draws: list[Draw], words: list[int]) -> Iterator[Task]:
        """Tasks, made one at a time; what words they take is appended to `words`."""
        K = self.config.inner_steps
        for draw in draws:
            parts = np.split(draw.support, K if self.config.meta == "reptile" else 1)
            support = [self._batch(draw.language, rows) for rows in parts]
            query = self._batch(draw.language, draw.query) if len(draw.query) else None
            words.append(sum(support[k % len(support)].n_words for k in range(K)))
            if query is not None:
                words.append(query.n_words)
            yield Task(draw.language, support, query)

    def _batch(self, language: str, rows: np.ndarray) -> Batch:
        return self.parser.features.collate(self.train[language].select(rows)).to(self.accelerator.device)

    @torch.no_grad()
    def _to_units_of_a_gradient(self) -> None:
        for parameter, rate in rates_of(self.parser, self.learner.inner_learning_rate).items():
            if parameter.grad is not None:
                parameter.grad.div_(rate * self.config.inner_steps)

    def state_dict(self) -> dict[str, Any]:
        """Counters, between two episodes."""
        return {"done": self.done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last episode that was done."""
        self.sampler.load_state_dict(state["sampler"])
        self.done = int(state["done"])
