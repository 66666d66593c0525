"""A BERT-base encoder of 4 layers, forward and backward: subnetworks against the dense model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import fastmask as fm
from benchmarks.measure import Side

__all__ = ["Encoder"]

LANGUAGES = 8


class Encoder:
    """The same encoder twice: dense, and with random subnetworks over heads and neurons attached.

    Dropout is off on both sides: a CPU draws its random numbers one by one, which would hide the rest.

    Args:
        batch, tokens: shape of the input, [batch, tokens, 768]; random activations and upstream gradients.
        density: share of the heads and of the neurons that every language owns.
        languages: how many languages the batch holds, sorted, in equal shares.
    """

    def __init__(self, batch: int, tokens: int, density: float, languages: int) -> None:
        config = BertConfig(
            num_hidden_layers=4, vocab_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        torch.manual_seed(0)
        self.dense = BertModel(config, add_pooling_layer=False).train()
        self.masked = copy.deepcopy(self.dense)
        names = [f"language {i}" for i in range(LANGUAGES)]
        fm.attach(self.masked, fm.Subnetworks.random(config, names, density, seed=0, units="both"))
        self.ids = torch.arange(batch) * languages // batch
        self.x = torch.randn(batch, tokens, config.hidden_size)
        self.upstream = torch.randn(batch, tokens, config.hidden_size)
        self.density = density

    def run_dense(self) -> Tensor:
        """Forward pass of the dense model."""
        output: Tensor = self.dense(inputs_embeds=self.x)[0]
        return output

    def run_masked(self) -> Tensor:
        """Forward pass with subnetworks."""
        output: Tensor = self.masked(inputs_embeds=self.x, language_ids=self.ids)[0]
        return output

    def sides(self) -> tuple[Side, Side]:
        """Forward and backward of the dense model, and of the one with subnetworks."""
        return (
            Side(lambda: self.run_dense().backward(self.upstream), self.dense.zero_grad),
            Side(lambda: self.run_masked().backward(self.upstream), self.masked.zero_grad),
        )

    def ideal(self) -> float:
        """The ratio if time followed the FLOPs of the linear layers and attention, which all scale with density."""
        return 1 / self.density

    def check(self) -> None:
        """See that both sides compute what they should before they are timed: dead units give a zero gradient."""
        self.sides()[1].run()
        layer = self.masked.encoder.layer[0].intermediate.dense
        owned = layer.mask.to_dense()[self.ids.unique()].any(0)
        if layer.weight.grad[~owned].any() or not layer.weight.grad[owned].any():
            raise RuntimeError("the masked encoder's gradient is wrong: nothing is timed")
        with fm.language(self.masked, None):
            full = self.masked(inputs_embeds=self.x)[0]
        torch.testing.assert_close(full, self.run_dense(), rtol=1e-4, atol=1e-4)
