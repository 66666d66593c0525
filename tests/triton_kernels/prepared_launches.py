"""Calls of the row kernels, and what reaches the driver, on tensors of the CPU that nothing computes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from fastmask_kernels import launching
from fastmask_kernels.launching import Prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import Recorder
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_turn_grad import row_turn_grad_kernel
from fastmask_kernels.row_weight_grad import row_weight_grad
from recorder_kernels import scale

__all__ = ["TURNS", "Driver", "Prepared", "calls", "json", "launching", "scale", "torch"]

L, K = 3, 64
TURNS = row_turn_grad_kernel.arg_names.index("turns")


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
            packed, out = [torch.zeros(M, n, dtype=act) for n in sizes], torch.zeros(M, K, dtype=act)
            outs = [torch.zeros(M, n, dtype=act) for n in sizes]
            dWs, heads = [torch.zeros(n, K) for n in sizes], [torch.zeros(M, 64, dtype=act) for _ in sizes]
            dW_heads = [torch.zeros(64, K) for _ in sizes]
            name = f"{act} {own} {G}"
            for with_bias in (True, False):
                found[f"row_matmul {name} {with_bias}"] = (
                    lambda x=x, w=weights, m=masks, p=plan, n=sizes, o=outs, b=(biases if with_bias else None): (
                        row_matmul(x, w, *m, p, n, b, outs=o)
                    )
                )
                found[f"row_matmul_t {name} {with_bias}"] = (
                    lambda x=packed, w=weights, m=masks, p=plan, o=out, b=(bias if with_bias else None): row_matmul_t(
                        x, w, *m, p, b, out=o
                    )
                )
            found[f"row_weight_grad {name}"] = lambda d=packed, x=x, m=masks, p=plan, n=sizes, o=dWs: row_weight_grad(
                d, x, *m, p, n, weight_dtype=torch.float32, outs=o, accumulate=True
            )
            found[f"row_weight_grad of heads {name}"] = lambda d=heads, x=x, m=masks, p=plan, G=G, o=dW_heads: (
                row_weight_grad(d, x, *m, p, [64] * G, weight_dtype=torch.float32, outs=o, units=[64] * G)
            )
            if G == 1:
                found[f"activation {name}"] = lambda x=x, w=weights, m=masks, p=plan, n=sizes, o=outs, z=packed: (
                    row_matmul(x, w, *m, p, n, outs=o, activation="gelu", before=z[0], active=z[0])
                )
    return found
