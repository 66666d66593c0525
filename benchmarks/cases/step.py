"""A training step of a BERT encoder: forward, backward and the optimiser, with AdamW or `LiveAdamW`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.case import DENSE
from benchmarks.cases.encoder import Encoder
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.live import live_of, masked_parameters

__all__ = ["Step"]

OPTIONS: dict[str, Any] = {"lr": 1e-5}
GRADIENTS = "gradients times masks"  # the reference of sparse fine-tuning


class Step(Encoder):
    """A step of each implementation on parameters of its own; the gradients are what is proven.

    "sparse" is sparse fine-tuning: the full network runs (`forward="full"`), and each language changes what it owns.
    "multiply" does the same as composable-sft does: whole gradients, one language after the other, times masks.
    """

    name = "step"
    parts = ("step",)
    implementations = (*DENSE, "fastmask", "live", "sparse", "multiply")
    ours = ("fastmask", "live", "sparse")
    can = ("bfloat16", "cuda")
    share = False

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        self.optimizers = {name: self._optimizer(name, model) for name, model in self.models.items()}

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """Gradients of several languages can be multiplied one after the other."""
        return None

    def model(self, name: str) -> nn.Module:
        """Plain or attached; moments are kept for the languages of the masks, so these are those of the batch."""
        model = self.variants.twin()
        if name == "multiply":
            self.keep = self._flags()
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(path in self.keep)
        if name not in (*self.ours, "full"):
            return model
        own = self.subnets.select(self.subnets.languages[: self.setting.present])
        fm.attach(model, own, forward="full" if name == "sparse" else "masked")
        if name == "sparse":
            fm.freeze_unmasked(model)
        return model

    def _flags(self) -> dict[str, Tensor]:
        """What each language of the batch owns of each masked parameter: float32 [present, *shape]."""
        masked, found = masked_parameters(self.variants.masked), {}
        for path, parameter in self.variants.masked.named_parameters():
            if parameter in masked:
                own = [live_of(masked[parameter].mask, [language]) for language in range(self.setting.present)]
                found[path] = torch.stack([live.only(torch.ones_like(parameter.detach())) for live in own])
        return found

    def _optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name in ("live", "sparse"):
            return fm.LiveAdamW(trained, model=model, **OPTIONS)
        return torch.optim.AdamW(trained, fused=True, **OPTIONS)

    def _side(self, name: str) -> Side:
        inputs, optimizer = itertools.cycle(self.inputs), self.optimizers[name]

        def step() -> None:
            self.run(name, next(inputs))
            optimizer.step()

        return Side(step, optimizer.zero_grad)

    def run(self, name: str, x: Tensor) -> Tensor:
        """Forward and backward of an implementation."""
        if name != "multiply":
            return super().run(name, x)
        with self.setting.autocast():
            return self._multiplied(self.models[name], x, self.upstream)

    def _multiplied(self, model: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
        """The full network; gradients of each language's examples, times its masks, added up."""
        named, outputs = dict(model.named_parameters()), []
        sums: dict[str, Tensor] = {}
        for language in range(self.setting.present):
            own = slice(None) if self.setting.present == 1 else self.ids == language
            y = model(inputs_embeds=x[own])[0]
            y.backward(upstream[own].to(y.dtype))
            outputs.append(y.detach())
            for path, keep in self.keep.items():
                grad = named[path].grad
                assert grad is not None
                grad.mul_(keep[language])
                sums[path] = sums[path].add_(grad) if path in sums else grad
                named[path].grad = None
        for path, grad in sums.items():
            named[path].grad = grad
        return torch.cat(outputs)

    # ---- proof and arithmetic

    def reference(self, name: str) -> str:
        """Sparse fine-tuning computes the full network, and masked gradients."""
        return GRADIENTS if name in ("sparse", "multiply") else super().reference(name)

    def plain(self, reference: str) -> nn.Module:
        """A model in a plain form."""
        return self.model("multiply") if reference == GRADIENTS else super().plain(reference)

    def plain_run(self, reference: str, model: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
        """As `run`, of a plain form."""
        if reference == GRADIENTS:
            return self._multiplied(model, x, upstream)
        return super().plain_run(reference, model, x, upstream)

    def ideal(self, name: str) -> float:
        """FLOPs of the encoder; sparse fine-tuning saves the dead part of dW."""
        if name not in ("sparse", "multiply"):
            return super().ideal(name)
        masks = self.variants.masks.values()
        sizes = [mask.out_features * mask.in_features for mask in masks]
        live = sum(n * float(m.density[: self.setting.present].mean()) for n, m in zip(sizes, masks, strict=True))
        return 3 * sum(sizes) / (2 * sum(sizes) + live)
