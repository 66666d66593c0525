"""What a step trains on: a plain batch that mixes the languages, or an episode of meta-learning.

Of plain batches, three properties hold at once:

* **Shares.** Language l gets a share p_l ~ n_l ** temperature of every batch. Its count is drawn by systematic
  resampling (one uniform number per step), so it is p_l * batch_size in expectation and never off by one or more.
* **Epochs.** Within a language every sentence is drawn once before any is drawn again, in random order.
* **Lengths.** All languages draw from the same length *quantile* of their own sentences at a step, so that a batch is
  little padded although no language is tied to long or to short steps.

Every random decision is a function of (seed, what it is for, a counter), so batches are the same after a resume.

An episode lets every language of a meta-batch take inner steps on a support batch, through its own subnetwork; the
outer step follows FOMAML's gradient on query batches, or Reptile's displacement. Several processes share an episode's
languages, and their gradients are summed. A *step* of a run is what a plain batch of `batch_size` examples moves it on
by; an episode is as many as `meta_budget` says (`Budget`), so that learning rate, scores and checkpoints have one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.gradients import backward_without_conflict, sum_over_processes
from fastmask.meta import Drawn, EpisodeSampler, MetaLearner
from fastmask.meta import Task as EpisodeTask
from fastmask.tasks.task import Task
from fastmask.training.config import Budget, TrainConfig
from fastmask.training.engine import inner_rates, peak_rates

_COUNTS, _BINS, _ORDER = range(3)  # what a random stream is for


@dataclass(frozen=True)
class Seen:
    """What one gradient was computed on."""

    step: int  # of the run, once the optimizer has taken this gradient
    losses: dict[str, float]  # means over all processes; "loss" is the one whose gradient it is
    words: int  # of the batches that went through the model, over all processes
    languages: list[str]  # whose examples they were, at least those of this process
    counts: dict[str, int] = field(default_factory=dict)  # what else a line of the metrics says


class MixedBatches:
    """One batch over all languages a step, through the full network or each language's subnetwork."""

    def __init__(
        self, task: Task, model: torch.nn.Module, train: Mapping[str, Any], config: TrainConfig, accelerator: Any
    ) -> None:
        """Set up the sampling; `model` is the task's, or what wraps it where there are several processes."""
        self.title = "full network"  # in the progress bar
        self.rates = peak_rates(task, config)  # of each parameter group of the optimizer
        self.task, self.model, self.accelerator, self.config = task, model, accelerator, config
        parts = list(train.values())
        self.joined = type(parts[0]).join(parts)
        self.languages = list(train)
        self.ids: Tensor | None = None
        among = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        lengths = [examples.lengths for examples in parts]
        self.sampler = MixedLanguageSampler(lengths, config.batch_size, config.temperature, config.seed, **among)

    def use_subnetworks(self, ids: Tensor) -> None:
        """From now on send each example through its language's subnetwork: that of `ids` [languages]."""
        self.title, self.ids = "subnetworks", ids

    def accumulate(self, step: int) -> Seen:
        """Put the gradient of this process's part of the next batch into `.grad`, averaged over processes."""
        rows, languages = next(self.sampler)
        words = int(self.joined.lengths[rows].sum())
        if self.config.conflict == "pcgrad":
            parts = (self._loss(rows[own], languages[own]) for own in languages == np.unique(languages)[:, None])
            generator = np.random.default_rng([self.config.seed, step])
            found = backward_without_conflict(self.model.parameters(), parts, generator)
            losses = {"loss": found[0], "conflict": found[1]}
        else:
            loss, weight = self._loss(rows, languages)
            if self.accelerator.num_processes > 1:
                # Gradients are averaged over processes; a process with more to average over has more to say.
                counts = torch.tensor([weight, words], dtype=torch.float64, device=loss.device)
                total, words = (int(count) for count in self.accelerator.reduce(counts, "sum").tolist())
                loss = loss * (weight * self.accelerator.num_processes / total)
            self.accelerator.backward(loss)
            losses = {"loss": self.accelerator.reduce(loss.detach(), "mean").item()}
        return Seen(step + 1, losses, words, [self.languages[number] for number in np.unique(languages)])

    def _loss(self, rows: np.ndarray, languages: np.ndarray) -> tuple[Tensor, int]:
        """The mean loss of some examples, and over how many words or tokens it is one."""
        ids = None if self.ids is None else self.ids[torch.from_numpy(languages)]
        batch = self.task.collate(self.joined.select(rows), ids).to(self.accelerator.device)
        found = self.task.loss(batch, self.model)
        return found.mean, found.weight


class MixedLanguageSampler(Iterator[tuple[np.ndarray, np.ndarray]]):
    """Yields (rows int64 [b], languages int64 [b]) for ever, sorted by language.

    Rows count through the sentences of all languages joined in order, of `lengths` [n_l] each; `bins` are length
    quantiles. Process `rank` gets every `world_size`-th of a step's `batch_size` sentences, so it sees all languages.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
        bins: int = 10,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        empty = [number for number, of in enumerate(lengths) if len(of) == 0]
        if empty or not lengths:
            raise ValueError(f"languages without training sentences: {empty or 'all'} (expected at least one each)")
        if batch_size < world_size:
            raise ValueError(f"batch_size is {batch_size} (expected at least one for each of {world_size} processes)")
        self.lengths = [np.asarray(n, dtype=np.int64) for n in lengths]
        self.seed, self.bins, self.mine = seed, bins, slice(rank, None, world_size)
        sizes = np.array([len(n) for n in self.lengths], dtype=np.float64)
        weights = sizes**temperature
        self.shares = weights / weights.sum()
        # Rounded, so that 4.000000000000001 sentences do not become 5 once in a while.
        self._cumulative = np.round(np.cumsum(self.shares) * batch_size, 9)
        self._cumulative[-1] = batch_size
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.load_state_dict({"step": 0, "epochs": [0] * len(lengths), "taken": [[0] * bins for _ in lengths]})

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's part of the next batch; never runs dry."""
        uniform = self._random(_COUNTS, self._step).random()
        counts = np.diff(np.floor(self._cumulative + uniform), prepend=0.0).astype(np.int64)
        cycle, place = divmod(self._step, self.bins)
        wanted = int(self._random(_BINS, cycle).permutation(self.bins)[place])
        rows = np.concatenate([self._draw(language, int(n), wanted) for language, n in enumerate(counts)])
        self._step += 1
        return rows[self.mine], np.repeat(np.arange(len(counts)), counts)[self.mine]

    def _draw(self, language: int, count: int, wanted: int) -> np.ndarray:
        """Take `count` sentences from bin `wanted`, then from the bins nearest to it that have some left."""
        order, taken = self._orders[language], self._taken[language]
        drawn: list[np.ndarray] = []
        while count > 0:
            left = [b for b in range(self.bins) if taken[b] < len(order[b])]
            if not left:
                self._epochs[language] += 1
                order = self._orders[language] = self._order(language)
                taken = self._taken[language] = [0] * self.bins
                continue
            nearest = min(left, key=lambda b: (abs(b - wanted), b))
            rows = order[nearest][taken[nearest] : taken[nearest] + count]
            taken[nearest] += len(rows)
            count -= len(rows)
            drawn.append(rows)
        return np.concatenate(drawn) + self._offsets[language] if drawn else np.zeros(0, dtype=np.int64)

    def _order(self, language: int) -> list[np.ndarray]:
        """Return a language's sentences in this epoch: one shuffled array of rows per length quantile."""
        random = self._random(_ORDER, language, self._epochs[language])
        lengths = self.lengths[language]
        by_length = np.lexsort((random.random(len(lengths)), lengths))  # ties fall into either bin
        return [random.permutation(part) for part in np.array_split(by_length, self.bins)]

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def state_dict(self) -> dict[str, Any]:
        """Return counters that JSON can hold; the same on every rank."""
        return {"step": self._step, "epochs": list(self._epochs), "taken": [list(taken) for taken in self._taken]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, with the same data and settings."""
        self._step, self._epochs, self._taken = state["step"], list(state["epochs"]), [list(t) for t in state["taken"]]
        self._orders = [self._order(language) for language in range(len(self.lengths))]


def episode_sampler(config: TrainConfig, train: Mapping[str, Any]) -> EpisodeSampler:
    """Which sentences the episodes of a run see; raises ValueError where a language has too few of them."""
    sizes = {code: len(examples) for code, examples in train.items()}
    return EpisodeSampler(sizes, *config.episode_sizes, meta_batch=config.meta_batch, seed=config.seed)


class Episodes:
    """Training in episodes, through the subnetworks where some are attached.

    The inner steps of FOMAML are those of `fastmask.unseen.adapted`, to the bit: without dropout, so the meta-gradient
    is taken at the very weights that a language will be adapted to. In the query pass, whose gradient trains the model,
    dropout is on, and in Reptile's inner steps, which have no other gradients.
    """

    title = "episodes"

    def __init__(self, task: Task, train: Mapping[str, Any], config: TrainConfig, accelerator: Any) -> None:
        """Set up sampling and inner steps (of the model itself, not wrapped); raises what `Budget.of` does."""
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
        draws, config = next(self.sampler), self.config
        mine = draws[self.accelerator.process_index :: self.accelerator.num_processes]
        words = 0
        for draw in mine:  # support batches that take several inner steps count as often
            lengths = self.train[draw.language].lengths
            passes = 1 if config.meta == "reptile" else config.inner_steps
            words += int(lengths[draw.support].sum()) * passes + int(lengths[draw.query].sum())
        results = self.learner.episode(map(self._task, mine), n_languages=len(draws))
        if self.accelerator.num_processes > 1:
            sum_over_processes(self.task.model.parameters())
        if config.meta == "reptile":
            for parameter, rate in self.learner.rates().items():
                if parameter.grad is not None:  # a distance, to the units of a gradient
                    parameter.grad.div_(rate * config.inner_steps)
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        for result in results:
            query = result.support_losses.new_zeros(()) if result.query_loss is None else result.query_loss
            sums[:3] += torch.stack([result.support_losses[0], result.support_losses[-1], query])
        sums[3] = words
        first, last, query_loss, n_words = self.accelerator.reduce(sums, "sum").tolist()
        losses = {"support_loss_first": first / len(draws), "support_loss_last": last / len(draws)}
        if config.meta == "fomaml":
            losses["query_loss"] = query_loss / len(draws)
        self.done += 1
        return Seen(
            self.budget.step_after(self.done),
            {"loss": losses.get("query_loss", losses["support_loss_last"]), **losses},
            round(n_words),
            [draw.language for draw in draws],
            {"episodes": self.done},
        )

    def _task(self, draw: Drawn) -> EpisodeTask:
        """Its batches; made one draw at a time."""

        def batch(rows: np.ndarray) -> Any:
            return self.task.collate(self.train[draw.language].select(rows)).to(self.accelerator.device)

        parts = np.split(draw.support, self.config.inner_steps if self.config.meta == "reptile" else 1)
        support = [batch(rows) for rows in parts]
        return EpisodeTask(draw.language, support, batch(draw.query) if len(draw.query) else None)

    def state_dict(self) -> dict[str, Any]:
        """Counters, between two episodes."""
        return {"done": self.done, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last episode that was done."""
        self.sampler.load_state_dict(state["sampler"])
        self.done = int(state["done"])
