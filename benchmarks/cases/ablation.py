"""Ablation of every head for every language: all variants of a layer in one batch against one head at a time.

The model is the small bed: an encoder with random masks over heads and neurons under a token classifier. Both sides run
the attached model with autograd off, on the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmask as fm
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.analysis.variants import flipped_losses, repeated
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork

__all__ = ["Ablation", "Bed", "Sizes"]

CLASSES, WORDS = 40, 4000


@dataclass(frozen=True)
class Sizes:
    """What is ablated, and on what; one batch for each language."""

    languages: int = 8
    layers: int = 4
    heads: int = 8
    sentences: int = 16
    tokens: int = 20
    density: float = 0.6
    head_size: int = 32
    ffn: int = 1024


class Bed:
    """A model with subnetworks, and a batch for each language; both sides give the same losses."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import BertConfig, BertForTokenClassification

        self.sizes = sizes
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=sizes.head_size * sizes.heads,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn,
            num_labels=CLASSES,
        )
        torch.manual_seed(0)
        names = [f"language {i}" for i in range(sizes.languages)]
        subnets = fm.Subnetworks.random(config, names, sizes.density, seed=0, units="both")
        self.model = fm.attach(BertForTokenClassification(config).eval(), subnets)
        shape = (sizes.sentences, sizes.tokens)
        self.batches = {
            name: {"input_ids": torch.randint(WORDS, shape), "labels": torch.randint(CLASSES, shape)} for name in names
        }

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """One loss for each sentence."""
        logits = self.model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").mean(1)

    def all_at_once(self, at_once: int = 512) -> Tensor:
        """Losses [languages, layers, heads, sentences] with each head flipped, by `fastmask.analysis.variants`."""
        sizes, found = self.sizes, []
        size = max(1, at_once // sizes.sentences)
        for name, batch in self.batches.items():
            for layer in range(sizes.layers):
                for which in torch.arange(sizes.heads).split(size):
                    arguments = (name, "heads", layer, which.tolist(), batch, sizes.sentences, self.loss, repeated)
                    found.append(flipped_losses(self.model, *arguments))
        return torch.cat(found).view(sizes.languages, sizes.layers, sizes.heads, -1)

    def one_at_a_time(self) -> Tensor:
        """The same, setting the language's masks anew for each head and running its batch."""
        sizes, found = self.sizes, []
        subnets = attached(self.model).subnets
        assert subnets.heads is not None
        for row, (name, batch) in enumerate(self.batches.items()):
            own = subnets.heads[row]
            for layer in range(sizes.layers):
                for head in range(sizes.heads):
                    flipped = own.clone()
                    flipped[layer, head] ^= True
                    set_subnetwork(self.model, name, heads=flipped)
                    with torch.no_grad(), fm.language(self.model, name):
                        found.append(self.loss(batch))
            set_subnetwork(self.model, name, heads=own)
        return torch.stack(found).view(sizes.languages, sizes.layers, sizes.heads, -1)


class Ablation(Case):
    """Losses of every language with each of its heads flipped; one batch of sentences for each language."""

    name = "ablation"
    units = ("both",)
    parts = ("losses",)
    implementations = ("one-at-a-time", "fastmask")
    defaults: ClassVar[dict[str, Any]] = {"shape": "small", "density": 0.6, "batch": 16, "tokens": 20}
    warm_up = 0
    least = 3

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        shape = setting.sizes
        self.bed = Bed(
            Sizes(
                languages=setting.languages, layers=setting.layers, heads=shape.heads, sentences=setting.batch,
                tokens=setting.tokens, density=setting.density, head_size=shape.hidden // shape.heads, ffn=shape.ffn,
            )
        )  # fmt: skip

    def check(self) -> None:
        """The losses of both sides are equal."""
        error = float((self.bed.all_at_once() - self.bed.one_at_a_time()).abs().max())
        if not error <= 1e-5:
            raise WrongResultError(f"the losses differ by {error}: nothing is timed")

    def sides(self, part: str) -> dict[str, Side]:
        """All heads of all languages, once."""
        sides = {"one-at-a-time": Side(self.bed.one_at_a_time), "fastmask": Side(self.bed.all_at_once)}
        return {name: sides[name] for name in self.chosen}

    def ideal(self) -> float:
        """The ratio of multiplications in the encoder's projections: a third of a layer's are the attention's.

        Of a flip in layer k, one at a time computes all layers; together, the layers below k and the attention of k
        (with all units) are shared by the layer's heads, and the feed-forward part of k and the layers above are not.
        """
        layers, heads = self.setting.layers, self.setting.sizes.heads
        shared = (layers - 1) / 2 + 1 / 3 / self.setting.density
        own = 2 / 3 + (layers - 1) / 2
        return layers / (own + shared / heads)
