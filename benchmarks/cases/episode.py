"""An episode of first-order MAML: for each language 5 inner steps on a support batch, then a query batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmask as fm
from benchmarks.baselines import units_of_mask
from benchmarks.cases.case import DENSE, Case
from benchmarks.cases.encoder import ideal_of
from benchmarks.checking import check_all, check_baseline
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.meta import Task

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
    defaults: ClassVar[dict[str, Any]] = {"languages": 2, "present": 2, "batch": 20, "tokens": 32}
    least = 5

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        from transformers import BertConfig, BertForTokenClassification

        super().__init__(setting, names)
        sizes, vocabulary = setting.sizes, 100 if setting.shape == "toy" else 30522
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=sizes.hidden, num_hidden_layers=setting.layers,
            num_attention_heads=sizes.heads, intermediate_size=sizes.ffn, num_labels=CLASSES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        plain, shape = BertForTokenClassification(config).train(), (setting.batch, setting.tokens)
        languages = [f"language {i}" for i in range(setting.languages)]
        self.subnets = fm.Subnetworks.random(config, languages, setting.density, seed=0, units="both")
        self.masked = fm.attach(copy.deepcopy(plain), self.subnets)
        self.multipliers = [self._multipliers(number) for number in range(setting.present)]
        self.batches: list[list[Batch]] = [  # support and query of each language
            [(torch.randint(vocabulary, shape), torch.randint(CLASSES, shape)) for _ in range(2)]
            for _ in range(setting.present)
        ]
        self.models = {name: self.masked if name == "fastmask" else copy.deepcopy(plain) for name in self.chosen}
        if "full" in self.models:
            fm.attach(self.models["full"], self.subnets)
        self.runs = {name: self._run(name, model) for name, model in self.models.items()}

    @property
    def tokens(self) -> int:
        """Of all support passes and the query."""
        return self.setting.present * (STEPS + 1) * super().tokens

    def _run(self, name: str, model: nn.Module) -> Callable[[], object]:
        if name in ("dense", "multiply"):
            return lambda: self._with_clones(model, masks=name == "multiply")
        rates = {"inner_steps": STEPS, "inner_learning_rate": RATE}
        learner = fm.MetaLearner(model, lambda batch: _loss(model(batch[0]).logits, batch[1]), **rates)  # type: ignore[arg-type]
        whose = self.subnets.languages if name == "fastmask" else [None] * self.setting.languages
        tasks = [Task(own, [support], query) for own, (support, query) in zip(whose, self.batches, strict=False)]
        return lambda: learner.episode(tasks)

    def _with_clones(self, model: nn.Module, masks: bool) -> None:
        """Copies of all parameters as fast weights, masks multiplied onto them in every pass."""

        def gradient(phi: dict[str, Tensor], multipliers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
            masked = {name: p * multipliers[name] if name in multipliers else p for name, p in phi.items()}
            loss = _loss(functional_call(model, masked, (batch[0],)).logits, batch[1])
            return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))

        for number, (support, query) in enumerate(self.batches):
            multipliers = self.multipliers[number] if masks else {}
            phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            for _ in range(STEPS):
                grads = gradient(phi, multipliers, support)
                phi = {name: (p - RATE * grads[name]).detach().requires_grad_() for name, p in phi.items()}
            grads = gradient(phi, multipliers, query)
            for name, parameter in model.named_parameters():
                share = grads[name] / len(self.batches)
                parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)

    def _multipliers(self, language: int) -> dict[str, Tensor]:
        """What masked parameters are multiplied by: vectors, which broadcast over rows or columns."""
        found = {}
        for name, layer in self.masked.named_modules():
            if isinstance(layer, fm.MaskedLinear):
                keep = units_of_mask(layer.mask)[1 + language].to(layer.weight.dtype)
                found[f"{name}.weight"] = keep[:, None] if layer.mask.kind == "rows" else keep
                if layer.mask.kind == "rows":
                    found[f"{name}.bias"] = keep
        return found

    def sides(self, part: str) -> dict[str, Side]:
        """One episode."""
        return {name: Side(run, self.models[name].zero_grad) for name, run in self.runs.items()}

    def check(self) -> None:
        """Meta-gradients against those of clones in float64, masked or not."""
        plain = copy.deepcopy(self.models["dense"])
        for masks, names in ((False, DENSE), (True, ("fastmask", "multiply"))):
            clones = partial(self._with_clones, masks=masks)
            truth, usual = (self._meta_gradient(own, clones) for own in (copy.deepcopy(plain).double(), plain))
            for name in set(names) & set(self.chosen):
                found = self._meta_gradient(self.models[name], lambda _, name=name: self.runs[name]())  # type: ignore[misc]
                if name == "fastmask":
                    check_all(self.setting.words(), ("meta-gradient",), [found], [truth], [usual])
                else:
                    check_baseline(name, [found], [truth])

    def _meta_gradient(self, model: nn.Module, run: Callable[[nn.Module], object]) -> Tensor:
        """In one vector, without keys' biases, whose true gradient is 0."""
        run(model)
        named = [(name, p.grad) for name, p in model.named_parameters() if not name.endswith("key.bias")]
        found = torch.cat([grad.flatten() for _, grad in named if grad is not None])
        model.zero_grad()
        return found

    def ideal(self, name: str) -> float:
        """FLOPs of the encoder's products and of attention."""
        return 1.0 if name in DENSE else ideal_of(self.subnets, self.setting, torch.arange(self.setting.present))

    def mask_bytes(self) -> int:
        """In all layers."""
        return sum(layer.mask.nbytes for layer in self.masked.modules() if isinstance(layer, fm.MaskedLinear))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
