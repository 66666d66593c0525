"""One Hugging Face encoder in as many forms as there are ways to mask it, each with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import BASELINES, BaselineLinear, Task

__all__ = ["Variants", "encoder_of", "random_weights"]


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


def random_weights(model: nn.Module, languages: Sequence[str], density: float, seed: int) -> fm.Subnetworks:
    """Subnetworks over single weights of every linear layer of the encoder, each weight live with chance `density`."""
    generator = torch.Generator().manual_seed(seed)
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
        self.masked = fm.attach(self._twin(), subnets)
        self.masked_layers = {
            name: layer for name, layer in self.masked.named_modules() if isinstance(layer, fm.MaskedLinear)
        }
        self._tasks: dict[str, Task] = {}

    def of(self, name: str) -> nn.Module:
        """The model in the form of a baseline ("dense", or a name of `BASELINES`), "fastmask", or "compact".

        "full" is the attached model, which `fastmask.language` can run without masks.
        """
        if name in ("fastmask", "full"):
            return self.masked
        if name == "compact":
            return self._compact()
        model = self._twin()
        if name == "dense":
            return model
        for path, layer in self.masked_layers.items():
            if path not in self._tasks:
                self._tasks[path] = Task(layer.mask, self.ids)
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            _replace(model, path, BaselineLinear(linear, self._tasks[path], BASELINES[name]))
        return model

    def _twin(self) -> nn.Module:
        memo = {id(parameter): parameter for parameter in self.plain.parameters()} if self.share else {}
        return copy.deepcopy(self.plain, memo)

    def _compact(self) -> nn.Module:
        """A model whose layers really are as small as the one language's subnetwork; no masks, parameters of its own.

        Not a way to share a model: the yardstick of what masking could reach.
        """
        (language,) = set(self.ids.tolist())
        model = copy.deepcopy(self.plain)
        for path, layer in self.masked_layers.items():
            live = layer.mask.index[language, : layer.mask.live_counts()[language]]
            weight = layer.weight.detach()
            rows = layer.mask.kind == "rows"
            small = weight.index_select(0 if rows else 1, live)
            linear = nn.Linear(small.shape[1], small.shape[0], bias=layer.bias is not None, device=small.device)
            with torch.no_grad():
                linear.weight.copy_(small)
                if layer.bias is not None:
                    linear.bias.copy_(layer.bias[live] if rows else layer.bias)
            _replace(model, path, linear.to(small.dtype))
        return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
