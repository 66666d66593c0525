"""What the row kernels accept: one to three weights with a mask over their rows each, checked before a launch.

The checks read shapes, dtypes and strides only, so that they never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from fastmask_kernels.interpreter import check_runnable
from fastmask_kernels.plan import Plan

__all__ = [
    "aligned", "check_activation", "check_index", "check_outs", "check_rows", "check_vectors", "check_weights",
    "filled", "positions",
]  # fmt: skip

MOST_GROUPS = 3  # Q, K and V
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

T = TypeVar("T")


def filled(items: Sequence[T]) -> list[T]:
    """One to three items as exactly three: a kernel has arguments for three and never reads the spare ones."""
    return [*items, *[items[0]] * (MOST_GROUPS - len(items))]


def positions(*sizes: int) -> list[list[int]]:
    """Where groups of so many things lie if they stand one behind the other."""
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def aligned(*tensors: Tensor) -> bool:
    """Whether the rows of all tensors allow 16-byte copies: Triton asks for strides that are multiples of 16."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in tensors)


def check_activation(name: str, x: Tensor, plan: Plan, width: int | None = None) -> None:
    """Rows [M, width] of a supported dtype; elements lie side by side, rows may lie apart (slices of one buffer).

    Raises:
        TypeError: another dtype.
        ValueError: another shape or stride, or over 2**31 - 1 rows.
        RuntimeError: bfloat16 in the interpreter.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16 or float32, given {x.dtype}")
    check_runnable(x)
    if x.ndim != 2 or x.shape[0] != plan.n_rows or (width is not None and x.shape[1] != width):
        expected = f"[{plan.n_rows}, {'width' if width is None else width}]"
        raise ValueError(f"{name}: expected shape {expected}, given {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"{name}: expected a width of at least 1, given shape {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name}: expected the elements of a row side by side, given strides {x.stride()}")
    if plan.n_rows >= 2**31:
        raise ValueError(f"{name}: expected at most 2**31 - 1 rows, given {plan.n_rows}")


def check_index(number: int, index: Tensor, counts: Tensor, plan: Plan, device: torch.device) -> None:
    """`index` int64 [L, most] and `counts` int64 [L] of a mask, on `device` and contiguous.

    Raises:
        ValueError: anything else.
    """
    L = plan.n_languages
    if index.dtype != torch.int64 or index.ndim != 2 or index.shape[0] != L or index.shape[1] < 1:
        raise ValueError(f"indices[{number}]: expected int64 [{L}, most], given {index.dtype} {tuple(index.shape)}")
    if counts.dtype != torch.int64 or tuple(counts.shape) != (L,):
        raise ValueError(f"counts[{number}]: expected int64 [{L}], given {counts.dtype} {tuple(counts.shape)}")
    for name, tensor in ((f"indices[{number}]", index), (f"counts[{number}]", counts)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device} with the activations, given on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, given strides {tensor.stride()}")


def check_rows(
    indices: Sequence[Tensor], counts: Sequence[Tensor], groups: int, plan: Plan, device: torch.device
) -> None:
    """One index and one counts tensor for each of one to three weights.

    Raises:
        ValueError: other numbers of them, or what `check_index` refuses.
    """
    if not 1 <= groups <= MOST_GROUPS:
        raise ValueError(f"expected 1 to {MOST_GROUPS} weights that share an activation, given {groups}")
    if not len(indices) == len(counts) == groups:
        raise ValueError(f"expected {groups} indices and counts, given {len(indices)} and {len(counts)}")
    for number, (index, count) in enumerate(zip(indices, counts, strict=True)):
        check_index(number, index, count, plan, device)
    if plan.token_rows.device != device:
        raise ValueError(f"plan: expected on {device} with the activations, given on {plan.token_rows.device}")


def check_weights(weights: Sequence[Tensor], x: Tensor, K: int) -> None:
    """Contiguous weights [N_g, K] on the device of x, all of x's dtype or all float32.

    Raises:
        TypeError: another dtype. ValueError: another shape, stride or device.
    """
    for number, weight in enumerate(weights):
        name = f"weights[{number}]"
        if weight.dtype not in (x.dtype, torch.float32) or weight.dtype != weights[0].dtype:
            raise TypeError(f"{name}: expected {x.dtype} or float32, the same for all weights, given {weight.dtype}")
        if weight.ndim != 2 or weight.shape[1] != K or weight.shape[0] < 1:
            raise ValueError(f"{name}: expected shape [N, {K}], given {tuple(weight.shape)}")
        if not weight.is_contiguous():
            raise ValueError(f"{name}: expected contiguous rows, given strides {weight.stride()}")
        if weight.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} with the activations, given on {weight.device}")


def check_vectors(name: str, vectors: Sequence[Tensor] | None, sizes: list[int], x: Tensor) -> None:
    """Contiguous [size] of each weight on the device of x, all of x's dtype or all float32; or None.

    Raises:
        TypeError: another dtype. ValueError: another shape, stride or device.
    """
    if vectors is None:
        return
    given = [tuple(vector.shape) for vector in vectors]
    if given != [(size,) for size in sizes]:
        raise ValueError(f"{name}: expected shapes {[(size,) for size in sizes]}, given {given}")
    for vector in vectors:
        if vector.dtype not in (x.dtype, torch.float32) or vector.dtype != vectors[0].dtype:
            raise TypeError(f"{name}: expected {x.dtype} or float32, the same for all, given {vector.dtype}")
        if vector.device != x.device or not vector.is_contiguous():
            raise ValueError(f"{name}: expected contiguous on {x.device}, given {vector.stride()} on {vector.device}")


def check_outs(outs: Sequence[Tensor], widths: list[int], x: Tensor, plan: Plan) -> None:
    """Where to write: [M, width] of x's dtype for each width.

    Raises:
        TypeError, ValueError: anything else.
    """
    if len(outs) != len(widths):
        raise ValueError(f"outs: expected {len(widths)} tensors, given {len(outs)}")
    for number, (out, width) in enumerate(zip(outs, widths, strict=True)):
        check_activation(f"outs[{number}]", out, plan, width)
        if out.dtype != x.dtype or out.device != x.device:
            raise ValueError(f"outs[{number}]: expected {x.dtype} on {x.device}, given {out.dtype} on {out.device}")
