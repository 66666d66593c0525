"""A BERT encoder: forward and backward, with random activations and upstream gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import BASELINES, Task, why_not, with_rival
from benchmarks.cases.case import DENSE, Case
from benchmarks.measure import Side, saved_bytes
from benchmarks.setting import Setting, Shape

__all__ = [
    "Encoder", "bert_config", "encoder_of", "gradients", "ideal_of", "live_flops", "masks_in", "subnets_of", "twin_of",
]  # fmt: skip

COPIES = 4  # of the inputs, so that no run finds its own in the cache
Call = Callable[[Tensor], Tensor]


class Encoder(Case):
    """Forward and backward of a whole encoder, in as many forms as there are ways to mask it."""

    name = "encoder"
    units = ("both", "heads", "neurons", "weights")
    parts = ("forward+backward",)
    implementations = (*DENSE, "fastmask", "multiply", "loop", "gating", "packed", "compact")
    results_are = ("output", "gradients")
    can = ("compiled", "bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        super().__init__(setting, names)
        tokens, options = setting.tokens, {"device": setting.device, "dtype": setting.parameters}
        self.plain = encoder_of(setting.sizes, setting.layers, max(8, tokens)).to(**options)  # `attach` tries 7
        self.subnets, self.ids = subnets_of(self.plain, setting), setting.ids()
        self.masked = fm.attach(self.twin(), self.subnets)
        self.masks = masks_in(self.masked)
        self.models = {name: self.model(name) for name in self.chosen}
        self.calls = {name: self.call(name, model) for name, model in self.models.items()}
        shape = (setting.batch, tokens, setting.sizes.hidden)
        *self.inputs, self.upstream = (torch.randn(shape, **options) for _ in range(COPIES + 1))

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        if name == "compact" and (setting.unit == "weights" or setting.present > 1):
            return "a compact model holds one language, and single weights make it no smaller"
        kind = "weights" if setting.unit == "weights" else "rows"
        return why_not(name, kind, setting.present, setting.dtype, setting.compiled)

    # ---- the forms of the encoder

    def model(self, name: str) -> nn.Module:
        """The encoder as an implementation runs it; all have the very same Parameters, but for "compact"."""
        if name in (*self.ours, "full"):
            return self.masked
        if name == "compact":
            return fm.extract(self.masked, self.subnets.languages[0])
        return self.twin() if name == "dense" else with_rival(self.twin(), BASELINES[name], self.tasks)

    def twin(self) -> nn.Module:
        """The dense model once more."""
        return twin_of(self.plain)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """What rivals prepare for each layer."""
        return {path: Task(mask, self.ids) for path, mask in self.masks.items()}

    def call(self, name: str, model: nn.Module, eager: bool = False) -> Call:
        """What makes last hidden states [B, T, hidden] of inputs; it knows the languages where the model takes them."""
        more = {"language_ids": self.ids} if name in self.ours else {}
        forward = self.as_timed(lambda x: model(inputs_embeds=x, **more)[0], eager)
        return fm.language(model, None)(forward) if name == "full" else forward

    # ---- what runs

    def run(self, name: str, model: nn.Module, call: Call, x: Tensor, upstream: Tensor) -> Tensor:
        """Forward and backward; returns the output, gradients are left in the model."""
        y = call(x)
        y.backward(upstream.to(y.dtype))
        return y

    def sides(self, part: str) -> dict[str, Side]:
        """Each with one input after the other."""
        return {name: self._side(name, model) for name, model in self.models.items()}

    def _side(self, name: str, model: nn.Module) -> Side:
        inputs, call = itertools.cycle(self.inputs), self.calls[name]
        return Side(lambda: self.run(name, model, call, next(inputs), self.upstream), model.zero_grad)

    # ---- proof

    def references(self, name: str) -> tuple[str, str]:
        plain = "loop" if self.setting.unit == "weights" else "gating"
        return ("dense", "dense") if name in DENSE else (plain, plain)

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        if dtype is None:
            model, call = self.models[name], self.calls[name]
        else:
            model = copy.deepcopy(self.model(name)).to(dtype)
            call = self.call(name, model, eager=True)
        model.zero_grad()
        x, upstream = (t.to(dtype or t.dtype) for t in (self.inputs[0], self.upstream))
        found = [self.run(name, model, call, x, upstream).detach(), gradients(model)]
        model.zero_grad()
        return found[:1] if name == "compact" else found  # whose gradients are smaller

    # ---- arithmetic

    def ideal(self, name: str) -> float:
        """Dense FLOPs over live ones, of the linear layers and of attention; 1 for single weights."""
        if name in DENSE or self.setting.unit == "weights":
            return 1.0
        return ideal_of(self.subnets, self.setting, self.ids.cpu())

    def kept(self) -> dict[str, int]:
        """Without parameters and masks; not of what is compiled."""
        if self.setting.compiled:
            return {}
        masks = [tensor for mask in self.masks.values() for tensor in (mask.index, mask.extents)]
        return {
            name: saved_bytes(partial(self.calls[name], self.inputs[0]), [*model.parameters(), *self.inputs, *masks])
            for name, model in self.models.items()
        }


def encoder_of(sizes: Shape, layers: int, positions: int) -> nn.Module:
    """A random BERT encoder in training mode, fed with `inputs_embeds`."""
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(bert_config(sizes, layers, max_position_embeddings=positions), add_pooling_layer=False).train()


def bert_config(sizes: Shape, layers: int, **more: int) -> Any:
    """BERT without dropout: a CPU draws its random numbers one by one, which would hide the rest."""
    from transformers import BertConfig

    return BertConfig(
        hidden_size=sizes.hidden, num_hidden_layers=layers, num_attention_heads=sizes.heads,
        intermediate_size=sizes.ffn, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def subnets_of(model: nn.Module, setting: Setting) -> fm.Subnetworks:
    """Random subnetworks over a setting's unit; over "weights", those of every linear layer, one by one."""
    languages = [f"language {i}" for i in range(setting.languages)]
    if setting.unit != "weights":
        return fm.Subnetworks.random(model.config, languages, setting.density, seed=0, units=setting.unit)
    generator = torch.Generator().manual_seed(0)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {
        name: torch.rand(len(languages), *module.weight.shape, generator=generator) < setting.density
        for name, module in linear.items()
    }
    return fm.Subnetworks(languages, weights=weights)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model that has the very same Parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def masks_in(model: nn.Module) -> dict[str, fm.Mask]:
    """The masks of an attached model, by layer."""
    return {name: layer.mask for name, layer in model.named_modules() if isinstance(layer, fm.MaskedLinear)}


def ideal_of(subnets: fm.Subnetworks, setting: Setting, ids: Tensor) -> float:
    """Dense FLOPs of an encoder over those of examples with the subnetworks `ids` of heads and neurons."""
    whole = torch.ones(len(subnets.languages), setting.layers)
    shares = [whole if keep is None else keep.float().mean(2) for keep in (subnets.heads, subnets.neurons)]
    live = live_flops(setting.sizes, setting.tokens, *shares)
    return float(live_flops(setting.sizes, setting.tokens, whole, whole)[ids].sum() / live[ids].sum())


def live_flops(sizes: Shape, tokens: int, heads: Tensor, neurons: Tensor) -> Tensor:
    """Multiply-adds of the live part of an encoder for one token, [L], from shares of live units [L, layers].

    Four projections of hidden x hidden and, for every other token, a score and a mix of `hidden` features belong to
    heads; two projections of hidden x ffn to neurons. LayerNorm, softmax and GELU are not counted.
    """
    of_heads = 4 * sizes.hidden**2 + 2 * tokens * sizes.hidden
    of_neurons = 2 * sizes.hidden * sizes.ffn
    return (heads * of_heads + neurons * of_neurons).sum(1)


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector.

    What a key's bias adds to the scores of a query is the same for every key: its true gradient is 0, and left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("key.bias")]
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
