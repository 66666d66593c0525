"""One episode of first-order MAML on a BERT-base shape of 4 layers, against clones and multiplied masks.

`python -m benchmarks.episode` prints the ratio of times (interleaved, pairwise) and of peak memory. Memory is measured
in one fresh process for each side: the highest resident size that the operating system saw (`getrusage`) after one
episode, less the resident size just before it, when model, masks and batches are there and `.grad` is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import BertConfig, BertForTokenClassification

import fastmask as fm
from benchmarks.__main__ import machine
from benchmarks.measure import Side, compare
from fastmask.meta import Task

__all__ = ["Episode"]

CLASSES = 20
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What an episode is made of; one support batch and one query batch for each language."""

    languages: int = 2
    steps: int = 5
    sentences: int = 20
    tokens: int = 32
    vocabulary: int = 30522
    density: float = 0.5
    rate: float = 1e-3


class Episode:
    """A model, its subnetworks over heads and neurons, and the batches of one meta-batch; dropout is off."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        config = BertConfig(
            num_hidden_layers=4,
            vocab_size=setting.vocabulary,
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
        shape = (self.setting.sentences, self.setting.tokens)
        return torch.randint(self.setting.vocabulary, shape), torch.randint(CLASSES, shape)

    def literal(self) -> Side:
        """Copies of all parameters as fast weights, masks multiplied onto them in every pass."""
        model, setting = self.model, self.setting
        every = [self._multipliers(number) for number in range(setting.languages)]

        def gradient(phi: dict[str, Tensor], multipliers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
            masked = {name: p * multipliers[name] if name in multipliers else p for name, p in phi.items()}
            loss = _loss(functional_call(model, masked, (batch[0],)).logits, batch[1])
            return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))

        def run() -> None:
            for multipliers, (support, query) in zip(every, self.batches, strict=True):
                phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
                for _ in range(setting.steps):
                    grads = gradient(phi, multipliers, support)
                    phi = {name: (p - setting.rate * grads[name]).detach().requires_grad_() for name, p in phi.items()}
                grads = gradient(phi, multipliers, query)
                for name, parameter in model.named_parameters():
                    share = grads[name] / setting.languages
                    parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)

        return Side(run, model.zero_grad)

    def ours(self) -> Side:
        """`MetaLearner` on the model with subnetworks attached."""
        model = fm.attach(self.model, self.subnets)
        learner = fm.MetaLearner(
            model,
            lambda batch: _loss(model(batch[0]).logits, batch[1]),
            inner_steps=self.setting.steps,
            inner_learning_rate=self.setting.rate,
        )
        tasks = [Task(name, [support], query) for name, (support, query) in zip(self.names, self.batches, strict=True)]
        return Side(lambda: learner.episode(tasks), model.zero_grad)

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


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def both(setting: Setting) -> tuple[Side, Side]:
    """The two sides of one episode, each with its own model, checked to give one meta-gradient.

    Raises:
        RuntimeError: they do not; nothing is timed.
    """
    first, second = Episode(setting), Episode(setting)
    literal, ours = first.literal(), second.ours()
    literal.run()
    ours.run()
    expected = dict(first.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        grad, wanted = parameter.grad, expected[name].grad
        assert wanted is not None
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        if grad is None or (grad - wanted).norm() > 1e-3 * wanted.norm() + 1e-7:
            raise RuntimeError(f"the meta-gradient of {name} is wrong: nothing is timed")
    return literal, ours


def peak_growth(side: str, setting: Setting) -> int:
    """Bytes that this process grows by in its first episode of one side."""
    episode = Episode(setting)
    run = (episode.literal() if side == "literal" else episode.ours()).run
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before, highest = pages * os.sysconf("SC_PAGE_SIZE"), _highest()
    run()
    if _highest() <= highest:
        raise RuntimeError("building the model took more memory than the episode: its peak is not known")
    return _highest() - before


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _in_fresh_process(side: str, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.episode", "--peak", side, "--threads", str(options.threads)]
    command += ["--languages", str(options.languages), "--vocabulary", str(options.vocabulary)]
    command += ["--steps", str(options.steps), "--tokens", str(options.tokens)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.episode", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="time for the ratio of times (default: 120)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--languages", type=int, default=2, help="languages in the meta-batch (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="inner steps K (default: 5)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each of 20 sentences (default: 32)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="rows of the word embedding (default: 30522)")
    parser.add_argument("--memory-only", action="store_true", help="leave the times out")
    parser.add_argument("--peak", choices=("literal", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(
        languages=options.languages, steps=options.steps, tokens=options.tokens, vocabulary=options.vocabulary
    )
    if options.peak:
        print(json.dumps({"bytes": peak_growth(options.peak, setting)}))
        return 0

    print(f"one FOMAML episode, heads + neurons {setting.density:.0%}; {setting}")
    literal, ours = (_in_fresh_process(side, options) for side in ("literal", "ours"))
    print(f"peak memory: {literal / 2**20:.0f} -> {ours / 2**20:.0f} MiB, {ours / literal:.3f}x (target <= 0.5x)")
    reached = ours <= 0.5 * literal
    if not options.memory_only:
        ratio = compare(*both(setting), options.seconds, warm_up=1)
        print(
            f"time: {ratio.baseline_ms:.0f} -> {ratio.ours_ms:.0f} ms, {ratio.median:.2f}x faster, quartiles "
            f"{ratio.low:.2f}-{ratio.high:.2f}, {ratio.pairs} pairs (target >= 2x)"
        )
        reached = reached and ratio.median >= 2
    print(machine())
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
