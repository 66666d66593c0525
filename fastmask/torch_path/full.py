"""The full network, whatever the languages: forward and dX of layers whose masks only say what may learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastmask.torch_path.gemm import by_onednn, cast, combined, products

__all__ = ["full_forward", "full_input_grad"]


def full_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The output [B, T, N] of each weight [N, K], in the dtype of x [B, T, K]."""
    return [_linear(x, w, None if b is None else cast(b, x.dtype)) for w, b in zip(weights, biases, strict=True)]


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if not by_onednn(x):
        return F.linear(x, w, bias)
    y = x.new_empty(*x.shape[:2], w.shape[0])
    products([x.flatten(0, 1)], w, None, [y.flatten(0, 1)])
    return y if bias is None else y.add_(bias)


def full_input_grad(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The dX [B, T, K] of the dY [B, T, N] of each weight."""
    B, T, _ = dys[0].shape
    dx = dys[0].new_empty(B * T, weights[0].shape[1])
    for number, (dy, w) in enumerate(zip(dys, weights, strict=True)):
        combined([dy.reshape(B * T, dy.shape[2])], w, None, [dx], add=number > 0)
    return dx.view(B, T, dx.shape[1])
