"""Few-shot adaptation: a few fine-tuning steps on a support set, in place, undone afterwards unless they are kept.

By default these are the inner steps of an episode of FOMAML in training (`fastmask.training.episodes`), to the bit:
plain SGD, the whole support set as one batch in each step, nothing clipped, two learning rates (`Task.rates`), and
dropout off. What meta-learning prepares for is then what happens in the test, an evaluation does not depend on random
numbers, and a gradient of twenty sentences has no more noise than they bring. AdamW without weight decay is much less
sensitive to the learning rate; no episode takes such steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.masks import FULL
from fastmask.meta.fast_weights import FastWeights
from fastmask.meta.learner import MetaLearner
from fastmask.models.attach import attached
from fastmask.models.attach import language as run_with
from fastmask.models.modes import evaluating
from fastmask.unseen.adam import AdamWeights

if TYPE_CHECKING:
    from fastmask.tasks.task import Task

__all__ = ["DEFAULT_RATES", "DEFAULT_STEPS", "OPTIMIZERS", "AdaptationDiverged", "adapted"]

DEFAULT_STEPS = 20
# Of the head and of what is below it; for the small model, tried on two validation languages (Croatian and Telugu).
DEFAULT_RATES = {"sgd": (3e-3, 1e-3), "adamw": (3e-5, 3e-5)}
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
    name = _name(task, language_id)
    if not steps:
        with FastWeights(task.model, {}, language_id):  # buffers come back all the same
            yield torch.zeros(0)
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
    with ExitStack() as stack:
        with evaluating(task.model):
            fast = learner.adapt(language_id, [batch], steps=steps, keep=keep, weights=OPTIMIZERS[optimizer])
            losses = stack.enter_context(fast).support_losses
            with run_with(task.encoder, name) if task.is_attached else nullcontext(), torch.no_grad():
                loss(batch)  # the last step, too, must have left a model that works
        yield losses


def _name(task: Task, language_id: int) -> str | None:
    """The language's name, None for the full network."""
    if language_id == FULL:
        return None
    if not task.is_attached:
        raise ValueError(f"language id {language_id}, but the model has no subnetworks attached (expected -1)")
    languages = attached(task.encoder).subnets.languages
    if not 0 <= language_id < len(languages):
        raise ValueError(f"language id {language_id} is out of range: expected -1 to {len(languages) - 1}")
    return str(languages[language_id])
