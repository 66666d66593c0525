"""The AdamW step in PyTorch, for what `compiled` does not take: other devices, dtypes and memory orders, or no numba.

Whole parameters take torch's own step, all at once. Where part of a parameter is dead, the step is taken on a copy, of
which the live part is kept: no gradient, were it NaN, can reach the rest, and nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastmask.optim.compiled import Update

__all__ = ["update_group"]


def update_group(updates: list[Update]) -> None:
    """Take the step of parameters of one group, which share their options."""
    if not updates:
        return
    lr, beta1, beta2, eps, weight_decay, maximize = updates[0].options  # those of the group

    def take(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], steps: list[Tensor]) -> None:
        # The fused form takes memory as it comes, so that of all four must be in the same order.
        fused = p[0].is_cpu and all(tensor.is_contiguous() for tensors in (p, g, m, v) for tensor in tensors)
        adamw(
            p, g, m, v, [], steps, foreach=p[0].is_cuda, fused=fused, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr,
            weight_decay=weight_decay, eps=eps, maximize=bool(maximize), has_complex=any(map(torch.is_complex, p)),
        )  # fmt: skip

    whole = [update for update in updates if update.live is None]
    if whole:
        take(*(list(column) for column in zip(*(update[:5] for update in whole), strict=True)))
    partly = [update for update in updates if update.live is not None]
    largest = max([update.parameter.numel() for update in partly], default=0)
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # fresh memory for each would cost more than the step
    for parameter, gradient, exp_avg, exp_avg_sq, step, live, _ in partly:
        assert live is not None
        where = (parameter.device, parameter.dtype)
        if where not in copies:
            copies[where] = parameter.new_empty(3, largest)
        held = (parameter, exp_avg, exp_avg_sq)
        moved = [copies[where][i, : old.numel()].view(old.shape).copy_(old) for i, old in enumerate(held)]
        take([moved[0]], [gradient], [moved[1]], [moved[2]], [step])
        for old, new in zip(held, moved, strict=True):
            torch.where(live.keep(), new, old, out=old)
