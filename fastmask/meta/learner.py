"""`MetaLearner`: first-order meta-learning, every language through its own subnetwork; and what episodes are made of.

FOMAML (Finn et al. 2017, arXiv 1703.03400, first order) and Reptile (Nichol et al. 2018, arXiv 1803.02999). Random
numbers: nothing is seeded or set back here. Dropout draws from torch's generators as in any other forward pass, once
for each support and query batch, so an episode is a function of the parameters, its batches and the random state at
its start; what saves and restores that state resumes exactly. Modules stay in the mode (train or eval) they are in,
but for inner steps that are to do without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmask.masks import FULL
from fastmask.meta.fast_weights import FastWeights, InnerRates, rates_of
from fastmask.models.attach import attached, number_of, owners_in
from fastmask.models.attach import language as run_with
from fastmask.models.contexts import evaluating

ALGORITHMS = ("fomaml", "reptile")

Language = str | int | None
"""Whose subnetwork: a language of the attached subnetworks, its number (-1: full network), or None: full network."""


@dataclass(frozen=True)
class Task:
    """One language's part of an episode.

    Attributes:
        language: whose subnetwork support and query run through.
        support: batches; inner step k takes batch k modulo their number.
        query: one batch; Reptile does without.
    """

    language: Language
    support: Sequence[Any] = field(repr=False)
    query: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class TaskResult:
    """What happened with one language; losses are detached, on the device of the loss."""

    language: Language
    support_losses: Tensor  # [K], each from before its inner step
    query_loss: Tensor | None  # [], after the last inner step; None without a query


class MetaLearner:
    """Runs episodes: adds a meta-gradient to the parameters' `.grad`, and leaves the parameters as they were.

    The outer step is the caller's: any torch optimizer over the ordinary parameters, with whatever clipping.

        learner = fm.MetaLearner(parser, lambda batch: parser(batch).loss, inner_steps=20,
                                 inner_learning_rate={"encoder": 1e-5, "": 1e-4})
        for draws in sampler:
            optimizer.zero_grad()
            learner.episode([fm.meta.Task(d.language, [batch(d.support)], batch(d.query)) for d in draws])
            optimizer.step()

    For each language the parameters take K steps of SGD on support batches (fast weights phi). FOMAML then adds the
    gradient of the query loss at phi, divided by the number of languages, to `.grad`. Reptile adds (theta - phi),
    divided likewise: a step of plain SGD with learning rate eps is then theta += eps * mean(phi - theta), and other
    optimizers take it as a gradient.

    Masks act in support and query alike, so a unit gets a meta-gradient only from languages that own it. Only what a
    language may change is copied: live parts of masked weights, looked-up rows of embeddings, other parameters whole.
    Memory grows neither with K nor with the number of languages. Gradient checkpointing must be the kind with
    `use_reentrant=False`; torch says so otherwise.

    Args:
        model: any module; subnetworks may be attached to it or to a part of it, it may hold `MaskedLinear` layers
            (then batches carry the language ids, which must be those of the task), or no masks at all.
        loss: runs the model on a batch -> scalar loss. Called inside `fastmask.language` where subnetworks are
            attached, so it passes no `language_ids`. It may autocast.
        algorithm: "fomaml" or "reptile".
        inner_steps: K.
        inner_learning_rate: one rate; or a dict from the beginning of parameters' names to their rate ("encoder" is
            everything below `model.encoder`, the longest fitting name counts, "" is all that is left). A rate of 0
            means not adapted; backward passes over the support do not reach below the lowest adapted layer. FOMAML
            gives such parameters a meta-gradient all the same, Reptile gives them none.
        inner_dropout: False: inner steps run in evaluation mode, and the query in the mode that the model is in. The
            adapted weights are then those that `fastmask.unseen.adapted` makes of the same support, which takes its
            steps without dropout. (Models of transformers do without gradient checkpointing in that mode.)
        scaler: a `torch.amp.GradScaler` for float16 autocast: losses are scaled, inner steps divided by the scale, and
            `.grad` is left scaled, as `scaler.step` expects it. A gradient that overflows in an inner step makes the
            meta-gradient NaN, so that `scaler.step` skips the step and lowers the scale.

    Raises:
        ValueError: a setting out of its range, a rate for no parameter or a parameter without one, a model inside
            `DistributedDataParallel`.
        KeyError: a group name that no parameter's name begins with.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        *,
        algorithm: str = "fomaml",
        inner_steps: int = 5,
        inner_learning_rate: InnerRates = 1e-3,
        inner_dropout: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {algorithm!r} (expected one of {', '.join(ALGORITHMS)})")
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "each process adapts to its own languages: give the module inside DistributedDataParallel (and let the "
                "loss run that), split the tasks over processes, pass n_languages, and sum `.grad` over processes"
            )
        self.model, self.loss, self.algorithm = model, loss, algorithm
        self.inner_steps = _at_least("the number of inner steps", inner_steps, 1)
        self.inner_learning_rate = inner_learning_rate
        self.inner_dropout, self.scaler = inner_dropout, scaler
        self.rates()  # what is wrong with them is said now

    def rates(self) -> dict[Tensor, float]:
        """The inner learning rate of each parameter that is adapted; new ones since the last call are among them."""
        return rates_of(self.model, self.inner_learning_rate)

    def episode(self, tasks: Iterable[Task], n_languages: int | None = None) -> list[TaskResult]:
        """Add the meta-gradient of a meta-batch to `.grad`; one result for each task, in order.

        Parameters and buffers are afterwards what they were, bit for bit, also after an exception or an interruption;
        `.grad` then holds the meta-gradient of some of the tasks.

        Args:
            tasks: one for each language of the meta-batch; with `n_languages` a generator may make them as it goes.
            n_languages: what meta-gradients are divided by: the number of tasks if not given, or that of all
                processes' tasks together where they are split over processes.

        Raises:
            ValueError: no task, no support batch, no query (FOMAML), or a loss that is not a scalar.
            TypeError: support that is not a list or a tuple.
            KeyError: a language without a subnetwork.
        """
        if n_languages is None:
            tasks = list(tasks)
            n_languages = len(tasks)
            for task in tasks:
                self._check(task)
        if n_languages < 1:
            raise ValueError(f"an episode needs at least one task, given {n_languages}")
        return [self._run(task, n_languages) for task in tasks]

    def _run(self, task: Task, n_languages: int) -> TaskResult:
        number, fomaml = self._check(task), self.algorithm == "fomaml"
        query_loss = None
        with FastWeights(self.model, self.rates(), number) as fast:
            support_losses = self._inner_loop(fast, number, task.support, self.inner_steps)
            if not fomaml:
                fast.add_distance(self._loss_scale() / n_languages)
            if task.query is not None:
                with self._routed(number), torch.set_grad_enabled(fomaml):
                    query_loss = self._loss_of(task.query)
                    if fomaml:
                        # The loss is divided rather than its gradient, which would be one more pass over the weights.
                        share = query_loss / n_languages
                        (share if self.scaler is None else self.scaler.scale(share)).backward()
                query_loss = query_loss.detach()
        return TaskResult(task.language, support_losses, query_loss)

    @contextmanager
    def adapt(
        self,
        language: Language,
        support: Sequence[Any],
        *,
        steps: int | None = None,
        keep: bool = False,
        weights: type[FastWeights] = FastWeights,
    ) -> Iterator[Tensor]:
        """The model after `steps` inner steps (default K) on `support`, inside the context; afterwards as before.

        Yields the support losses [steps], each from before its step.

        For few-shot evaluation: an unseen language takes the subnetwork of `language`. Inside, the caller says which
        subnetwork runs, with `language_ids` or `fastmask.language`. With `keep` the adapted weights stay, unless the
        context is left by an exception. `weights` takes the steps: of SGD, unless it is a subclass that does otherwise.

        Raises:
            ValueError, TypeError, KeyError: as in `episode`; without steps `support` may be empty.
        """
        steps = self.inner_steps if steps is None else _at_least("the number of inner steps", steps, 0)
        _check_support(language, support, steps)
        number = number_of(self.model, language)
        with weights(self.model, self.rates(), number, keep) as fast:
            yield self._inner_loop(fast, number, support, steps)

    def _inner_loop(self, fast: FastWeights, number: int, support: Sequence[Any], steps: int) -> Tensor:
        losses = []
        mode = nullcontext() if self.inner_dropout else evaluating(self.model)
        with self._routed(number), torch.enable_grad(), mode:
            for step in range(steps):
                batch = support[step % len(support)]
                losses.append(fast.step(partial(self._loss_of, batch), self._loss_scale()))
        return torch.stack(losses) if losses else torch.zeros(0, device="cpu")

    def _loss_of(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"expected the loss of a batch as a scalar tensor, given {what}")
        return loss

    def _loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _check(self, task: Task) -> int:
        """The number of the task's language, where all is there that the task needs."""
        number = number_of(self.model, task.language)
        _check_support(task.language, task.support, self.inner_steps)
        if self.algorithm == "fomaml" and task.query is None:
            raise ValueError(f"language {task.language!r}: FOMAML needs a query batch")
        return number

    @contextmanager
    def _routed(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for owner in owners_in(self.model):
                name = None if number == FULL else attached(owner).subnets.languages[number]
                stack.enter_context(run_with(owner, name))
            yield


def _check_support(language: Language, support: Sequence[Any], steps: int) -> None:
    if not isinstance(support, (list, tuple)):
        raise TypeError(f"language {language!r}: expected support as a list of batches, given {type(support).__name__}")
    if steps and not support:
        raise ValueError(f"language {language!r}: no support batch to adapt on")


def _at_least(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r} (expected an integer >= {low})")
    return value


# ---- which sentences an episode sees

_LANGUAGES, _SENTENCES = range(2)  # what a random stream is for


@dataclass(frozen=True)
class Drawn:
    """One language's sentences in an episode: int64 rows of that language's own data, in random order."""

    language: str
    support: np.ndarray = field(repr=False)
    query: np.ndarray = field(repr=False)


class EpisodeSampler(Iterator[list[Drawn]]):
    """Yields meta-batches for ever, each a list of `Drawn`s of different languages.

    Within a language every pass over its sentences is a fresh shuffle, cut into pieces of support + query sentences;
    what does not fill a piece is left out of that pass. So the two never share a sentence, no sentence is drawn twice
    in a pass, sampling never ends, and length plays no part. Every random decision is a function of (seed, what it is
    for, a counter), so the state is a handful of counters.

    The same on every process: to split a meta-batch over processes, let process r of n take `draws[r::n]`.

    Args:
        sizes: number of sentences of each language.
        support_size: sentences in a support set.
        query_size: sentences in a query set; 0 for Reptile without queries.
        meta_batch: languages in a meta-batch, drawn without repetition; all of them, in order, if not given.
        seed: of all random choices.

    Raises:
        ValueError: a number out of its range, no language or one with fewer sentences than support and query take, or a
            meta-batch larger than the number of languages.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        support_size: int,
        query_size: int,
        *,
        meta_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes = {language: int(size) for language, size in sizes.items()}
        self.languages = tuple(self.sizes)
        if not self.languages:
            raise ValueError("expected at least one language, given none")
        self.support_size = _at_least("support_size", support_size, 1)
        self.query_size = _at_least("query_size", query_size, 0)
        self.seed = _at_least("seed", seed, 0)
        self.meta_batch = _at_least("meta_batch", len(self.languages) if meta_batch is None else meta_batch, 1)
        if self.meta_batch > len(self.languages):
            raise ValueError(
                f"a meta-batch of {self.meta_batch} languages needs as many, given {len(self.languages)}: "
                f"{', '.join(self.languages)}"
            )
        need = support_size + query_size
        if small := [f"{language} has {size}" for language, size in self.sizes.items() if size < need]:
            raise ValueError(
                f"support ({support_size}) and query ({query_size}) take {need} different sentences of each language: "
                f"{', '.join(small)}"
            )
        self._number = 0  # of the next meta-batch
        self._drawn = [0] * len(self.languages)  # so many pieces of each language

    def __next__(self) -> list[Drawn]:
        """Return the next meta-batch; never runs dry."""
        members = list(range(len(self.languages)))
        if self.meta_batch < len(members):
            members = self._random(_LANGUAGES, self._number).permutation(len(members)).tolist()[: self.meta_batch]
        self._number += 1
        return [self._draw(number) for number in members]

    def _draw(self, number: int) -> Drawn:
        """The next piece of a language."""
        language, need = self.languages[number], self.support_size + self.query_size
        size = self.sizes[language]
        passed, place = divmod(self._drawn[number], size // need)
        rows = self._random(_SENTENCES, number, passed).permutation(size)[place * need : (place + 1) * need]
        self._drawn[number] += 1
        return Drawn(language, rows[: self.support_size], rows[self.support_size :])

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def state_dict(self) -> dict[str, Any]:
        """Return counters that JSON can hold; the same on every process that has drawn as much."""
        return {"meta_batch": self._number, "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with the same data and settings."""
        self._number = int(state["meta_batch"])
        self._drawn = [int(n) for n in state["drawn"]]
