"""AdamW written out on whole tensors with flags of what may move, and small models to run it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastmask as fm
from fastmask.live import Live
from tests.core.oracle import random_mask

L = 4


class Literal:
    """AdamW of some parameters, in their dtype: the formulas of Loshchilov and Hutter 2019, one after the other."""

    def __init__(self, parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, maximize=False):  # type: ignore[no-untyped-def]
        self.parameters = list(parameters)
        self.options = (lr, *betas, eps, weight_decay, -1 if maximize else 1)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = [0] * len(self.parameters)

    @torch.no_grad()
    def step(self, gradients: list[Tensor | None], live: list[Tensor]) -> None:
        """One step; `live` are flags of each parameter's shape."""
        lr, beta1, beta2, eps, decay, sign = self.options
        for i, (p, g, keep) in enumerate(zip(self.parameters, gradients, live, strict=True)):
            if g is None:
                continue
            self.steps[i] += 1
            m, v = self.moments[i]
            g = sign * g
            new_m = beta1 * m + (1 - beta1) * g
            new_v = beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = new_m / (1 - beta1 ** self.steps[i]), new_v / (1 - beta2 ** self.steps[i])
            new_p = p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + eps)
            for old, new in ((p, new_p), (m, new_m), (v, new_v)):
                old[keep] = new[keep]


class Net(nn.Module):
    """A masked layer between two that are not; K = 40 leaves a rest behind whole vectors of 16."""

    def __init__(
        self, kind: str, N: int = 32, K: int = 40, unit: int = 4, density: float = 0.5, extremes: bool = True
    ) -> None:
        super().__init__()
        self.before = nn.Linear(6, K)
        self.masked = fm.MaskedLinear(K, N, random_mask(kind, L, N, K, density, unit, extremes=extremes))
        self.after = nn.Linear(N, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.after(torch.tanh(self.masked(torch.tanh(self.before(x)), ids)))


def live_flags(net: Net, languages: list[int]) -> list[Tensor]:
    """Flags of each parameter of a `Net`, from the dense mask."""
    flags = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    if -1 not in languages:
        dense = net.masked.mask.to_dense()[languages].any(0)
        flags["masked.weight"] = dense
        if net.masked.mask.kind == "rows":
            flags["masked.bias"] = dense[:, 0]
    return list(flags.values())


def random_gradients(net: nn.Module, seed: int) -> None:
    """Normal numbers for every gradient; the same whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Each parameter and its moments and step, from the state dict; moments that are not kept are zero."""
    states = optimizer.state_dict()["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for number, p in enumerate(parameters):
        moments = [states[number][key] for key in ("exp_avg", "exp_avg_sq")]
        if "held" in states[number]:
            held = Live.decoded(states[number]["held"], p.shape)
            for place, compact in enumerate(moments):
                moments[place] = torch.zeros_like(p)
                held.write(moments[place], compact)
        found += [p.detach(), *moments, states[number]["step"]]
    return [tensor.clone() for tensor in found]
