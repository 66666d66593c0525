"""A step of `LiveAdamW` after a batch against `torch.optim.AdamW`: the same model, the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

import fastmask as fm
from benchmarks.cases.case import Case, WrongResultError
from benchmarks.measure import Side
from benchmarks.setting import Setting
from benchmarks.variants import Variants, encoder_of
from fastmask.live import WHOLE, live_of, masked_parameters

__all__ = ["Optimizer"]


class Optimizer(Case):
    """The optimiser's step alone, with the gradients of a batch of the languages present."""

    name = "optimizer"
    units = ("both", "heads", "neurons")
    parts = ("step",)
    implementations = ("adamw", "fastmask", "adamw-foreach")  # the fused form is the faster one on a CPU
    defaults: ClassVar[dict[str, Any]] = {}
    can = ("cuda",)

    def __init__(self, setting: Setting, names: Sequence[str] | None = None) -> None:
        super().__init__(setting, names)
        sizes, device = setting.sizes, setting.torch_device
        heads = (sizes.hidden, setting.layers, sizes.heads, sizes.ffn, setting.tokens)
        plain = encoder_of(*heads, device, torch.float32)
        languages = [f"language {i}" for i in range(setting.languages)]
        subnets = fm.Subnetworks.random(plain.config, languages, setting.density, seed=0, units=setting.unit)
        self.ids = setting.ids()
        self.model = Variants(plain, subnets, self.ids, share=False).masked
        self.ours = fm.LiveAdamW(self.model.parameters(), lr=1e-4, model=self.model)
        x, upstream = torch.randn(2, setting.batch, setting.tokens, sizes.hidden, device=device)
        # The optimiser sees where the gradients come from, so it is there before them.
        self.model(inputs_embeds=x, language_ids=self.ids)[0].backward(upstream)
        self.plain = copy.deepcopy(plain)
        for own, other in zip(self.plain.parameters(), self.model.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.clone()

    def sides(self, part: str) -> dict[str, Side]:
        """One step of each."""
        return {name: self._side(name) for name in self.chosen}

    def _side(self, name: str) -> Side:
        if name == "fastmask":
            return Side(self.ours.step)
        form = {"fused": True} if name == "adamw" else {"foreach": True}
        return Side(torch.optim.AdamW(self.plain.parameters(), lr=1e-4, **form).step)  # type: ignore[arg-type]

    def ideal(self) -> float:
        """All weights over those that a step has to move."""
        live = total = 0
        masked = masked_parameters(self.model)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                total += parameter.numel()
                own = live_of(masked[parameter].mask, self.ids.tolist()) if parameter in masked else WHOLE
                live += round(parameter.numel() * own.share)
        return total / live

    def check(self) -> None:
        """Three steps on both sides: equal where a language is live, unmoved to the last bit elsewhere."""
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        dead = self._dead()
        theirs, ours = self._side("adamw"), self._side("fastmask")
        for _ in range(3):
            theirs.run()
            ours.run()
        names = [name for name, _ in self.plain.named_parameters()]
        sides = zip(names, before, dead, self.plain.parameters(), self.model.parameters(), strict=True)
        for name, old, unmoved, expected, found in sides:
            if not torch.equal(found[unmoved], old[unmoved]):
                raise WrongResultError(f"dead weights of {name} have moved: nothing is timed")
            if not torch.allclose(found[~unmoved], expected[~unmoved], rtol=1e-5, atol=1e-7):
                raise WrongResultError(f"live weights of {name} are not where AdamW moves them: nothing is timed")

    def _dead(self) -> list[torch.Tensor]:
        """Flags of the dead weights of each parameter, from the dense masks."""
        layers = {p: layer for layer in self.model.modules() if isinstance(layer, fm.MaskedLinear)
                  for p in layer.parameters()}  # fmt: skip
        found = []
        for parameter in self.model.parameters():
            dead = torch.zeros_like(parameter, dtype=torch.bool)
            layer = layers.get(parameter)
            if layer is not None:
                keep = layer.mask.to_dense()[self.ids.unique()].any(0)
                if parameter.ndim == 2:
                    dead = ~keep
                elif layer.mask.kind == "rows":
                    dead = ~keep[:, 0]
            found.append(dead)
        return found
