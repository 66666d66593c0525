"""Training steps of the parser, whole: sampling and collating, forward, backward, clipping, optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastmask as fm
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.cases.encoder import live_flops
from benchmarks.measure import Side
from benchmarks.parser_bed import ParserBed
from benchmarks.setting import Setting
from benchmarks.variants import Variants
from fastmask.optim import LiveAdamW
from fastmask.tasks.parsing.batch import Batch
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.batches import MixedBatches
from fastmask.training.config import TrainConfig
from fastmask.training.engine import accelerator_for, build_optimizer, peak_rates

__all__ = ["Step"]

SENTENCES = 128  # of each language


class Trainer:
    """One parser and what the training loop has around it; `step` does what the loop does between two scores."""

    def __init__(self, bed: ParserBed, setting: Setting, optimizer: str, form: str) -> None:
        masked = form == "subnetworks"
        self.config = TrainConfig(
            batch_size=setting.batch, optimizer=optimizer, method="static" if masked else "full", device=setting.device,
            precision="no" if setting.autocast_dtype is None else "bf16",
        )  # fmt: skip
        self.accelerator = accelerator_for(setting.device, self.config.precision)
        self.parser: Parser = copy.deepcopy(bed.parser).to(self.accelerator.device)
        if form != "plain":
            fm.attach(self.parser.encoder, bed.subnets)
        self.full = form == "full"
        task = Parsing(self.parser)
        built = build_optimizer(task, self.config)
        self.announce = built.announce if isinstance(built, LiveAdamW) else None
        self.model, self.optimizer = self.accelerator.prepare(self.parser, built)
        rates = peak_rates(task, self.config)
        self.batches = MixedBatches(task, self.model, bed.data, self.config, rates, self.accelerator)
        self.numbers = {name: i for i, name in enumerate(bed.languages)}
        if masked:
            self.batches.use_subnetworks(self.numbers)
        self.model.train()
        self.done = 0

    def step(self) -> None:
        """One step of the training loop."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.languages():
            seen = self.batches.accumulate(self.done)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if self.announce is not None:
            self.announce([self.numbers[name] for name in seen.languages])
        self.optimizer.step()
        self.done = seen.step

    def cycle(self) -> None:
        """A step of each length quantile, as many as the sampler goes through before it begins again."""
        for _ in range(self.batches.sampler.bins):
            self.step()

    def languages(self) -> AbstractContextManager[None]:
        """What forward passes run in: the full network of an attached parser, or what the batch says."""
        return fm.language(self.parser.encoder, None) if self.full else nullcontext()

    def draw_cycle(self) -> None:
        """The data of a cycle."""
        for _ in range(self.batches.sampler.bins):
            self.draw()

    def draw(self) -> Batch:
        """The data of a step: what the loop does before the forward pass."""
        rows, languages = next(self.batches.sampler)
        batch = self.parser.features.collate(self.batches.joined.select(rows))
        if self.batches.ids is not None:
            batch.language_ids = self.batches.ids[torch.from_numpy(languages)]
        return batch.to(self.accelerator.device)


class Step(Case):
    """Training steps of the parser: data, forward, backward, optimiser; `tokens` is the mean length of a sentence.

    A run is a cycle of ten steps, one of each length quantile: a batch of the longest sentences takes ten times as long
    as one of the shortest, and gains twice as much, so that no single step says how many sentences a second go through.
    "data" is what sampling and collating take of it.
    """

    name = "step"
    units = ("both", "heads", "neurons")
    parts = ("ten steps",)
    warm_up = 1
    least = 3
    implementations = ("dense", "fastmask", "full", "fastmask-live", "data")
    defaults: ClassVar[dict[str, Any]] = {"languages": 8, "present": 8, "batch": 32, "tokens": 24}
    aside = ("data",)
    can = ("bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        self.bed = ParserBed(setting, SENTENCES)
        forms = {"dense": ("adamw", "plain"), "full": ("adamw", "full"), "fastmask": ("adamw", "subnetworks")}
        forms |= {"fastmask-live": ("live", "subnetworks"), "data": ("adamw", "subnetworks")}
        self.trainers = {name: Trainer(self.bed, setting, *forms[name]) for name in self.chosen}
        self._flops: tuple[float, float] | None = None

    @classmethod
    def refuse(cls, setting: Setting) -> None:
        """Batches mix all languages."""
        super().refuse(setting)
        if setting.present != setting.languages:
            raise ValueError(
                f"training mixes all languages: present is {setting.present} (expected {setting.languages}, "
                "the languages that masks are held for)"
            )

    def check(self) -> None:
        """The gradients of one batch, dropout off, are those of gates on heads and neurons."""
        trainer = Trainer(self.bed, self.setting, "adamw", "subnetworks")
        batch = trainer.draw()
        assert batch.language_ids is not None
        reference = copy.deepcopy(self.bed.parser).to(self.setting.torch_device)
        reference.encoder = Variants(reference.encoder, self.bed.subnets, batch.language_ids, share=False).of("gating")
        _compared(_gradients(trainer.parser, batch), _gradients(reference, batch), "the attached parser")
        if "full" in self.chosen:
            full, batch_of_all = self.trainers["full"], copy.copy(batch)
            batch_of_all.language_ids = None
            with full.languages():
                found = _gradients(full.parser, batch_of_all)
            dense = _gradients(self.trainers["dense"].parser, batch_of_all)
            _compared(found, dense, "the parser's full network")
        if "fastmask" in self.chosen:
            self._flops = self._counted(batch)

    def sides(self, part: str) -> dict[str, Side]:
        """A cycle of each, or the data of one."""
        trainers = self.trainers.items()
        return {name: Side(trainer.draw_cycle if name == "data" else trainer.cycle) for name, trainer in trainers}

    def ideal(self) -> float:
        """FLOPs of a dense forward and backward pass, all of the parser's, over those with the encoder's live part."""
        if self._flops is None:
            return 1.0
        every, saved = self._flops
        return every / (every - saved)

    def _counted(self, batch: Batch) -> tuple[float, float]:
        """FLOPs of a dense pass on a batch, and how many of them masks save."""
        parser = copy.deepcopy(self.bed.parser).to(self.setting.torch_device).eval()
        with FlopCounterMode(display=False) as counter:
            loss = parser(batch).loss
            assert loss is not None
            loss.backward()
        subnets, shape = self.bed.subnets, (self.setting.languages, self.setting.layers)
        shares = [
            torch.ones(shape) if keep is None else keep.float().mean(2) for keep in (subnets.heads, subnets.neurons)
        ]
        width = batch.word_mask.shape[1] + 1  # with the root
        full = live_flops(self.setting.sizes, width, *(torch.ones_like(share) for share in shares))
        live = live_flops(self.setting.sizes, width, *shares)
        assert batch.language_ids is not None
        ids = batch.language_ids.cpu()
        # Two FLOPs a multiply-add, once forward and twice backward.
        return float(counter.get_total_flops()), float(6 * width * (full - live)[ids].sum())

    def findings(self, times: dict[str, dict[str, list[float]]]) -> list[str]:
        """How much of a step its data take."""
        own = times.get("ten steps", {})
        if "data" not in own or "fastmask" not in own:
            return []
        shares = sorted(a / b for a, b in zip(own["data"], own["fastmask"], strict=True))
        return [f"data take {shares[len(shares) // 2]:.1%} of a step with subnetworks"]


def _compared(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """See that gradients are equal within rounding."""
    for name, wanted in expected.items():
        if not (found[name] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6:
            raise WrongResultError(f"the gradient of {name} of {what} is wrong: nothing is timed")


def _gradients(parser: Parser, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the loss, dropout off; a key's bias, whose true gradient is 0, is left out."""
    parser.eval()
    parser.zero_grad()
    loss = parser(batch).loss
    assert loss is not None
    loss.backward()
    found = {n: p.grad.clone() for n, p in parser.named_parameters() if p.grad is not None and "key.bias" not in n}
    parser.zero_grad()
    parser.train()
    return found
