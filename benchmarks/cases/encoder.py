"""A BERT encoder: forward and backward of training, or forward alone as in serving; and one attention block of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.baselines import why_not
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.checking import check_all, check_baseline
from benchmarks.compiling import compiled, seen_to_compile_once
from benchmarks.measure import Side
from benchmarks.memory import cache_bytes, peak_bytes, saved_bytes
from benchmarks.setting import Setting, Shape
from benchmarks.variants import Variants, encoder_of, random_weights
from fastmask.models.attach import attached

__all__ = ["Attention", "Encoder", "Inference"]

MOST_COPIES = 4


class Encoder(Case):
    """Forward and backward of a whole encoder, with random activations and upstream gradients."""

    name = "encoder"
    units: ClassVar[tuple[str, ...]] = ("both", "heads", "neurons", "weights")
    parts = ("forward+backward",)
    implementations = ("dense", "fastmask", "full", "multiply", "loop", "stack", "grouped", "gating", "compact")
    defaults: ClassVar[dict[str, Any]] = {"unit": "both"}
    can = ("compiled", "bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        sizes, device = setting.sizes, setting.torch_device
        plain = encoder_of(sizes.hidden, self._layers(), sizes.heads, sizes.ffn, setting.tokens, device, torch.float32)
        languages = [f"language {i}" for i in range(setting.languages)]
        if setting.unit == "weights":
            self.subnets = random_weights(plain, languages, setting.density, seed=0)
        else:
            self.subnets = fm.Subnetworks.random(plain.config, languages, setting.density, seed=0, units=setting.unit)
        self.ids = setting.ids()
        self.variants = Variants(plain, self.subnets, self.ids, share=True)
        self.models = {name: self.variants.of(name) for name in self.chosen}
        shape = (setting.batch, setting.tokens, sizes.hidden)
        copies = min(MOST_COPIES, 1 + 2 * cache_bytes(device) // (4 * setting.batch * setting.tokens * sizes.hidden))
        self.inputs = [torch.randn(shape, device=device) for _ in range(copies)]
        self.upstream = torch.randn(shape, device=device)
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def _layers(self) -> int:
        return self.setting.layers

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """By the kinds of the masks; a compact model holds one language and no masks over weights."""
        if name in ("dense", "fastmask", "full"):
            return None
        if name == "compact":
            if setting.unit == "weights":
                return "a model without single weights is not smaller"
            return "a compact model holds one language" if setting.present > 1 else None
        kind = "weights" if setting.unit == "weights" else "rows"
        half = setting.dtype == "bfloat16"
        return why_not(name, kind, setting.present, backward="backward" in cls.parts[0], half=half)

    @classmethod
    def memory_needed(cls, setting: Setting, names: Sequence[str]) -> int:
        """Parameters and gradients in float32 and, to check, float64; masks over weights; the copies of `stack`."""
        sizes = setting.sizes
        weights = setting.layers * (4 * sizes.hidden**2 + 2 * sizes.hidden * sizes.ffn)
        flags = weights * (setting.languages + 1) * 2 if setting.unit == "weights" else 0
        copies = 2 * 4 * setting.present * weights if {"stack", "grouped"} & set(names) else 0
        tokens = setting.batch * setting.tokens
        activations = 8 * setting.layers * tokens * (12 * sizes.hidden + 4 * sizes.ffn)
        return 24 * weights + flags + copies + activations

    # ---- what runs

    def forward(self, name: str, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """The last hidden states of an implementation."""
        call = self._compiled[name] if name in self._compiled else self._call(self.models[name], name)
        of_language = fm.language(self.models[name], None) if name == "full" else nullcontext()
        with self.setting.autocast(), of_language:
            return call(x, self.ids if ids is None else ids)

    def _call(self, model: nn.Module, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """A model as a function of (x, ids), in the form that is called `name`."""
        if name == "fastmask":
            return lambda x, ids: model(inputs_embeds=x, language_ids=ids)[0]
        return lambda x, ids: model(inputs_embeds=x)[0]

    def sides(self, part: str) -> dict[str, Side]:
        """Forward and backward of each implementation, with one input after the other."""
        return {name: self._side(name) for name in self.chosen}

    def _side(self, name: str) -> Side:
        inputs, model = itertools.cycle(self.inputs), self.models[name]

        def run() -> None:
            y = self.forward(name, next(inputs))
            y.backward(self.upstream.to(y.dtype))

        return Side(run, model.zero_grad)

    # ---- proof

    def check(self) -> None:
        """Output and gradients of ours against float64 by the rule of the tests; the others within rounding."""
        reference = "gating" if self.setting.unit != "weights" else "loop"
        plain = self.variants.of(reference)
        exact = copy.deepcopy(plain).double()
        truth = self._results(self._call(exact, reference), exact, exact=True)
        usual = self._results(self._call(plain, reference), plain)
        for name in self.chosen[1:]:
            found = self._results_of(name)
            if name == "fastmask":
                check_all(self.setting.words(), ("output", "gradients"), found, truth, usual)
                self._check_full_network()
            elif name == "compact":
                check_baseline(name, found[:1], truth[:1])
            elif name == "full":
                check_baseline(name, found, self._results_of("dense"))
            else:
                check_baseline(name, found, truth)
        if self.setting.compiled:
            self._compile(truth, usual)

    def _results_of(self, name: str) -> list[Tensor]:
        return self._results(lambda x, ids: self.forward(name, x, ids), self.models[name])

    def _results(self, call: Callable[[Tensor, Tensor], Tensor], model: nn.Module, exact: bool = False) -> list[Tensor]:
        """Output and gradients of one run of `call`, which runs `model`; `exact`: the model is in float64."""
        x = self.inputs[0].double() if exact else self.inputs[0]
        model.zero_grad()
        with nullcontext() if exact else self.setting.autocast():
            y = call(x, self.ids)
        y.backward(self.upstream.to(y.dtype))
        found = [y.detach(), _gradients(model)]
        model.zero_grad()
        return found

    def _check_full_network(self) -> None:
        """Without a language the attached model is the dense one."""
        with torch.no_grad(), self.setting.autocast(), fm.language(self.models["fastmask"], None):
            full = self.models["fastmask"](inputs_embeds=self.inputs[0])[0]
            expected = self.models["dense"](inputs_embeds=self.inputs[0])[0]
        if not (full - expected).norm() <= 1e-2 * expected.norm():
            raise WrongResultError("the full network of the attached model is not the dense one: nothing is timed")

    def _compile(self, truth: list[Tensor], usual: list[Tensor]) -> None:
        """Compile each implementation: one graph, right results, and none made again for other languages."""
        for name in self.chosen:
            self._compiled[name] = compiled(self._call(self.models[name], name))
            found = self._results_of(name)
            if name == "fastmask":
                check_all(self.setting.words(), ("output", "gradients"), found, truth, usual)
        if "fastmask" in self.chosen:
            other = (self.ids + 1) % self.setting.languages
            seen_to_compile_once(lambda: self._step_of_others(other))

    def _step_of_others(self, ids: Tensor) -> None:
        y = self.forward("fastmask", self.inputs[0], ids)
        y.backward(self.upstream.to(y.dtype))
        self.models["fastmask"].zero_grad()

    # ---- arithmetic

    def ideal(self) -> float:
        """Dense FLOPs over live ones, of the linear layers and of attention; 1 for single weights."""
        if self.setting.unit == "weights":
            return 1.0
        heads, neurons = self._live()
        per_language = live_flops(self.setting.sizes, self.setting.tokens, heads, neurons)
        full = live_flops(self.setting.sizes, self.setting.tokens, *(torch.ones_like(own) for own in (heads, neurons)))
        return float(full[self.ids.cpu()].sum() / per_language[self.ids.cpu()].sum())

    def _live(self) -> tuple[Tensor, Tensor]:
        """Shares of live heads and neurons [L, layers]."""
        shape = (self.setting.languages, self._layers())
        both = (self.subnets.heads, self.subnets.neurons)
        heads, neurons = (torch.ones(shape) if keep is None else keep.float().mean(2) for keep in both)
        return heads, neurons

    def saved(self) -> dict[str, int]:
        """Bytes kept for the backward pass, without parameters and masks."""
        if self.setting.compiled:
            return {}
        masks = [t for layer in self.variants.masked_layers.values() for t in (layer.mask.index, layer.mask.extents)]
        known = [*masks, *self.inputs]
        return {
            name: saved_bytes(lambda name=name: self.forward(name, self.inputs[0]), [*model.parameters(), *known])  # type: ignore[misc]
            for name, model in self.models.items()
        }

    def peaks(self) -> dict[str, int]:
        """Of a forward and backward pass."""
        sides = {name: self._side(name) for name in self.chosen}
        return {name: peak_bytes(side.run, side.reset, self.setting.torch_device) for name, side in sides.items()}

    def mask_bytes(self) -> int:
        """All languages' masks, in all layers."""
        return sum(layer.mask.nbytes for layer in self.variants.masked_layers.values())


class Inference(Encoder):
    """The forward pass alone, in inference mode: serving a batch of several languages."""

    name = "inference"
    parts = ("forward",)

    def _side(self, name: str) -> Side:
        inputs = itertools.cycle(self.inputs)

        def run() -> Tensor:
            with torch.inference_mode():
                return self.forward(name, next(inputs))

        return Side(run)

    def saved(self) -> dict[str, int]:
        """Nothing is kept."""
        return {}


class Attention(Encoder):
    """The attention block of one layer (projections, attention, output, LayerNorm), masks over heads."""

    name = "attention"
    units = ("heads", "weights")
    defaults: ClassVar[dict[str, Any]] = {"unit": "heads"}
    layered = False

    def _layers(self) -> int:
        return 1

    def _call(self, model: nn.Module, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        block = model.encoder.layer[0].attention  # type: ignore[union-attr,index]
        if name not in ("fastmask", "full"):
            return lambda x, ids: block(x)[0]
        router = attached(model).router

        def call(x: Tensor, ids: Tensor) -> Tensor:
            with router.using(router.resolve(ids if name == "fastmask" else None)):
                y: Tensor = block(x)[0]
            return y

        return call

    def ideal(self) -> float:
        """Of the block's own FLOPs, which all belong to heads."""
        if self.setting.unit == "weights":
            return 1.0
        heads, _ = self._live()
        return float(1 / heads[self.ids.cpu()].mean())


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
