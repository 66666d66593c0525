"""Ablation of every head for every language: one batch a layer against one head, one language at a time.

`python -m benchmarks.ablation` prints the ratio of times (interleaved, pairwise). The model is the small bed: an
encoder of 4 layers, 8 heads of 32, with random masks over heads and neurons, under a token classifier; 8 languages.
Both sides run the attached model with autograd off, on the same batches, and must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

import fastmask as fm
from benchmarks.__main__ import machine
from benchmarks.measure import Side, compare
from fastmask.analysis.variants import flipped_losses, repeated
from fastmask.models.attach import attached, set_subnetwork

__all__ = ["Bed"]

CLASSES = 40
TARGET = 2.0


@dataclass(frozen=True)
class Setting:
    """What is ablated, and on what; one batch for each language."""

    languages: int = 8
    layers: int = 4
    heads: int = 8
    sentences: int = 16
    tokens: int = 20
    density: float = 0.6


class Bed:
    """A model with subnetworks, and a batch for each language; both sides give the same losses."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        config = BertConfig(
            vocab_size=4000,
            hidden_size=32 * setting.heads,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            intermediate_size=128 * setting.heads,
            num_labels=CLASSES,
        )
        torch.manual_seed(0)
        names = [f"language {i}" for i in range(setting.languages)]
        subnets = fm.Subnetworks.random(config, names, setting.density, seed=0, units="both")
        self.model = fm.attach(BertForTokenClassification(config).eval(), subnets)
        shape = (setting.sentences, setting.tokens)
        self.batches = {
            name: {"input_ids": torch.randint(4000, shape), "labels": torch.randint(CLASSES, shape)} for name in names
        }

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """One loss for each sentence."""
        logits = self.model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").mean(1)

    def all_at_once(self, at_once: int = 512) -> Tensor:
        """Losses [languages, layers, heads, sentences] with each head flipped, by `fastmask.analysis.variants`."""
        setting, found = self.setting, []
        size = max(1, at_once // setting.sentences)
        for name, batch in self.batches.items():
            for layer in range(setting.layers):
                for which in torch.arange(setting.heads).split(size):
                    arguments = (name, "heads", layer, which.tolist(), batch, setting.sentences, self.loss, repeated)
                    found.append(flipped_losses(self.model, *arguments))
        return torch.cat(found).view(setting.languages, setting.layers, setting.heads, -1)

    def one_at_a_time(self) -> Tensor:
        """The same, setting the language's masks anew for each head and running its batch."""
        setting, found = self.setting, []
        subnets = attached(self.model).subnets
        assert subnets.heads is not None
        for row, (name, batch) in enumerate(self.batches.items()):
            own = subnets.heads[row]
            for layer in range(setting.layers):
                for head in range(setting.heads):
                    flipped = own.clone()
                    flipped[layer, head] ^= True
                    set_subnetwork(self.model, name, heads=flipped)
                    with torch.no_grad(), fm.language(self.model, name):
                        found.append(self.loss(batch))
            set_subnetwork(self.model, name, heads=own)
        return torch.stack(found).view(setting.languages, setting.layers, setting.heads, -1)


def ideal(setting: Setting) -> float:
    """The ratio of multiplications in the encoder's projections: a third of a layer's are the attention's.

    Of a flip in layer k, one at a time computes all layers; together, the layers below k and the attention of k (with
    all units) are shared by the layer's heads, and the feed-forward part of k and the layers above are not.
    """
    shared = (setting.layers - 1) / 2 + 1 / 3 / setting.density
    own = 2 / 3 + (setting.layers - 1) / 2
    return setting.layers / (own + shared / setting.heads)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="time for the ratio of times (default: 120)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--languages", type=int, default=8, help="languages (default: 8)")
    parser.add_argument("--sentences", type=int, default=16, help="sentences of each language (default: 16)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a sentence (default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(languages=options.languages, sentences=options.sentences, tokens=options.tokens)
    bed = Bed(setting)
    error = float((bed.all_at_once() - bed.one_at_a_time()).abs().max())
    if error > 1e-5:
        raise RuntimeError(f"the losses differ by {error}: nothing is timed")
    ratio = compare(Side(bed.one_at_a_time), Side(bed.all_at_once), options.seconds, warm_up=0)
    print(
        f"{setting.layers * setting.heads} heads x {setting.languages} languages; {setting}; "
        f"losses equal to {error:.1e}"
    )
    print(
        f"time: {ratio.baseline_ms:.0f} -> {ratio.ours_ms:.0f} ms, {ratio.median:.2f}x faster, quartiles "
        f"{ratio.low:.2f}-{ratio.high:.2f}, {ratio.pairs} pairs (ideal by multiplications {ideal(setting):.2f}x, "
        f"the rest is fewer calls; target >= {TARGET:g}x)"
    )
    print(machine())
    return 0 if ratio.median >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
