"""One episode of first-order MAML on a BERT encoder, against clones and multiplied masks: time, and peak memory.

Memory is measured in a fresh process for each side (this file, run as a module): the highest resident size that the
operating system saw (`getrusage`) after one episode, less the resident size just before it, when model, masks and
batches are there and `.grad` is not.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import fastmask as fm
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.cases.encoder import live_flops
from benchmarks.machine import ROOT
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.meta import Task

__all__ = ["Bed", "Episode"]

CLASSES, STEPS, RATE = 20, 5, 1e-3
Batch = tuple[Tensor, Tensor]


class Bed:
    """A model, its subnetworks over heads and neurons, and a support and a query batch of each language; no dropout."""

    def __init__(self, setting: Setting) -> None:
        from transformers import BertConfig, BertForTokenClassification

        self.setting, sizes = setting, setting.sizes
        self.vocabulary = 100 if setting.shape == "toy" else 30522
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=sizes.hidden,
            num_hidden_layers=setting.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        torch.manual_seed(0)
        self.model = BertForTokenClassification(config).train()
        self.names = [f"language {i}" for i in range(setting.languages)]
        self.subnets = fm.Subnetworks.random(config, self.names, setting.density, seed=0, units="both")
        self.batches = [[self._batch() for _ in range(2)] for _ in self.names]

    def _batch(self) -> Batch:
        shape = (self.setting.batch, self.setting.tokens)
        return torch.randint(self.vocabulary, shape), torch.randint(CLASSES, shape)

    def literal(self) -> Side:
        """Copies of all parameters as fast weights, masks multiplied onto them in every pass."""
        model, languages = self.model, self.setting.languages
        every = [self._multipliers(number) for number in range(languages)]

        def gradient(phi: dict[str, Tensor], multipliers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
            masked = {name: p * multipliers[name] if name in multipliers else p for name, p in phi.items()}
            loss = _loss(functional_call(model, masked, (batch[0],)).logits, batch[1])
            return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))

        def run() -> None:
            for multipliers, (support, query) in zip(every, self.batches, strict=True):
                phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
                for _ in range(STEPS):
                    grads = gradient(phi, multipliers, support)
                    phi = {name: (p - RATE * grads[name]).detach().requires_grad_() for name, p in phi.items()}
                grads = gradient(phi, multipliers, query)
                for name, parameter in model.named_parameters():
                    share = grads[name] / languages
                    parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)

        return Side(run, model.zero_grad)

    def ours(self) -> Side:
        """`MetaLearner` on the model with subnetworks attached."""
        model = fm.attach(self.model, self.subnets)
        learner = fm.MetaLearner(
            model,
            lambda batch: _loss(model(batch[0]).logits, batch[1]),
            inner_steps=STEPS,
            inner_learning_rate=RATE,
        )
        tasks = [Task(name, [support], query) for name, (support, query) in zip(self.names, self.batches, strict=True)]
        return Side(lambda: learner.episode(tasks), model.zero_grad)

    def side(self, name: str) -> Side:
        """One of the two; a bed gives one only, because ours attaches to the model."""
        return self.ours() if name == "fastmask" else self.literal()

    def _multipliers(self, language: int) -> dict[str, Tensor]:
        """What masked parameters are multiplied by; vectors, which broadcast over rows or columns."""
        attached = fm.attach(copy.deepcopy(self.model), self.subnets)
        multipliers = {}
        for name, layer in attached.named_modules():
            if isinstance(layer, fm.MaskedLinear):
                keep = layer.mask.to_dense()[language].float()
                rows = layer.mask.kind == "rows"
                multipliers[f"{name}.weight"] = keep[:, :1].clone() if rows else keep[:1].clone()
                if rows:
                    multipliers[f"{name}.bias"] = keep[:, 0].clone()
        return multipliers


class Episode(Case):
    """A meta-gradient: for each language 5 inner steps on a support batch, then a query batch."""

    name = "episode"
    units = ("both",)
    parts = ("episode",)
    implementations = ("literal", "fastmask")
    defaults: ClassVar[dict[str, Any]] = {"languages": 2, "present": 2, "batch": 20, "tokens": 32}
    warm_up = 1
    least = 5

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        self.beds = {name: Bed(setting) for name in self.chosen}
        self._sides = {name: bed.side(name) for name, bed in self.beds.items()}

    def check(self) -> None:
        """Both sides give one meta-gradient."""
        for side in self._sides.values():
            side.run()
        expected = dict(self.beds["literal"].model.named_parameters())
        for name, bed in self.beds.items():
            for what, parameter in bed.model.named_parameters():
                grad, wanted = parameter.grad, expected[what].grad
                assert wanted is not None
                # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
                if grad is None or not (grad - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7:
                    raise WrongResultError(f"the meta-gradient of {what} of {name} is wrong: nothing is timed")
        for side in self._sides.values():
            side.reset()

    def sides(self, part: str) -> dict[str, Side]:
        """One episode."""
        return self._sides

    def ideal(self) -> float:
        """Of the FLOPs of the encoder's products and of attention."""
        subnets = self.beds["literal"].subnets
        assert subnets.heads is not None
        assert subnets.neurons is not None
        shares = [keep.float().mean(2) for keep in (subnets.heads, subnets.neurons)]
        sizes, tokens = self.setting.sizes, self.setting.tokens
        full = live_flops(sizes, tokens, *(torch.ones_like(share) for share in shares))
        return float(full.sum() / live_flops(sizes, tokens, *shares).sum())

    def peaks(self) -> dict[str, int]:
        """Bytes that a fresh process grows by in its first episode."""
        return {name: self._in_fresh_process(name) for name in self.chosen}

    def _in_fresh_process(self, side: str) -> int:
        command = [sys.executable, "-m", "benchmarks.cases.episode", side, json.dumps(asdict(self.setting))]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            raise RuntimeError(f"the episode of {side} in a process of its own failed: {done.stderr[-500:]}")
        return int(done.stdout)


def peak_growth(side: str, setting: Setting) -> int:
    """Bytes that this process grows by in its first episode of one side."""
    torch.set_num_threads(setting.threads)
    run = Bed(setting).side(side).run
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets what was the most so far
    before = _most()
    run()
    return _most() - before


def _most() -> int:
    """The most bytes that this process has held; `getrusage` would also count what the one that started it held."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], Setting(**json.loads(sys.argv[2]))))
