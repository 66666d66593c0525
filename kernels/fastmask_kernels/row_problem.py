"""What a weight gradient under row masks is asked with: its arguments, their checks, and its block sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask_kernels.configs import Config
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_arguments import aligned, check_activation, check_rows
from fastmask_kernels.row_configs import Table, choose, kind_of
from fastmask_kernels.tuning import tuned

__all__ = ["RowProblem"]


class RowProblem(NamedTuple):
    """The arguments of `row_weight_grad`, which says what they are."""

    dys: Sequence[Tensor]
    x: Tensor
    indices: Sequence[Tensor]
    counts: Sequence[Tensor]
    plan: Plan
    n_rows: Sequence[int]
    units: Sequence[int]
    weight_dtype: torch.dtype
    outs: Sequence[Tensor] | None
    accumulate: bool
    with_bias: bool
    transposed: bool
    column_sums: bool
    config: Config | None
    allow_tf32: bool

    def check(self) -> None:
        """By shapes, dtypes and strides only.

        Raises:
            TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
        """
        G, x, plan = len(self.dys), self.x, self.plan
        check_activation("x", x, plan)
        check_rows(self.indices, self.counts, G, plan, x.device)
        for number, dy in enumerate(self.dys):
            check_activation(f"dys[{number}]", dy, plan)
            if dy.dtype != x.dtype or dy.device != x.device:
                raise ValueError(f"dys[{number}]: expected {x.dtype} on {x.device}, given {dy.dtype} on {dy.device}")
        if self.weight_dtype not in (x.dtype, torch.float32):
            raise TypeError(f"weight_dtype: expected {x.dtype} or torch.float32, given {self.weight_dtype}")
        if len(self.n_rows) != G or min(self.n_rows) < 1:
            raise ValueError(f"n_rows: expected {G} positive integers, given {list(self.n_rows)}")
        if len(self.units) != G or any(u < 1 or n % u for u, n in zip(self.units, self.n_rows, strict=True)):
            raise ValueError(f"units: expected a divisor of each of {list(self.n_rows)}, given {list(self.units)}")
        if self.accumulate and self.outs is None:
            raise ValueError("accumulate: expected outs to add to, given None")
        if self.with_bias and self.column_sums:
            given = "column_sums are a bias's gradient in the place of db"
            raise ValueError(f"{given}: expected one of with_bias, column_sums")
        if self.outs is not None:
            self._check_outs(self.outs)

    def _check_outs(self, outs: Sequence[Tensor]) -> None:
        if len(outs) != len(self.n_rows):
            raise ValueError(f"outs: expected {len(self.n_rows)} tensors, given {len(outs)}")
        for number, (out, n) in enumerate(zip(outs, self.n_rows, strict=True)):
            shape, device = (n, self.x.shape[1]), self.x.device
            right = out.dtype == torch.float32 and tuple(out.shape) == shape
            if not right or not out.is_contiguous() or out.device != device:
                raise ValueError(
                    f"outs[{number}]: expected contiguous float32 {shape} on {device}, "
                    f"given {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}"
                )

    def chosen(
        self, kernel: str, table: Table, outer: dict[str, list[int]], tokens: int, pieces: int = 1, unit: int = 0
    ) -> Config:
        """The config given, measured or else chosen; a program sums over `tokens`. As `row_configs.choose`.

        With a `unit`, BN divides it.
        """
        if self.config is not None:
            return self.config
        K, widths = self.x.shape[1], [dy.shape[1] for dy in self.dys]
        kind, fits = kind_of(self.x, None, self.allow_tf32), aligned(self.x, *self.dys)

        def usable(config: Config) -> bool:
            return unit % config["BN"] == 0

        sizes = [*widths, K, unit] if unit else [*widths, K]
        return tuned(kernel, self.x, None, sizes, self.plan, self.allow_tf32) or choose(
            table, self.x.device, kind, fits, outer, ("BM", tokens), pieces=pieces, usable=usable
        )
