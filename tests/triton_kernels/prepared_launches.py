"""Calls of the row kernels, and what reaches the driver, on tensors of the CPU that nothing computes with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from fastmask_kernels import launching
from fastmask_kernels.launching import Prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import Recorder
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from recorder_kernels import scale

__all__ = ["Driver", "Prepared", "calls", "json", "launching", "scale", "torch"]

L, K = 3, 64


class Driver(Recorder):
    """Keeps what each launch hands over: the variant, the grid and all arguments, tensors as their addresses."""

    def __init__(self, chip: str = "sm_90") -> None:
        super().__init__(chip)
        self.device = "cpu"
        self.given: list[Any] = []
        self.hooks: list[bool] = []  # whether a launch tells them

    def _runner(self, variant: Any) -> Callable[..., None]:
        def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any, *more: Any) -> None:
            arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in more[2:]]
            if variant.kernel not in ("plan_kernel", "tiles_kernel"):  # once for each batch
                self.given.append([str(variant.key), [x, y, z], arguments])
                self.hooks.append(more[0] is not None)

        return run


def with_the_same_memory(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with results, and whatever else it makes, where they were the first time."""
    made: list[torch.Tensor] = []

    def run() -> object:
        places = itertools.count()

        def again(make: Callable[..., torch.Tensor], *shape: Any, **options: Any) -> torch.Tensor:
            place = next(places)
            if place == len(made):
                made.append(make(*shape, **options))
            return made[place]

        with patch("torch.empty", partial(again, torch.empty)), patch("torch.zeros", partial(again, torch.zeros)):
            return call()

    return run


def calls() -> dict[str, Callable[[], object]]:
    """Every kind of launch that is prepared; each call gives the kernel the same memory."""
    found: dict[str, Callable[[], object]] = {}
    for act, own in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        for sizes in ((48,), (32, 48, 40)):
            G, M = len(sizes), 2 * 40
            plan = Plan(torch.tensor([0, 2]), 40, L)
            plan.tiles(32)
            x, bias = torch.zeros(M, K, dtype=act), torch.zeros(K, dtype=own)
            weights, biases = [torch.zeros(n, K, dtype=own) for n in sizes], [torch.zeros(n, dtype=own) for n in sizes]
            masks = ([torch.zeros(L, n, dtype=torch.int64) for n in sizes], [torch.zeros(L, dtype=torch.int64)] * G)
            packed, heads = ([torch.zeros(M, n, dtype=act) for n in widths] for widths in (sizes, [64] * G))
            grad = partial(row_weight_grad, x=x, plan=plan, weight_dtype=torch.float32)
            name, both = f"{act} {own} {G}", dict(zip(("indices", "counts"), masks, strict=True))
            for with_bias in (True, False):
                b, bs = (bias, biases) if with_bias else (None, None)
                found[f"row_matmul {name} {with_bias}"] = partial(row_matmul, x, weights, *masks, plan, sizes, bs)
                found[f"row_matmul_t {name} {with_bias}"] = partial(row_matmul_t, packed, weights, *masks, plan, b)
            found[f"row_weight_grad {name}"] = partial(grad, packed, **both, n_rows=sizes)
            found[f"row_weight_grad of heads {name}"] = partial(grad, heads, **both, n_rows=[64] * G, units=[64] * G)
            if G == 1:
                z = packed[0]
                found[f"activation {name}"] = partial(
                    row_matmul, x, weights, *masks, plan, sizes, activation="gelu", before=z, active=z
                )
    return {name: with_the_same_memory(call) for name, call in found.items()}
