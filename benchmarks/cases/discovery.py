"""Finding static subnetworks by pruning in rounds, against the same rounds with pruned units multiplied by zero.

The model is the small bed: a parser from scratch, and random sentences of several languages. Every round scores the
units that are left by the gradient of their gates and drops a tenth of all, until `density` of them are left.
"""

from __future__ import annotations

import cProfile
import math
import pstats
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.measure import Side
from benchmarks.parser_bed import ParserBed
from benchmarks.setting import Setting
from fastmask.models.structure import structure_of
from fastmask.tasks.parsing.batch import Batch

__all__ = ["Discovery", "MultiplyByZero"]

DROP = 0.1
SCORING_BATCHES = 2  # of each language
CHECKED_SENTENCES, CHECKED_LANGUAGES = 4, 2  # in float64


class MultiplyByZero:
    """The rounds in plain PyTorch: the full network runs, and each unit's output is multiplied by its gate, 1 or 0.

    Args:
        model: plain, a supported family.
        loss: runs the model on a batch -> one loss for each example [B].
        every_gradient: also compute the gradients of all parameters, as a plain `loss.backward()` does.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Batch], Tensor], every_gradient: bool) -> None:
        self.model, self.loss, self.every_gradient = model, loss, every_gradient
        structure = structure_of(model)
        # The modules that consume heads, then those that consume neurons, of all layers.
        groups = [structure.attentions, structure.ffns]
        self.consumers = [[group.columns[0] for group in of_kind] for of_kind in groups]
        self.sizes = [of_kind[0].units for of_kind in groups]

    def found(self, batches: dict[str, list[Batch]], density: float) -> fm.Subnetworks:
        """The subnetwork of each language, down to `density`."""
        masks = [self._of_one(own, density) for own in batches.values()]
        heads, neurons = (torch.stack(keeps) for keeps in zip(*masks, strict=True))
        return fm.Subnetworks(list(batches), heads, neurons)

    def _of_one(self, batches: list[Batch], density: float) -> list[Tensor]:
        layers = len(self.consumers[0])
        keeps = [torch.ones(layers, size, dtype=torch.bool) for size in self.sizes]
        surplus = [int(k.sum()) - max(layers, round(density * k.numel())) for k in keeps]
        steps = [max(1, int(DROP * k.numel())) for k in keeps]
        rounds = max(math.ceil(s / step - 0.5) for s, step in zip(surplus, steps, strict=True))
        for left in range(max(rounds, int(max(surplus) > 0)), 0, -1):
            scores = self._scores(keeps, batches)
            counts = [math.ceil(s / left) for s in surplus]
            keeps = [_without_lowest(*each) for each in zip(keeps, scores, counts, strict=True)]
            surplus = [s - count for s, count in zip(surplus, counts, strict=True)]
        return keeps

    def _scores(self, keeps: list[Tensor], batches: list[Batch]) -> list[Tensor]:
        """|d loss / d gate| of each unit, averaged over sentences, each layer divided by its norm."""
        totals = [torch.zeros(keep.shape, dtype=torch.float64) for keep in keeps]
        sentences = 0
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for batch in batches:
            with self._gated(keeps) as gates:
                losses = self.loss(batch)
                flat = [gate for kind in gates for gate in kind]
                if self.every_gradient:
                    found = torch.autograd.grad(losses.sum(), [*flat, *parameters], allow_unused=True)[: len(flat)]
                else:
                    found = torch.autograd.grad(losses.sum(), flat)
            sentences += len(losses)
            for at, gradient in enumerate(found):
                totals[at // len(gates[0])][at % len(gates[0])] += gradient.abs().sum(0).double()
        live = [(total / sentences).masked_fill(~keep, 0) for total, keep in zip(totals, keeps, strict=True)]
        return [score / score.norm(dim=1, keepdim=True).clamp(min=1e-300) for score in live]

    @contextmanager
    def _gated(self, keeps: list[Tensor]) -> Iterator[list[list[Tensor]]]:
        """Multiply what each consumer reads; yields the gates [B, units], by kind and layer, once the model has run."""
        gates: list[list[Tensor]] = [[], []]
        handles = []
        for kind, names in enumerate(self.consumers):
            for name, keep in zip(names, keeps[kind], strict=True):

                def hook(module: nn.Module, inputs: tuple[Tensor], kind: int = kind, keep: Tensor = keep) -> Tensor:
                    (x,) = inputs
                    gate = keep.to(x.dtype).expand(x.shape[0], -1).clone().requires_grad_()
                    gates[kind].append(gate)
                    return (x.unflatten(-1, (len(keep), -1)) * gate[:, None, :, None]).flatten(-2)

                handles.append(self.model.get_submodule(name).register_forward_pre_hook(hook))
        try:
            yield gates
        finally:
            for handle in handles:
                handle.remove()


def _without_lowest(keep: Tensor, score: Tensor, count: int) -> Tensor:
    """Drop the `count` live units of the lowest score, but never the best of a layer."""
    best = set((score.masked_fill(~keep, -1).argmax(1) + torch.arange(len(keep)) * keep.shape[1]).tolist())
    order = [unit for unit in keep.flatten().nonzero().flatten().tolist() if unit not in best]
    order.sort(key=score.flatten().tolist().__getitem__)
    smaller = keep.flatten().clone()
    smaller[order[:count]] = False
    return smaller.view_as(keep)


class Discovery(Case):
    """Static masks over heads and neurons for every language, down to `density`; `batch` sentences are scored at once.

    The default density is about what tau 0.95 keeps of the small parser. "multiply" scores the same rounds with dead
    units multiplied by zero; "multiply-all" also computes the gradients of all parameters, which a plain
    `loss.backward()` does.
    """

    name = "discovery"
    units = ("both",)
    parts = ("rounds",)
    implementations = ("multiply", "fastmask", "multiply-all")
    defaults: ClassVar[dict[str, Any]] = {"shape": "small", "density": 0.35, "batch": 32, "tokens": 20}
    warm_up = 0
    least = 3

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        self.bed = ParserBed(setting, setting.batch * SCORING_BATCHES)
        self.parser = self.bed.parser.eval()
        self.batches = self._batches(setting.batch, setting.languages)
        self.found: dict[str, fm.Subnetworks] = {}

    def _batches(self, size: int, languages: int) -> dict[str, list[Batch]]:
        collate = self.parser.features.collate
        return {
            name: [collate(data.select(range(i, i + size))) for i in range(0, size * SCORING_BATCHES, size)]  # type: ignore[arg-type]
            for name, data in list(self.bed.data.items())[:languages]
        }

    def _loss(self, batch: Batch) -> Tensor:
        losses = self.parser(batch).loss_per_sentence
        assert losses is not None
        return losses

    def _run(self, name: str, batches: dict[str, list[Batch]]) -> fm.Subnetworks:
        density = self.setting.density
        if name == "fastmask":
            return fm.discover(self.parser.encoder, batches, self._loss, units="both", density=density, drop=DROP)
        encoder = self.parser.encoder
        required = [p for p in encoder.parameters() if p.requires_grad]
        if name == "multiply":
            for parameter in required:
                parameter.requires_grad_(False)
        try:
            return MultiplyByZero(encoder, self._loss, name == "multiply-all").found(batches, density)
        finally:
            for parameter in required:
                parameter.requires_grad_(True)

    def check(self) -> None:
        """In float64 all find the same masks, on a few sentences; in float32 near ties may fall either way."""
        self.parser.double()
        try:
            few = self._batches(min(CHECKED_SENTENCES, self.setting.batch), CHECKED_LANGUAGES)
            expected = self._run("multiply", few)
            for name in self.chosen[1:]:
                if self._run(name, few) != expected:
                    raise WrongResultError(f"{name} finds other subnetworks than multiply: nothing is timed")
        finally:
            self.parser.float()

    def sides(self, part: str) -> dict[str, Side]:
        """All rounds of all languages."""

        def side(name: str) -> Side:
            return Side(lambda: self.found.__setitem__(name, self._run(name, self.batches)))

        return {name: side(name) for name in self.chosen}

    def ideal(self) -> float:
        """Of the FLOPs of the encoder: dense rounds over rounds that shrink."""
        shares, left = [], 1.0
        while left > self.setting.density + 1e-9:
            shares.append(left)
            left = max(left - DROP, self.setting.density)
        return len(shares) / sum(shares)

    def findings(self, times: dict[str, dict[str, list[float]]]) -> list[str]:
        """How far float32's masks agree, and where the time goes."""
        notes = []
        if {"multiply", "fastmask"} <= self.found.keys():
            one, other = self.found["multiply"], self.found["fastmask"]
            pairs = ((one.heads, other.heads), (one.neurons, other.neurons))
            differing = sum(int((a != b).sum()) for a, b in pairs if a is not None and b is not None)
            size = sum(a.numel() for a, _ in pairs if a is not None)
            notes.append(f"in float32 the masks differ in {differing} of {size} units")
        return [*notes, self._shares()]

    def _shares(self) -> str:
        """Where a run of ours spends its time, by Python's profiler, which adds some of its own."""
        profiler = cProfile.Profile()
        profiler.runcall(self._run, "fastmask", self.batches)
        spent: dict[str, float] = {}
        stats: Any = pstats.Stats(profiler)
        for (_, _, function), (_, _, _, cumulative, _) in stats.stats.items():
            spent[function] = spent.get(function, 0.0) + cumulative
        every = stats.total_tt
        named = {
            "forward": spent.get("_loss", 0.0),
            "backward": spent.get("_engine_run_backward", 0.0),
            "attach and detach": spent.get("attach", 0.0) + spent.get("detach", 0.0),
        }
        named["the rest"] = every - sum(named.values())
        return "time of fastmask: " + ", ".join(f"{what} {seconds / every:.0%}" for what, seconds in named.items())
