"""Few-shot adaptation: which examples of an unseen language make a support set, and fine-tuning steps on them.

Steps are taken in place, and undone afterwards unless they are kept. By default they are the inner steps of an episode
of FOMAML in training (`fastmask.training.batches`), to the bit: plain SGD, the whole support set as one batch in each
step, nothing clipped, two learning rates (`Task.rates`), and dropout off. What meta-learning prepares for is then what
happens in the test, and an evaluation does not depend on random numbers. AdamW without weight decay is the other
choice, as sensitive to the learning rate (docs/log/2026-11-20-adapting.md); no episode takes such steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.masks import FULL, checked_id
from fastmask.meta.fast_weights import FastWeights
from fastmask.meta.learner import MetaLearner
from fastmask.models.attach import attached
from fastmask.models.contexts import evaluating

if TYPE_CHECKING:
    from fastmask.tasks.task import Task

SET_ASIDE = 100
_SETS, _POOL = range(2)  # what a random stream is for


# ---- support sets


def support_sets(n_pool: int, size: int, count: int, seed: int, language: str) -> list[np.ndarray]:
    """`count` random support sets: int64 [size] rows of a pool of `n_pool` sentences, in random order.

    No row twice in a set, and none in two sets while the pool lasts; then the pool is drawn from anew. The first sets
    are the same however many are drawn.

    Raises:
        ValueError: the pool is smaller than a set, or a number is below 0.
    """
    if size < 0 or count < 0 or seed < 0:
        raise ValueError(f"size is {size}, count {count} and seed {seed} (expected none below 0)")
    if n_pool < size:
        raise ValueError(f"language {language!r} has {n_pool} sentences for support sets (expected at least {size})")
    at_once = n_pool // size if size else max(count, 1)  # sets that one drawing of the pool makes
    orders = [_random(seed, _SETS, language, round_).permutation(n_pool) for round_ in range(-(-count // at_once))]
    return [orders[n // at_once][n % at_once * size : (n % at_once + 1) * size] for n in range(count)]


@dataclass(frozen=True)
class Pool:
    """The sentences of an unseen language, parted.

    Attributes:
        support: rows that support sets are drawn from.
        test: rows that are scored, the same for all support sets; none has the words of a support row.
        source: the split that the support rows are from.
        dropped: test rows that were left out because a support row has the same words.
    """

    support: list[Mapping[str, Any]] = field(repr=False)
    test: list[Mapping[str, Any]] = field(repr=False)
    source: str
    dropped: int


def split_pool(
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    size: int,
    seed: int,
    language: str,
    same: Callable[[Mapping[str, Any]], Any] = lambda row: tuple(row["words"]),
) -> Pool:
    """Part an unseen language's sentences into a pool for support sets and a test.

    The pool is the train split if that holds a support set, else the dev split, else a random part of the test split,
    which is then not tested on: `SET_ASIDE` sentences, at most half of them, unless a support set takes more.

    Args:
        splits: split -> rows; "test" must be there.
        size: sentences of a support set; 0 where there are none (zero-shot).
        seed: of the part of the test split.
        language: for messages, and part of the seed.
        same: what makes two rows the same example; by default their "words".

    Raises:
        ValueError: no test sentences, or no split with enough sentences; the message says how many there are.
    """
    rows = {name: list(splits.get(name, ())) for name in ("train", "dev", "test")}
    test = rows["test"]
    if not test:
        raise ValueError(f"language {language!r} has no test sentences (splits given: {', '.join(splits) or 'none'})")
    source = next((name for name in ("train", "dev") if len(rows[name]) >= max(size, 1)), "test")
    support = rows[source]
    if source == "test":
        if size >= len(test):
            counts = ", ".join(f"{len(found)} in {name}" for name, found in rows.items())
            raise ValueError(
                f"language {language!r} has too few sentences for a support set of {size}: {counts} "
                f"(expected {size} in train or dev, or more than {size} in test)"
            )
        number = 0 if size == 0 else max(size, min(SET_ASIDE, len(test) // 2))
        order = _random(seed, _POOL, language).permutation(len(test))
        support, test = ([test[row] for row in np.sort(part)] for part in (order[:number], order[number:]))
    left = without_repeats(test, support, same)
    if not left:
        raise ValueError(f"language {language!r}: every test sentence is also a support sentence")
    return Pool(support, left, source, len(test) - len(left))


def without_repeats(
    test: Iterable[Mapping[str, Any]], support: Iterable[Mapping[str, Any]], same: Callable[[Mapping[str, Any]], Any]
) -> list[Mapping[str, Any]]:
    """The test rows that are not `same` as a support row."""
    taken = {same(row) for row in support}
    return [row for row in test if same(row) not in taken]


def _random(seed: int, purpose: int, language: str, *counters: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, zlib.crc32(language.encode("utf-8")), *counters])


# ---- steps


class AdamWeights(FastWeights):
    """As `FastWeights`, with steps of `torch.optim.AdamW` without weight decay (Loshchilov and Hutter 2019).

    All that a step may change is copied at once, and gradients and moments of all of it exist together: four copies of
    the adapted parameters, also of a large table of embeddings. `parameter.grad` is the caller's after each step.
    """

    def __enter__(self) -> AdamWeights:
        super().__enter__()
        for parameter in self.rates:
            self._backup(parameter).save_all(parameter)
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in self.rates.items()]
        self._adam = torch.optim.AdamW(groups, weight_decay=0.0)
        return self

    def step(self, loss: Callable[[], Tensor], loss_scale: float = 1.0) -> Tensor:
        assert loss_scale == 1.0  # of training in half precision, which adapting is not
        value = loss()
        found = torch.autograd.grad(value, list(self.rates), allow_unused=True)
        theirs = [parameter.grad for parameter in self.rates]
        try:
            for parameter, gradient in zip(self.rates, found, strict=True):
                parameter.grad = None if gradient is None else self._backup(parameter).part.only(gradient)
            self._adam.step()
        finally:
            for parameter, own in zip(self.rates, theirs, strict=True):
                parameter.grad = own
        return value.detach()


OPTIMIZERS: dict[str, type[FastWeights]] = {"sgd": FastWeights, "adamw": AdamWeights}


class AdaptationDiverged(RuntimeError):  # noqa: N818 - it names what happened
    """A support loss that is not finite; the model is what it was before the first step."""


@contextmanager
def adapted(
    task: Task,
    support: Any,
    language_id: int,
    *,
    steps: int,
    head_lr: float,
    encoder_lr: float,
    optimizer: str = "sgd",
    keep: bool = False,
) -> Iterator[Tensor]:
    """The model after `steps` steps on `support`, inside the context; yields the support losses [steps].

    Only what subnetwork `language_id` may change does: live parts of masked weights, and everything shared. On leaving
    the context all is put back bit for bit, unless `keep` is set and no exception is on its way. Inside, the caller
    says which subnetwork runs, as always.

    Args:
        task: subnetworks may be attached to its encoder.
        support: `Examples` of the support set, all of them in each step.
        language_id: whose subnetwork, -1 for the full network.
        steps: K; with 0 nothing changes, and `support` may be empty.
        head_lr: learning rate of what is above the encoder.
        encoder_lr: learning rate of the encoder; see `Task.rates`.
        optimizer: "sgd" or "adamw" (without weight decay; moments start at zero).
        keep: leave the adapted weights in place.

    Raises:
        AdaptationDiverged: a support loss, also that after the last step, is not finite; nothing is changed.
        KeyError: not an optimizer.
        ValueError: no support example, a learning rate or number out of its range.
    """
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"the number of steps is {steps!r} (expected an integer >= 0)")
    if steps and not len(support):
        raise ValueError("no support example to adapt to")
    names = attached(task.encoder).subnets.languages if task.is_attached else ()
    checked_id(language_id, len(names))
    if not steps:
        with FastWeights(task.model, {}, language_id):  # buffers come back all the same
            yield torch.zeros(0, device="cpu")
        return
    done = 0

    def loss(batch: Any) -> Tensor:
        nonlocal done
        found = task.loss(batch).mean
        if not torch.isfinite(found):
            raise AdaptationDiverged(
                f"the support loss is {found.item()} after {done} of {steps} steps of {optimizer} with "
                f"learning rates {head_lr:g} (head) and {encoder_lr:g} (encoder): choose lower ones"
            )
        done += 1
        return found

    rates = task.rates(head_lr, encoder_lr)
    learner = MetaLearner(task.model, loss, inner_learning_rate=rates, inner_dropout=False)
    batch = task.collate(support).to(task.device)
    with learner.adapt(language_id, [batch], steps=steps, keep=keep, weights=OPTIMIZERS[optimizer]) as losses:
        name = None if language_id == FULL else names[language_id]
        with evaluating(task.model), task.reading(name), torch.no_grad():
            loss(batch)  # the last step, too, must have left a model that works
        yield losses
