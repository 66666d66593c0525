"""One linear layer of 768 -> 3072 features under a mask over single weights, forward and backward."""

from __future__ import annotations

import torch

import fastmask as fm
from fastmask.torch_path.naive import masked_linear_naive

__all__ = ["WeightMaskedLayer"]


class WeightMaskedLayer:
    """`MaskedLinear` with a random half of its weights, one language, against `F.linear` on the same shared input."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        self.mask = fm.Mask.weights(torch.rand(1, 3072, 768) < 0.5)
        self.dense = torch.nn.Linear(768, 3072)
        self.masked = fm.MaskedLinear.from_linear(self.dense, self.mask)
        self.x = torch.randn(tokens // 128, 128, 768, requires_grad=True)
        self.ids = torch.zeros(tokens // 128, dtype=torch.int64)
        self.upstream = torch.randn(tokens // 128, 128, 3072)

    def step_dense(self) -> None:
        """Forward and backward of the plain layer."""
        self.dense(self.x).backward(self.upstream)

    def step_masked(self) -> None:
        """Forward and backward of the masked layer."""
        self.masked(self.x, self.ids).backward(self.upstream)

    def reset(self) -> None:
        """Clear the gradients."""
        self.dense.zero_grad(set_to_none=True)
        self.x.grad = None

    def check(self) -> None:
        """See that the masked layer equals the definition before it is timed."""
        with torch.no_grad():
            expected = masked_linear_naive(self.x, self.dense.weight, self.mask, self.ids, self.dense.bias)
            torch.testing.assert_close(self.masked(self.x, self.ids), expected, rtol=1e-4, atol=1e-4)
