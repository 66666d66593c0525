"""What the kernels over tiles accept: checked before a launch, from shapes, dtypes and strides alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask_kernels.interpreter import check_runnable
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_layout import TileLayout

__all__ = ["check_gradient", "check_operands", "check_product", "with_contiguous_rows"]


def check_operands(x: Tensor, weight: Tensor, layout: TileLayout, plan: Plan) -> None:
    """Raise TypeError or ValueError unless activations, weight, masks and plan belong together."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"expected activations of float16, bfloat16 or float32, given {x.dtype}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"expected a weight of {x.dtype} or float32, given {weight.dtype}")
    if tuple(weight.shape) != layout.shape:
        raise ValueError(f"expected a weight of the layout's shape {layout.shape}, given {tuple(weight.shape)}")
    if plan.n_languages != layout.n_languages:
        raise ValueError(f"a plan of {plan.n_languages} languages with a layout of {layout.n_languages}")
    if plan.n_rows >= 2**31:
        raise ValueError(f"{plan.n_rows} rows in one batch: positions are 32-bit")
    for name, device in (("weight", weight.device), ("layout", layout.device), ("plan", plan.token_rows.device)):
        if device != x.device:
            raise ValueError(f"activations on {x.device} with a {name} on {device}")


def check_product(
    x: Tensor, weight: Tensor, layout: TileLayout, plan: Plan, bias: Tensor | None, transposed: bool, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of `tile_matmul` as a kernel reads them, x and weight with contiguous rows, and where it writes.

    Raises what `tile_matmul` raises.
    """
    check_operands(x, weight, layout, plan)
    check_runnable(x, weight)
    N, K = layout.shape
    in_size, out_size = (N, K) if transposed else (K, N)
    if x.shape != (plan.n_rows, in_size):
        raise ValueError(f"expected x [{plan.n_rows}, {in_size}], given {tuple(x.shape)}")
    if bias is not None and (transposed or bias.shape != (N,) or bias.device != x.device):
        raise ValueError(f"expected a bias [{N}] on {x.device} and not transposed, given {tuple(bias.shape)}")
    if out is None:
        out = torch.empty(plan.n_rows, out_size, dtype=x.dtype, device=x.device)
    elif out.shape != (plan.n_rows, out_size) or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"expected out [{plan.n_rows}, {out_size}] of {x.dtype} on {x.device}, "
            f"given {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    elif out_size > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, given strides {out.stride()}")
    return with_contiguous_rows(x), with_contiguous_rows(weight), out


def check_gradient(
    dy: Tensor, x: Tensor, layout: TileLayout, plan: Plan, weight_dtype: torch.dtype, out: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operands of `tile_weight_grad` as a kernel reads them, with contiguous rows, and where it writes.

    Raises what `tile_weight_grad` raises.
    """
    N, K = layout.shape
    if dy.shape != (plan.n_rows, N) or x.shape != (plan.n_rows, K):
        raise ValueError(
            f"expected dy [{plan.n_rows}, {N}] and x [{plan.n_rows}, {K}], given {tuple(dy.shape)}, {tuple(x.shape)}"
        )
    if dy.dtype != x.dtype:
        raise TypeError(f"dy is {dy.dtype}, x is {x.dtype}: they must agree")
    if dy.device != x.device:
        raise ValueError(f"dy on {dy.device}, x on {x.device}")
    if accumulate and out is None:
        raise ValueError("accumulate adds to a given `out`")
    if out is None:
        out = torch.empty(N, K, dtype=weight_dtype, device=x.device)
    elif out.dtype != weight_dtype:
        raise TypeError(f"out is {out.dtype}, weight_dtype is {weight_dtype}")
    check_operands(x, out, layout, plan)
    check_runnable(dy, x, out)
    return with_contiguous_rows(dy), with_contiguous_rows(x), out


def with_contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if elements of a row lie side by side, else a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
