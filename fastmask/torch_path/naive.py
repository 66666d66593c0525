"""The definition of `masked_linear` in a few lines: slow, dense, differentiable, and the oracle of every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.masks import Mask


def masked_linear_naive(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`F.linear(x_b, W * M_l)` for each example b of language l; shapes as in `fastmask.masked_linear`."""
    keep = mask.to_dense()
    outputs = []
    for example, language in zip(x, language_ids.tolist(), strict=True):
        live = keep[language].to(weight.dtype) if language >= 0 else torch.ones_like(weight)
        y = example @ (weight * live).t()
        if bias is not None:
            # A dead row is a dead output unit: its bias is gated too.
            y = y + (bias * live[:, 0] if mask.kind == "rows" else bias)
        outputs.append(y)
    return torch.stack(outputs) if outputs else F.linear(x, weight, bias)
