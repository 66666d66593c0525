"""`MetaLearner`: first-order meta-learning, every language through its own subnetwork.

FOMAML (Finn et al. 2017, arXiv 1703.03400, first order) and Reptile (Nichol et al. 2018, arXiv 1803.02999). Random
numbers: nothing is seeded or set back here. Dropout draws from torch's generators as in any other forward pass, once
for each support and query batch, so an episode is a function of the parameters, its batches and the random state at
its start; what saves and restores that state resumes exactly. Modules stay in the mode (train or eval) they are in,
but for inner steps that are to do without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmask.errors import unknown
from fastmask.linear import MaskedLinear
from fastmask.masks import FULL
from fastmask.meta.fast_weights import FastWeights
from fastmask.meta.inner_rates import InnerRates, rates_of, reusable
from fastmask.models.attach import attached
from fastmask.models.attach import language as run_with
from fastmask.models.modes import evaluating

__all__ = ["ALGORITHMS", "Adapted", "MetaLearner", "Task", "TaskResult"]

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
    """What happened with one language.

    Attributes:
        language: of the task.
        support_losses: [K], each from before its inner step; detached, on the device of the loss.
        query_loss: [], after the last inner step; None without a query.
    """

    language: Language
    support_losses: Tensor
    query_loss: Tensor | None


@dataclass(frozen=True)
class Adapted:
    """What `MetaLearner.adapt` yields: the model, which holds the fast weights now, and the K support losses."""

    model: nn.Module
    support_losses: Tensor


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
            everything below `model.encoder`, the longest fitting name counts, "" is all that is left); or groups
            `{"params": ..., "lr": ...}` as torch's optimizers take them. A rate of 0, or being in no such group, means
            not adapted; backward passes over the support do not reach below the lowest adapted layer. FOMAML gives
            such parameters a meta-gradient all the same, Reptile gives them none.
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
        self.inner_steps = _steps(inner_steps, low=1)
        self.inner_learning_rate = reusable(inner_learning_rate)
        self.inner_dropout = inner_dropout
        self.scaler = scaler
        rates_of(model, self.inner_learning_rate)  # what is wrong with them is said now

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

    @contextmanager
    def adapt(
        self,
        language: Language,
        support: Sequence[Any],
        *,
        steps: int | None = None,
        keep: bool = False,
        weights: type[FastWeights] = FastWeights,
    ) -> Iterator[Adapted]:
        """The model after `steps` inner steps (default K) on `support`, inside the context; afterwards as before.

        For few-shot evaluation: an unseen language takes the subnetwork of `language`. Inside, the caller says which
        subnetwork runs, with `language_ids` or `fastmask.language`. With `keep` the adapted weights stay, unless the
        context is left by an exception. `weights` takes the steps: of SGD, unless it is a subclass that does otherwise.

        Raises:
            ValueError, TypeError, KeyError: as in `episode`; without steps `support` may be empty.
        """
        steps = self.inner_steps if steps is None else _steps(steps, low=0)
        _check_support(language, support, steps)
        with weights(self.model, rates_of(self.model, self.inner_learning_rate), self._number(language)) as fast:
            losses = self._inner_loop(fast, language, support, steps)
            if keep:
                fast.keep()
            yield Adapted(self.model, losses)

    def _run(self, task: Task, n_languages: int) -> TaskResult:
        self._check(task)
        rates = rates_of(self.model, self.inner_learning_rate)
        query_loss = None
        with FastWeights(self.model, rates, self._number(task.language)) as fast:
            support_losses = self._inner_loop(fast, task.language, task.support, self.inner_steps)
            if self.algorithm == "reptile":
                fast.add_distance(self._loss_scale() / n_languages)
            if task.query is not None:
                with self._routed(task.language), torch.set_grad_enabled(self.algorithm == "fomaml"):
                    query_loss = self._loss_of(task.query)
                    if self.algorithm == "fomaml":
                        # The loss is divided rather than its gradient, which would be one more pass over the weights.
                        self._scaled(query_loss / n_languages).backward()
                query_loss = query_loss.detach()
        return TaskResult(task.language, support_losses, query_loss)

    def _inner_loop(self, fast: FastWeights, language: Language, support: Sequence[Any], steps: int) -> Tensor:
        losses = []
        mode = nullcontext() if self.inner_dropout else evaluating(self.model)
        with self._routed(language), torch.enable_grad(), mode:
            for step in range(steps):
                batch = support[step % len(support)]
                losses.append(fast.step(partial(self._loss_of, batch), self._loss_scale()))
        return torch.stack(losses) if losses else torch.zeros(0)

    def _loss_of(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"expected the loss of a batch as a scalar tensor, given {what}")
        return loss

    def _loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    # ---- languages

    def _check(self, task: Task) -> None:
        self._number(task.language)
        _check_support(task.language, task.support, self.inner_steps)
        if self.algorithm == "fomaml" and task.query is None:
            raise ValueError(f"language {task.language!r}: FOMAML needs a query batch")

    def _owners(self) -> list[nn.Module]:
        """The modules that subnetworks are attached to."""
        return [module for module in self.model.modules() if "_fastmask" in vars(module)]

    def _number(self, language: Language) -> int:
        """Position of a language in the masks, FULL for the full network."""
        names = {attached(owner).subnets.languages for owner in self._owners()}
        if len(names) > 1:
            raise ValueError("parts of the model have subnetworks of different languages attached: expected the same")
        counts = {layer.mask.n_languages for layer in self.model.modules() if isinstance(layer, MaskedLinear)}
        if language is None or not (names or counts):
            return FULL  # without masks a language is only a name
        if isinstance(language, str):
            if not names:
                raise ValueError(
                    f"language {language!r}: the model has masked layers, but no subnetworks with names: give a number"
                )
            known = next(iter(names))
            if language not in known:
                raise unknown("language", language, known)
            return known.index(language)
        limit = min([*counts, *map(len, names)])
        if not FULL <= language < limit:
            raise ValueError(
                f"language {language} is out of range: expected 0 to {limit - 1}, or -1 for the full network"
            )
        return language

    @contextmanager
    def _routed(self, language: Language) -> Iterator[None]:
        number = self._number(language)
        with ExitStack() as stack:
            for owner in self._owners():
                name = None if number == FULL else attached(owner).subnets.languages[number]
                stack.enter_context(run_with(owner, name))
            yield


def _steps(steps: int, low: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < low:
        raise ValueError(f"the number of inner steps is {steps!r} (expected an integer >= {low})")
    return steps


def _check_support(language: Language, support: Sequence[Any], steps: int) -> None:
    if not isinstance(support, (list, tuple)):
        raise TypeError(f"language {language!r}: expected support as a list of batches, given {type(support).__name__}")
    if steps and not support:
        raise ValueError(f"language {language!r}: no support batch to adapt on")
