"""A BERT encoder: forward and backward, with random activations and upstream gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import why_not
from benchmarks.cases.case import DENSE, Case
from benchmarks.checking import check_all, check_baseline
from benchmarks.measure import Side
from benchmarks.memory import cache_bytes, saved_bytes
from benchmarks.setting import Setting, Shape
from benchmarks.variants import Variants, encoder_of, subnets_of

__all__ = ["Encoder", "live_flops"]

MOST_COPIES = 4


class Encoder(Case):
    """Forward and backward of a whole encoder."""

    name = "encoder"
    units: ClassVar[tuple[str, ...]] = ("both", "heads", "neurons", "weights")
    parts: ClassVar[tuple[str, ...]] = ("forward+backward",)
    implementations: ClassVar[tuple[str, ...]] = (
        *DENSE, "fastmask", "multiply", "loop", "gating", "packed", "compact",
    )  # fmt: skip
    can: ClassVar[tuple[str, ...]] = ("compiled", "bfloat16", "cuda")
    ours: ClassVar[tuple[str, ...]] = ("fastmask",)  # what takes the languages of a batch
    share: ClassVar[bool] = True  # whether all implementations have the same parameters

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        sizes, device = setting.sizes, setting.torch_device
        widths = (sizes.hidden, setting.layers, sizes.heads, sizes.ffn, max(8, setting.tokens))  # `attach` tries 7
        plain = encoder_of(*widths, device, setting.parameters)
        languages = [f"language {i}" for i in range(setting.languages)]
        self.subnets, self.ids = subnets_of(plain, languages, setting.density, setting.unit), setting.ids()
        self.variants = Variants(plain, self.subnets, self.ids, self.share)
        self.models = {name: self.model(name) for name in self.chosen}
        self.calls = {name: self._call(name) for name in self.chosen}
        shape = (setting.batch, setting.tokens, sizes.hidden)
        copies = min(MOST_COPIES, 1 + 2 * cache_bytes(device) // (4 * self.tokens * sizes.hidden))
        of = {"device": device, "dtype": setting.parameters}
        self.inputs, self.upstream = [torch.randn(shape, **of) for _ in range(copies)], torch.randn(shape, **of)

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """By the kinds of the masks; a compact model holds one language and no masks over weights."""
        if name == "compact" and (setting.unit == "weights" or setting.present > 1):
            return "a compact model holds one language, and single weights make it no smaller"
        kind = "weights" if setting.unit == "weights" else "rows"
        return why_not(name, kind, setting.present, setting.dtype, setting.compiled)

    def model(self, name: str) -> nn.Module:
        """The model that an implementation runs."""
        return self.variants.of(name)

    # ---- what runs

    def _call(self, name: str) -> Callable[[Tensor], Tensor]:
        model, more = self.models[name], {"language_ids": self.ids} if name in self.ours else {}

        def call(x: Tensor) -> Tensor:
            return model(inputs_embeds=x, **more)[0]

        return torch.compile(call, fullgraph=True, dynamic=False) if self.setting.compiled else call

    def output(self, name: str, x: Tensor) -> Tensor:
        """The last hidden states of an implementation."""
        with self.setting.autocast(), fm.language(self.models[name], None) if name == "full" else nullcontext():
            return self.calls[name](x)

    def run(self, name: str, x: Tensor) -> Tensor:
        """Forward and backward; returns the output, gradients are left in the model."""
        y = self.output(name, x)
        y.backward(self.upstream.to(y.dtype))
        return y

    def sides(self, part: str) -> dict[str, Side]:
        """Each with one input after the other."""
        return {name: self._side(name) for name in self.chosen}

    def _side(self, name: str) -> Side:
        inputs = itertools.cycle(self.inputs)
        return Side(lambda: self.run(name, next(inputs)), self.models[name].zero_grad)

    # ---- proof

    def check(self) -> None:
        """Output and gradients of ours by the rule of the tests, the others within rounding."""
        known: dict[str, list[list[Tensor]]] = {}
        for name in self.chosen:
            reference = self.reference(name)
            if reference not in known:
                known[reference] = self._references(reference)
            (truth, plain), found = known[reference], self.results(name)
            if name in self.ours:
                check_all(self.setting.words(), (f"output of {name}", f"gradients of {name}"), found, truth, plain)
            else:  # the gradients of a compact model are smaller
                check_baseline(name, *((found[:1], truth[:1]) if name == "compact" else (found, truth)))

    def reference(self, name: str) -> str:
        """The plain form that says what an implementation must compute."""
        return "dense" if name in DENSE else "loop" if self.setting.unit == "weights" else "gating"

    def plain(self, reference: str) -> nn.Module:
        """A model in a plain form."""
        return self.variants.of(reference)

    def plain_run(self, reference: str, model: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
        """As `run`, of a plain form."""
        y: Tensor = model(inputs_embeds=x)[0]
        y.backward(upstream.to(y.dtype))
        return y

    def _references(self, reference: str) -> list[list[Tensor]]:
        """Results of a plain form in float64, and as it is."""
        model, both = self.plain(reference), []
        for own, exact in ((copy.deepcopy(model).double(), True), (model, False)):
            x, upstream = (t.double() if exact else t for t in (self.inputs[0], self.upstream))
            own.zero_grad()
            with nullcontext() if exact else self.setting.autocast():
                y = self.plain_run(reference, own, x, upstream)
            both.append([y.detach(), _gradients(own)])
            own.zero_grad()
        return both

    def results(self, name: str) -> list[Tensor]:
        """Output and gradients of one run."""
        self.models[name].zero_grad()
        found = [self.run(name, self.inputs[0]).detach(), _gradients(self.models[name])]
        self.models[name].zero_grad()
        return found

    # ---- arithmetic

    def ideal(self, name: str) -> float:
        """Dense FLOPs over live ones, of the linear layers and of attention; 1 for single weights."""
        if name in DENSE or self.setting.unit == "weights":
            return 1.0
        return ideal_of(self.subnets, self.setting, self.ids.cpu())

    def kept(self) -> dict[str, int]:
        """Without parameters and masks."""
        if self.setting.compiled:
            return {}
        found = {}
        for name, model in self.models.items():
            masks = [module.mask for module in model.modules() if isinstance(module, fm.MaskedLinear)]
            known = [*model.parameters(), *self.inputs, *(t for mask in masks for t in (mask.index, mask.extents))]
            found[name] = saved_bytes(lambda name=name: self.output(name, self.inputs[0]), known)  # type: ignore[misc]
        return found

    def mask_bytes(self) -> int:
        """In all layers."""
        return sum(mask.nbytes for mask in self.variants.masks.values())


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


def _gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector.

    What a key's bias adds to the scores of a query is the same for every key: its true gradient is 0, and left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("key.bias")]
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
