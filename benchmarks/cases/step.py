"""A training step of a BERT encoder: forward, backward and the optimizer, with AdamW or `LiveAdamW`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fastmask as fm
from benchmarks.cases.case import DENSE
from benchmarks.cases.encoder import Call, Encoder
from benchmarks.measure import Side
from benchmarks.setting import Setting
from fastmask.live import live_of, masked_parameters

__all__ = ["Step"]

OPTIONS: dict[str, Any] = {"lr": 1e-5}


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

    def __init__(self, setting: Setting, names: Sequence[str] = ()) -> None:
        super().__init__(setting, names)
        self.optimizers = {name: self._optimizer(name, model) for name, model in self.models.items()}

    @classmethod
    def why_not(cls, setting: Setting, name: str) -> str | None:
        """Gradients of several languages can be multiplied one after the other."""
        return None

    def twin(self) -> nn.Module:
        """The dense model once more, with parameters of its own."""
        return copy.deepcopy(self.plain)

    def model(self, name: str) -> nn.Module:
        """Plain or attached; moments are kept for the languages of the masks, so these are those of the batch."""
        if name not in self.implementations:
            return super().model(name)
        model = self.twin()
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

    def _optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name in ("live", "sparse"):
            return fm.LiveAdamW(trained, model=model, **OPTIONS)
        return torch.optim.AdamW(trained, fused=True, **OPTIONS)

    def _side(self, name: str, model: nn.Module) -> Side:
        passes, optimizer = super()._side(name, model), self.optimizers[name]

        def step() -> None:
            passes.run()
            optimizer.step()

        return Side(step, passes.reset)

    def run(self, name: str, model: nn.Module, call: Call, x: Tensor, upstream: Tensor) -> Tensor:
        """Forward and backward; "multiply" adds up the gradients of each language's examples, times its masks."""
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
