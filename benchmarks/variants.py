"""One Hugging Face encoder in as many forms as there are ways to mask it, each with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import BASELINES, BaselineLinear, Task

__all__ = ["Variants", "encoder_of", "subnets_of"]


def encoder_of(
    hidden: int, layers: int, heads: int, ffn: int, positions: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A random BERT encoder in training mode, fed with `inputs_embeds`.

    Dropout is off: a CPU draws its random numbers one by one, which would hide the rest.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn,
        max_position_embeddings=positions, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).to(device, dtype).train()


def subnets_of(model: nn.Module, languages: Sequence[str], density: float, unit: str) -> fm.Subnetworks:
    """Random subnetworks over a unit of an encoder; over "weights", those of every linear layer, one by one."""
    if unit != "weights":
        return fm.Subnetworks.random(model.config, languages, density, seed=0, units=unit)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(len(languages), *module.weight.shape, generator=generator) < density
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return fm.Subnetworks(languages, weights=weights)


class Variants:
    """The forms of one encoder for one batch's languages.

    Args:
        plain: the dense model.
        subnets: masks, on the CPU.
        ids: int64 [B], the language of each example, on the model's device.
        share: whether all forms have the very same Parameters; else each has a copy, as the first one was made.
    """

    def __init__(self, plain: nn.Module, subnets: fm.Subnetworks, ids: Tensor, share: bool) -> None:
        self.plain, self.ids, self.share = plain, ids, share
        self.masked = fm.attach(self.twin(), subnets)
        layers = ((name, layer) for name, layer in self.masked.named_modules() if isinstance(layer, fm.MaskedLinear))
        self.masks = {name: layer.mask for name, layer in layers}
        self._tasks: dict[str, Task] = {}

    def of(self, name: str) -> nn.Module:
        """The model in the form of a rival (a name of `BASELINES`, or "compact") or as attached ("fastmask", "full").

        `fastmask.language` can run an attached model without masks.
        """
        if name in ("fastmask", "full"):
            return self.masked
        model = copy.deepcopy(self.plain) if name == "compact" else self.twin()
        for path in self.masks if name != "dense" else ():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, self._replacement(name, path, model))
        return model

    def twin(self) -> nn.Module:
        """The dense model once more."""
        memo = {id(parameter): parameter for parameter in self.plain.parameters()} if self.share else {}
        return copy.deepcopy(self.plain, memo)

    def _replacement(self, name: str, path: str, model: nn.Module) -> nn.Module:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if name == "compact":
            return self._compact(linear, self.masks[path])
        if path not in self._tasks:
            self._tasks[path] = Task(self.masks[path], self.ids)
        return BaselineLinear(linear, self._tasks[path], BASELINES[name])

    def _compact(self, linear: nn.Linear, mask: fm.Mask) -> nn.Linear:
        """A layer that really is as small as the one language's subnetwork, with parameters of its own."""
        (language,) = set(self.ids.tolist())
        live, rows = mask.index[language, : mask.live_counts()[language]], mask.kind == "rows"
        weight, bias = linear.weight.detach().index_select(0 if rows else 1, live), linear.bias.detach()
        small = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        small.weight, small.bias = nn.Parameter(weight), nn.Parameter(bias[live] if rows else bias.clone())
        return small
