"""Layers, masks and batches for the tests of the tile kernels, and how results are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastmask_kernels.configs import Config
from fastmask_kernels.naive import naive_tile_matmul, naive_tile_weight_grad
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad
from kernel_oracle import DEVICE, assert_close
from torch import Tensor

TILE = (32, 64)
MATMUL = Config((("BM", 16), ("BK", 32)), 4, 2)  # two steps a tile
GRAD = Config((("BN", 32), ("BK", 64), ("BM", 16)), 4, 2)


@pytest.fixture(autouse=True)
def results_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels must write every element: what `torch.empty` gives them here is not a number."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


class Problem:
    """One layer, its masks and a batch: what every test here needs, and how results are checked."""

    def __init__(
        self, ids: list[int], T: int, L: int, N: int, K: int, block: tuple[int, int] = (1, 1), density: float = 0.4,
        dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, seed: int = 0,
        tile: tuple[int, int] = TILE, whole: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator).to(DEVICE)
            # Sums of small whole numbers are exact in any order.
            return numbers.round().clamp(-2, 2) if whole else numbers

        flags = torch.rand(L, -(-N // block[0]), -(-K // block[1]), generator=generator) < density
        if L >= 3:
            flags[1], flags[2] = False, True
        flags = flags.to(DEVICE)
        self.layout = TileLayout.from_blocks(flags, block, tile)
        self.keep = flags.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
        N, K = self.layout.shape
        self.plan = Plan(torch.tensor(ids, dtype=torch.int64, device=DEVICE), T, L)
        self.language_of = torch.tensor(ids, dtype=torch.int64, device=DEVICE).repeat_interleave(T)
        M = len(ids) * T
        self.x, self.dy = normal(M, K).to(dtype), normal(M, N).to(dtype)
        self.weight, self.bias = normal(N, K).to(weight_dtype or dtype), normal(N).to(weight_dtype or dtype)

    def check_matmul(self, transposed: bool, bias: bool, **options: Any) -> Tensor:
        """Y, or dX if transposed."""
        x, b = self.dy if transposed else self.x, self.bias if bias else None
        config = options.pop("config", MATMUL)
        y = tile_matmul(x, self.weight, self.layout, self.plan, b, transposed=transposed, config=config, **options)
        b64 = None if b is None else b.double()
        weight = self.weight.to(x.dtype)  # a float32 master weight is rounded, in the kernel too
        truth = naive_tile_matmul(x.double(), weight.double(), self.keep, self.language_of, b64, transposed)
        plain = naive_tile_matmul(x, weight, self.keep, self.language_of, b, transposed)
        assert_close("dx" if transposed else "y", y, truth, plain)
        return y

    def check_grad(self, **options: Any) -> Tensor:
        """DW; `differentiate` is what to check, if not `tile_weight_grad`."""
        weight_dtype, config = self.weight.dtype, options.pop("config", GRAD)
        differentiate = options.pop("differentiate", tile_weight_grad)
        grad = differentiate(
            self.dy, self.x, self.layout, self.plan, weight_dtype=weight_dtype, config=config, **options
        )
        assert isinstance(grad, Tensor)
        truth = naive_tile_weight_grad(self.dy.double(), self.x.double(), self.keep, self.language_of).sum(0)
        plain = naive_tile_weight_grad(self.dy, self.x, self.keep, self.language_of).sum(0).to(weight_dtype)
        assert_close("dW", grad, truth, plain)
        return grad

    def check_whole_grad(self, config: Config | None = GRAD) -> None:
        """DW of small whole numbers: their sums are exact, so nothing may differ."""
        dy, x = self.dy.clamp(-2, 2).round(), self.x.clamp(-2, 2).round()
        grad = tile_weight_grad(dy, x, self.layout, self.plan, weight_dtype=self.weight.dtype, config=config)
        truth = naive_tile_weight_grad(dy.double(), x.double(), self.keep, self.language_of).sum(0)
        assert torch.equal(grad.double(), truth)

    def check_all(self) -> None:
        """Everything, once."""
        self.check_matmul(False, bias=True)
        self.check_matmul(True, bias=False)
        self.check_grad()
        self.check_whole_grad()
