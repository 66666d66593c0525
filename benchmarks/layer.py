"""One linear layer of 768 -> 3072 features under a mask over single weights, forward and backward."""

from __future__ import annotations

import torch

import fastmask as fm
from benchmarks.measure import Side
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

    def sides(self) -> tuple[Side, Side]:
        """Forward and backward of the plain layer, and of the masked one; both have the same parameters."""

        def reset() -> None:
            self.dense.zero_grad()
            self.x.grad = None

        return (
            Side(lambda: self.dense(self.x).backward(self.upstream), reset),
            Side(lambda: self.masked(self.x, self.ids).backward(self.upstream), reset),
        )

    def check(self) -> None:
        """See that the masked layer equals the definition before it is timed."""
        with torch.no_grad():
            expected = masked_linear_naive(self.x, self.dense.weight, self.mask, self.ids, self.dense.bias)
            torch.testing.assert_close(self.masked(self.x, self.ids), expected, rtol=1e-4, atol=1e-4)
