"""Launches of the row kernels with every block size of their tables, at the sizes of the test that checks them."""

from __future__ import annotations

import torch
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import DEVICE
from fastmask_kernels.row_configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from torch import Tensor

__all__ = ["EDGES", "EVEN", "launch_shipped"]

EVEN, EDGES = 256, 48  # columns that every block divides, or none

_BF16, _FP32 = torch.bfloat16, torch.float32
_DTYPES = {"half": (_BF16, _BF16), "master": (_BF16, _FP32), "tf32": (_FP32, _FP32), "ieee": (_FP32, _FP32)}


def launch_shipped(chip: str, rows: list[int], columns: int, unit: int = 128) -> None:
    """As `tests/triton_kernels/test_shipped_rows.py`, on the recorder's device, for weights [rows, columns].

    Columns that no block divides are tried in half precision only.
    """
    L, ids, tokens = 3, 4, 37

    def randn(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    plan = Plan(randn(ids, dtype=torch.int64), tokens, L)
    masks = [randn(L, n, dtype=torch.int64) for n in rows], [randn(L, dtype=torch.int64) for _ in rows]
    for table, grad in ((ROW_MATMUL, False), (ROW_MATMUL_T, False), (ROW_OWNED_GRAD, True), (ROW_TURN_GRAD, True)):
        for kind in [kind for own, kind in table if own == chip]:
            act, own = _DTYPES[kind]
            x, packed = randn(ids * tokens, columns, dtype=act), [randn(ids * tokens, n, dtype=act) for n in rows]
            weights, biases = [randn(n, columns, dtype=own) for n in rows], [randn(n, dtype=own) for n in rows]
            for config in table[chip, kind] if kind == "half" or columns == EVEN else ():
                options = {"config": config, "allow_tf32": kind == "tf32"}
                if grad:
                    units = [unit if table is ROW_OWNED_GRAD else 1] * len(rows)
                    row_weight_grad(
                        packed, x, *masks, plan, rows, weight_dtype=own, units=units, with_bias=True, **options
                    )
                elif table is ROW_MATMUL:
                    row_matmul(x, weights, *masks, plan, rows, biases, **options)
                else:
                    row_matmul_t(packed, weights, *masks, plan, randn(columns, dtype=own), **options)
