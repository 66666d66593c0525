"""A step of sparse fine-tuning: the full network runs, and each language changes what it owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.case import Case
from benchmarks.checking import check_all
from benchmarks.measure import Side
from benchmarks.setting import Setting
from benchmarks.variants import encoder_of, random_weights
from fastmask.live import live_of, masked_parameters

__all__ = ["Finetune"]

OPTIONS: dict[str, Any] = {"lr": 1e-5}


class Finetune(Case):
    """Forward, backward and optimiser of an encoder, with random activations and upstream gradients.

    "dense" trains every parameter of the encoder; "multiply" computes whole gradients and multiplies them by masks, as
    composable-sft does, one language after the other. Both have the fused AdamW.
    """

    name = "finetune"
    units: ClassVar[tuple[str, ...]] = ("both", "heads", "neurons", "weights")
    parts = ("step", "forward+backward", "optimiser")
    implementations = ("dense", "fastmask", "multiply")
    defaults: ClassVar[dict[str, Any]] = {"unit": "weights", "density": 0.05}
    can = ("bfloat16", "cuda")

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        sizes, device = setting.sizes, setting.torch_device
        plain = encoder_of(sizes.hidden, setting.layers, sizes.heads, sizes.ffn, setting.tokens, device, torch.float32)
        languages = [f"language {i}" for i in range(setting.languages)]
        if setting.unit == "weights":
            subnets = random_weights(plain, languages, setting.density, seed=0)
        else:
            subnets = fm.Subnetworks.random(plain.config, languages, setting.density, seed=0, units=setting.unit)
        # Moments are kept for the languages of the masks: those that are trained.
        self.subnets = subnets.select(languages[: setting.present])
        self.ids = setting.ids()
        shape = (2, setting.batch, setting.tokens, sizes.hidden)
        self.x, self.upstream = torch.randn(shape, device=device).unbind()
        self.ours = fm.attach(copy.deepcopy(plain), self.subnets, forward="full")
        self.keep = _flags(self.ours)
        self.models = {"dense": copy.deepcopy(plain), "fastmask": self.ours, "multiply": copy.deepcopy(plain)}
        fm.freeze_unmasked(self.ours)
        self.models["dense"].embeddings.requires_grad_(False)  # type: ignore[union-attr]
        for name, parameter in self.models["multiply"].named_parameters():
            parameter.requires_grad_(name in self.keep)
        self.optimizers = {name: self._optimizer(name, model) for name, model in self.models.items()}

    def _optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        if name == "fastmask":
            return fm.LiveAdamW(trained, model=model, **OPTIONS)
        return torch.optim.AdamW(trained, fused=True, **OPTIONS)

    # ---- what runs

    def _run(self, name: str, model: nn.Module, x: Tensor, upstream: Tensor) -> None:
        """Forward and backward; gradients are left in the model."""
        if name == "multiply":
            self._multiply(model, x, upstream)
            return
        given = {"language_ids": self.ids} if name == "fastmask" else {}
        with self.setting.autocast():
            y = model(inputs_embeds=x, **given)[0]
        y.backward(upstream.to(y.dtype))

    def _multiply(self, model: nn.Module, x: Tensor, upstream: Tensor) -> None:
        named = dict(model.named_parameters())
        sums: dict[str, Tensor] = {}
        for language in range(self.setting.present):
            own = self.ids == language
            with self.setting.autocast():
                y = model(inputs_embeds=x if self.setting.present == 1 else x[own])[0]
            y.backward((upstream if self.setting.present == 1 else upstream[own]).to(y.dtype))
            for name, keep in self.keep.items():
                grad = named[name].grad
                assert grad is not None
                grad.mul_(keep[language])
                sums[name] = sums[name].add_(grad) if name in sums else grad
                named[name].grad = None
        for name, grad in sums.items():
            named[name].grad = grad

    def sides(self, part: str) -> dict[str, Side]:
        """A step, or one half of it: the other half is done before, untimed."""
        return {name: Side(*self._side(name, part)) for name in self.chosen}

    def _side(self, name: str, part: str) -> tuple[Callable[[], object], Callable[[], object]]:
        model, optimizer = self.models[name], self.optimizers[name]

        def compute() -> None:
            self._run(name, model, self.x, self.upstream)

        def step() -> None:
            compute()
            optimizer.step()

        def prepare() -> None:
            optimizer.zero_grad()
            compute()

        if part == "optimiser":
            return optimizer.step, prepare
        return (step if part == "step" else compute), optimizer.zero_grad

    # ---- proof

    def check(self) -> None:
        """Gradients against those of float64 times masks, by the rule of the tests."""
        exact = copy.deepcopy(self.models["multiply"]).double()
        setting, found = self.setting, []
        for name, model in (("fastmask", self.ours), ("multiply", exact), ("multiply", self.models["multiply"])):
            x, upstream = (t.double() if model is exact else t for t in (self.x, self.upstream))
            self._run(name, model, x, upstream)
            named = dict(model.named_parameters())
            # The true gradient of a key's bias is 0.
            grads = [named[key].grad for key in self.keep if not key.endswith("key.bias")]
            found.append([torch.cat([grad.flatten() for grad in grads if grad is not None])])
            model.zero_grad()
        if setting.dtype == "float32":
            check_all(setting.words(), ("gradients",), *found)

    # ---- arithmetic

    def ideal(self) -> float:
        """FLOPs of linear layers: forward, dX and dW, over those with the live part of dW."""
        weights = {name: keep for name, keep in self.keep.items() if keep.ndim == 3}
        total = sum(keep[0].numel() for keep in weights.values())
        live = sum(float(keep.sum()) for keep in weights.values()) / self.setting.present
        return 3 * total / (2 * total + live)

    def ideal_of(self, name: str) -> float | None:
        """Whole gradients are those of dense."""
        return 1.0 if name == "multiply" else super().ideal_of(name)

    def mask_bytes(self) -> int:
        """Masks of all layers, of the languages that are trained."""
        return sum(module.mask.nbytes for module in self.ours.modules() if isinstance(module, fm.MaskedLinear))

    def findings(self, times: dict[str, dict[str, list[float]]]) -> list[str]:
        """How much memory the optimisers' states take."""
        sizes = {
            name: sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
            for name, optimizer in self.optimizers.items()
            if name in self.chosen and optimizer.state
        }
        return [
            f"optimiser state of {name}: {size / 2**20:.1f} MiB, {size / sizes['dense']:.3f} of dense"
            for name, size in sizes.items()
            if "dense" in sizes and name != "dense"
        ]


def _flags(model: nn.Module) -> dict[str, Tensor]:
    """What each language owns of each parameter with a mask: float32 [L, *shape], as gradients are multiplied by it."""
    masked, found = masked_parameters(model), {}
    for name, parameter in model.named_parameters():
        if parameter in masked:
            mask = masked[parameter].mask
            own = [live_of(mask, [language]) for language in range(mask.n_languages)]
            found[name] = torch.stack([live.only(torch.ones_like(parameter.detach())) for live in own])
    return found
