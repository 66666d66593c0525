"""BERT encoders: forward and backward, a training step, and an episode of first-order MAML."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmask as fm
from benchmarks.baselines import BASELINES, Task, multiply, with_rival
from benchmarks.cases.case import DENSE, Case, Side
from benchmarks.row import Setting, Shape
from fastmask.live import live_of, masked_parameters
from fastmask.meta import Task as MetaTask

COPIES = 4  # of the inputs, so that no run finds its own in the cache
CLASSES, STEPS, RATE = 20, 5, 1e-3  # of an episode: its classifier, its inner steps


class Encoder(Case):
    """Forward and backward of a whole encoder, on random activations, in as many forms as there are ways to mask it."""

    name = "encoder"
    units = ("both", "heads", "neurons", "weights")
    parts = ("forward+backward",)
    implementations = (*DENSE, "fastmask", "multiply", "loop", "gating", "packed", "compact")
    results_are = ("output", "gradients")
    can = ("compiled", "bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        super().__init__(setting, names)
        options = {"device": setting.device, "dtype": setting.parameters}
        self.plain = encoder_of(setting.sizes, setting.layers, max(8, setting.tokens)).to(**options)  # `attach` tries 7
        self.subnets, self.ids = subnets_of(self.plain, setting), setting.ids()
        self.masked = fm.attach(twin_of(self.plain), self.subnets)
        self.masks = masks_in(self.masked)
        self.tasks = {path: Task(mask, self.ids) for path, mask in self.masks.items()}
        self.models = {name: self.model(name) for name in self.chosen}
        self.calls = {name: self.call(name, model) for name, model in self.models.items()}
        shape = (setting.batch, setting.tokens, setting.sizes.hidden)
        *self.inputs, self.upstream = (torch.randn(shape, **options) for _ in range(COPIES + 1))

    def model(self, name: str) -> nn.Module:
        """All have the very same Parameters, but for "compact"."""
        if name in ("fastmask", "full"):
            return self.masked
        if name == "compact":
            return fm.extract(self.masked, self.subnets.languages[0])
        model = twin_of(self.plain)
        return model if name == "dense" else with_rival(model, BASELINES[name], self.tasks)

    def call(self, name: str, model: nn.Module, eager: bool = False) -> Callable[[Tensor], Tensor]:
        """What makes last hidden states [B, T, hidden] of inputs; it knows the languages where the model takes them."""
        more = {"language_ids": self.ids} if name in self.ours else {}
        forward = self.as_timed(lambda x: model(inputs_embeds=x, **more)[0], eager)
        return fm.language(model, None)(forward) if name == "full" else forward

    def passes(self, name: str, model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
        call = self.calls[name] if dtype is None else self.call(name, model, eager=True)
        *inputs, upstream = (tensor.to(dtype or tensor.dtype) for tensor in (*self.inputs, self.upstream))
        in_turn = itertools.cycle(inputs)
        return lambda: self.run(name, model, call, next(in_turn), upstream)

    def run(self, name: str, model: nn.Module, call: Callable[..., Tensor], x: Tensor, upstream: Tensor) -> Tensor:
        """Forward and backward; returns the output, gradients are left in the model."""
        y = call(x)
        y.backward(upstream.to(y.dtype))
        return y

    def references(self, name: str) -> tuple[str, str]:
        return ("loop", "loop") if self.setting.unit == "weights" else ("gating", "gating")

    def results(self, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        found = super().results(name, dtype)
        return found[:1] if name == "compact" else found  # whose gradients are smaller

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


class Step(Encoder):
    """A training step with AdamW or `LiveAdamW`, on parameters of its own; the gradients are what is proven.

    "sparse" is sparse fine-tuning: the full network runs (`forward="full"`), and each language changes what it owns.
    "multiply" does the same as composable-sft does: whole gradients, one language after the other, times masks.
    """

    name = "step"
    parts = ("step",)
    implementations = (*DENSE, "fastmask", "live", "sparse", "multiply")
    ours = ("fastmask", "live", "sparse")
    can = ("bfloat16", "cuda")
    one_by_one = True

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        super().__init__(setting, names)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, model in self.models.items():
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            live = name in ("live", "sparse")
            kind = partial(fm.LiveAdamW, model=model) if live else partial(torch.optim.AdamW, fused=True)
            self.optimizers[name] = kind(trained, lr=1e-5)

    def model(self, name: str) -> nn.Module:
        """Plain or attached; moments are kept for the languages of the masks, so these are those of the batch."""
        if name not in self.implementations:
            return super().model(name)
        model = copy.deepcopy(self.plain)
        if name == "multiply":
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path in self.flags)
        if name in (*self.ours, "full"):
            own = self.subnets.select(self.subnets.languages[: self.setting.present])
            fm.attach(model, own, forward="full" if name == "sparse" else "masked")
        if name == "sparse":
            fm.freeze_unmasked(model)
        return model

    @cached_property
    def flags(self) -> dict[str, Tensor]:
        """What each language of the batch owns of each masked parameter: 0 or 1, [present, *shape]."""
        masked, found = masked_parameters(self.masked), {}
        for path, parameter in self.masked.named_parameters():
            if parameter in masked:
                own = [live_of(masked[parameter].mask, [language]) for language in range(self.setting.present)]
                found[path] = torch.stack([live.only(torch.ones_like(parameter.detach())) for live in own])
        return found

    def sides(self, part: str) -> dict[str, Side]:
        def then(passes: Side, optimizer: torch.optim.Optimizer) -> Side:
            def step() -> None:
                passes.run()
                optimizer.step()

            return Side(step, passes.reset)

        return {name: then(side, self.optimizers[name]) for name, side in super().sides(part).items()}

    def run(self, name: str, model: nn.Module, call: Callable[..., Tensor], x: Tensor, upstream: Tensor) -> Tensor:
        """As an encoder; "multiply" adds up the gradients of each language's examples, times its masks."""
        if name != "multiply":
            return super().run(name, model, call, x, upstream)
        parameters = {path: p for path, p in model.named_parameters() if path in self.flags}
        outputs = []
        for language in range(self.setting.present):
            own = slice(None) if self.setting.present == 1 else self.ids == language
            y = call(x[own])
            outputs.append(y.detach())
            grads = torch.autograd.grad(y, list(parameters.values()), upstream[own].to(y.dtype))
            for (path, parameter), grad in zip(parameters.items(), grads, strict=True):
                grad.mul_(self.flags[path][language])
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return torch.cat(outputs)

    def references(self, name: str) -> tuple[str, str]:
        """Sparse fine-tuning computes the full network, and masked gradients."""
        return ("multiply", "multiply") if name in ("sparse", "multiply") else super().references(name)

    def ideal(self, name: str) -> float:
        """FLOPs of the encoder; sparse fine-tuning saves the dead part of dW."""
        if name not in ("sparse", "multiply"):
            return super().ideal(name)
        masks = self.masks.values()
        sizes = [mask.out_features * mask.in_features for mask in masks]
        live = sum(n * float(m.density[: self.setting.present].mean()) for n, m in zip(sizes, masks, strict=True))
        return 3 * sum(sizes) / (2 * sum(sizes) + live)


class Episode(Case):
    """First-order MAML of a token classifier: for each language 5 inner steps on a support batch, then a query batch.

    "dense" and "multiply" clone all parameters; "multiply" masks the clones. "full" and "fastmask" are `MetaLearner`,
    with the full network and with each language's subnetwork.
    """

    name = "episode"
    units = ("both",)
    parts = ("episode",)
    implementations = (*DENSE, "fastmask", "multiply")
    results_are = ("meta-gradient",)
    defaults: ClassVar[dict[str, Any]] = {"languages": 2, "present": 2, "batch": 20, "tokens": 32}
    least = 5
    one_by_one = True

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        from transformers import BertForTokenClassification

        super().__init__(setting, names)
        self.tokens *= setting.present * (STEPS + 1)  # of all support passes and the query
        vocabulary, shape = 100 if setting.shape == "toy" else 30522, (setting.batch, setting.tokens)
        torch.manual_seed(0)
        config = bert_config(setting.sizes, setting.layers, vocab_size=vocabulary, num_labels=CLASSES)
        self.plain = BertForTokenClassification(config).train()
        self.subnets = subnets_of(self.plain, setting)
        self.masks = masks_in(fm.attach(copy.deepcopy(self.plain), self.subnets))
        self.batches: list[list[tuple[Tensor, Tensor]]] = [  # support and query of each language
            [(torch.randint(vocabulary, shape), torch.randint(CLASSES, shape)) for _ in range(2)]
            for _ in range(setting.present)
        ]
        self.models = {name: self.model(name) for name in self.chosen}

    def model(self, name: str) -> nn.Module:
        """A model of its own, attached where it is fastmask's."""
        model = copy.deepcopy(self.plain)
        return fm.attach(model, self.subnets) if name in ("full", "fastmask") else model

    def passes(self, name: str, model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[], object]:
        if name in ("full", "fastmask"):
            learner = fm.MetaLearner(
                model, lambda batch: _loss(model(batch[0]), batch), inner_steps=STEPS, inner_learning_rate=RATE
            )
            whose = [language if name == "fastmask" else None for language in self.subnets.languages]
            tasks = [MetaTask(own, [s], query) for own, (s, query) in zip(whose, self.batches, strict=False)]
            return lambda: learner.episode(tasks)
        masked = [model] * len(self.batches)
        if name == "multiply":  # each language's masks are multiplied onto the weights in every pass
            ids = [torch.full((self.setting.batch,), language) for language in range(len(self.batches))]
            tasks = [{path: Task(mask, own) for path, mask in self.masks.items()} for own in ids]
            masked = [with_rival(twin_of(model), multiply, own) for own in tasks]
        return lambda: _with_clones(model, masked, self.batches)

    def references(self, name: str) -> tuple[str, str]:
        return ("multiply", "multiply")

    def ideal(self, name: str) -> float:
        """FLOPs of the encoder's products and of attention."""
        return 1.0 if name in DENSE else ideal_of(self.subnets, self.setting, torch.arange(self.setting.present))


def _with_clones(model: nn.Module, masked: Sequence[nn.Module], batches: Sequence[Sequence[Any]]) -> None:
    """Copies of all parameters as fast weights, which run through each language's `masked` model."""
    for own, (support, query) in zip(masked, batches, strict=True):
        phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        for _ in range(STEPS):
            grads = _gradient(own, phi, support)
            phi = {name: (p - RATE * grads[name]).detach().requires_grad_() for name, p in phi.items()}
        grads = _gradient(own, phi, query)
        for name, parameter in model.named_parameters():
            share = grads[name] / len(batches)
            parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)


def _gradient(model: nn.Module, phi: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    loss = _loss(functional_call(model, phi, (batch[0],)), batch)
    return dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))


def _loss(output: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), batch[1].flatten())


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
    """Multiply-adds of an encoder for one token, [L], from shares of live units [L, layers].

    To heads belong four projections of hidden x hidden, and a score and a mix of `hidden` features for each token; two
    projections of hidden x ffn to neurons. LayerNorm, softmax and GELU are not counted.
    """
    of_heads = 4 * sizes.hidden**2 + 2 * tokens * sizes.hidden
    of_neurons = 2 * sizes.hidden * sizes.ffn
    return (heads * of_heads + neurons * of_neurons).sum(1)


def saved_bytes(forward: Callable[[], Tensor], not_counted: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass: every storage that autograd saves, but `not_counted`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
    kept: dict[int, Tensor] = {}  # by address; a freed storage's address would be given out again

    def pack(tensor: Tensor) -> Tensor:
        own = tensor.detach()  # a saved output itself would hold the graph that holds it, for good
        if own.untyped_storage().data_ptr() not in known:
            kept[own.untyped_storage().data_ptr()] = own
        return own

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
