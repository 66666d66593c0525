"""An episode of first-order MAML: for each language 5 inner steps on a support batch, then a query batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmask as fm
from benchmarks.baselines import Task, multiply, with_rival
from benchmarks.cases.case import DENSE, Case
from benchmarks.cases.encoder import bert_config, gradients, ideal_of, masks_in, subnets_of, twin_of
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.meta import Task as MetaTask

__all__ = ["Episode"]

CLASSES, STEPS, RATE = 20, 5, 1e-3
Batch = tuple[Tensor, Tensor]


class Episode(Case):
    """A meta-gradient of a token classifier. "dense" and "multiply" clone all parameters; "multiply" masks the clones.

    "full" and "fastmask" are `MetaLearner`, with the full network and with each language's subnetwork.
    """

    name = "episode"
    units = ("both",)
    parts = ("episode",)
    implementations = (*DENSE, "fastmask", "multiply")
    results_are = ("meta-gradient",)
    defaults: ClassVar[dict[str, Any]] = {"languages": 2, "present": 2, "batch": 20, "tokens": 32}
    least = 5

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        from transformers import BertForTokenClassification

        super().__init__(setting, names)
        vocabulary, shape = 100 if setting.shape == "toy" else 30522, (setting.batch, setting.tokens)
        torch.manual_seed(0)
        config = bert_config(setting.sizes, setting.layers, vocab_size=vocabulary, num_labels=CLASSES)
        self.plain = BertForTokenClassification(config).train()
        self.subnets = subnets_of(self.plain, setting)
        self.masks = masks_in(fm.attach(copy.deepcopy(self.plain), self.subnets))
        self.batches: list[list[Batch]] = [  # support and query of each language
            [(torch.randint(vocabulary, shape), torch.randint(CLASSES, shape)) for _ in range(2)]
            for _ in range(setting.present)
        ]
        self.models = {name: self.model(name) for name in self.chosen}
        self.runs = {name: self.episode(name, model) for name, model in self.models.items()}

    @property
    def tokens(self) -> int:
        """Of all support passes and the query."""
        return self.setting.present * (STEPS + 1) * super().tokens

    def model(self, name: str) -> nn.Module:
        """A model of its own, attached where it is fastmask's."""
        model = copy.deepcopy(self.plain)
        return fm.attach(model, self.subnets) if name in ("full", "fastmask") else model

    def episode(self, name: str, model: nn.Module) -> Callable[[], object]:
        """What leaves the meta-gradient in the model."""
        if name in ("full", "fastmask"):
            learner = fm.MetaLearner(
                model, lambda batch: _loss(model(batch[0]), batch), inner_steps=STEPS, inner_learning_rate=RATE
            )
            whose = [language if name == "fastmask" else None for language in self.subnets.languages]
            tasks = [MetaTask(own, [s], query) for own, (s, query) in zip(whose, self.batches, strict=False)]
            return lambda: learner.episode(tasks)
        masked = [model] * len(self.batches)
        if name == "multiply":
            masked = [self._masked(model, language) for language in range(len(self.batches))]
        return lambda: _with_clones(model, masked, self.batches)

    def _masked(self, model: nn.Module, language: int) -> nn.Module:
        """The model with one language's masks, which are multiplied onto its weights in every pass."""
        ids = torch.full((self.setting.batch,), language)
        return with_rival(twin_of(model), multiply, {path: Task(mask, ids) for path, mask in self.masks.items()})

    def sides(self, part: str) -> dict[str, Side]:
        return {name: Side(run, self.models[name].zero_grad) for name, run in self.runs.items()}

    def references(self, name: str) -> tuple[str, str]:
        return ("dense", "dense") if name in DENSE else ("multiply", "multiply")

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        model = self.models[name] if dtype is None else self.model(name).to(dtype)
        episode = self.runs[name] if dtype is None else self.episode(name, model)
        model.zero_grad()
        episode()
        found = gradients(model)
        model.zero_grad()
        return [found]

    def ideal(self, name: str) -> float:
        """FLOPs of the encoder's products and of attention."""
        return 1.0 if name in DENSE else ideal_of(self.subnets, self.setting, torch.arange(self.setting.present))


def _with_clones(model: nn.Module, masked: Sequence[nn.Module], batches: Sequence[Sequence[Batch]]) -> None:
    """Copies of all parameters as fast weights, which run through each language's `masked` model."""
    for own, (support, query) in zip(masked, batches, strict=True):
        phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        for _ in range(STEPS):
            grads = _gradient(own, phi, support)
            phi = {name: (p - RATE * grads[name]).detach().requires_grad_() for name, p in phi.items()}
        grads = _gradient(own, phi, query)
        for name, parameter in model.named_parameters():
            share = grads[name] / len(batches)
            parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)


def _gradient(model: nn.Module, phi: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    loss = _loss(functional_call(model, phi, (batch[0],)), batch)
    return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))


def _loss(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), batch[1].flatten())
