"""What the row kernels share: one to three weights with a mask over their rows each, on the host and on the device.

Activations and parameters are checked here for the tile kernels, too.

The checks read shapes, dtypes and strides only, so that they never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.configs import Config, Table, choose, kind_of, tuned
from fastmask_kernels.interpreter import check_runnable
from fastmask_kernels.plan import Plan

__all__ = [
    "SUM_COLUMNS", "RowProblem", "aligned", "blocks_of", "check_activation", "check_index", "check_parameters",
    "check_rows", "filled", "live_count", "live_rows", "pick", "positions", "sum_over_tokens", "weight_of",
]  # fmt: skip

MOST_GROUPS = 3  # Q, K and V
SUM_COLUMNS, SUM_BYTES = 32, 2**14  # that a program sums over the tokens, and that it reads in a step
SUM_STAGES = tl.constexpr(3)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def pick(g, a0, a1, a2, G: tl.constexpr):
    """The argument of weight g, of G; a number or a pointer."""
    a = a0
    if G >= 2:
        a = tl.where(g == 1, a1, a)
    if G >= 3:
        a = tl.where(g == 2, a2, a)
    return a


@triton.jit
def blocks_of(n0, n1, n2, G: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks n0, n1 and n2 rows of G weights make."""
    blocks = tl.cdiv(n0, BLOCK)
    if G >= 2:
        blocks += tl.cdiv(n1, BLOCK)
    if G >= 3:
        blocks += tl.cdiv(n2, BLOCK)
    return blocks


@triton.jit
def weight_of(block, n0, n1, G: tl.constexpr, BLOCK: tl.constexpr):
    """Of blocks of all weights' rows, one behind the other: the weight that one is of, and its place there."""
    g, place = 0, block
    if G >= 2:
        first = tl.cdiv(n0, BLOCK)
        g += (block >= first).to(tl.int32)
        place -= tl.where(block >= first, first, 0)
    if G >= 3:
        second = tl.cdiv(n1, BLOCK)
        g += (block >= first + second).to(tl.int32)
        place -= tl.where(block >= first + second, second, 0)
    return g, place


@triton.jit
def live_count(counts, segment, N, width):
    """How many rows a segment owns: all N in segment 0, the full network."""
    count = tl.load(counts + segment - 1, mask=segment > 0, other=N).to(tl.int32)
    return tl.minimum(count, width)  # a buffer that is too narrow must not become an access past its end


@triton.jit
def live_rows(index, most, segment, count, j):
    """The rows of the weight at places j of a segment's packed form, int64; 0 behind the live ones, `count`."""
    language = tl.maximum(segment - 1, 0).to(tl.int64)
    row = tl.load(index + language * most + j, mask=j < tl.where(segment == 0, 0, count), other=0)
    return row + tl.where(j < tl.where(segment == 0, count, 0), j, 0)


@triton.jit
def sum_over_tokens(
    rows, row_stride, column, inside, token_rows, first, last, LISTED: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The sum [SIZE] of columns over tokens first to last: of rows that `token_rows` lists, or of all in order."""
    total = tl.zeros([STEP, SIZE], tl.float32)
    # Said so, because loads that no product needs are otherwise not begun ahead.
    for m in tl.range(first, last, STEP, num_stages=SUM_STAGES):
        position = m + tl.arange(0, STEP)
        token = tl.minimum(position, last - 1)
        if LISTED:
            token = tl.load(token_rows + token)
        tile = rows + token.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(tile, mask=(position < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, 0)


def filled(items: Sequence[int]) -> list[int]:
    """One to three items as exactly three: a kernel has arguments for three and never reads the spare ones."""
    return [*items, *[items[0]] * (MOST_GROUPS - len(items))]


def positions(*sizes: int) -> list[list[int]]:
    """Where groups of so many things lie if they stand one behind the other."""
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def aligned(*tensors: Tensor) -> bool:
    """Whether the rows of all tensors allow 16-byte copies: Triton asks for strides that are multiples of 16."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in tensors)


def check_activation(name: str, x: Tensor, plan: Plan, width: int | None = None, like: Tensor | None = None) -> None:
    """Rows [M, width] of a supported dtype, that of `like`; elements lie side by side, rows may lie apart."""
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
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        error = TypeError if x.dtype != like.dtype else ValueError
        raise error(f"{name}: expected {like.dtype} on {like.device}, given {x.dtype} on {x.device}")


def check_index(number: int, index: Tensor, counts: Tensor, plan: Plan, device: torch.device) -> None:
    """`index` int64 [L, most] and `counts` int64 [L] of a mask, on `device` and contiguous."""
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
    """One index and one counts tensor for each of one to three weights."""
    if not 1 <= groups <= MOST_GROUPS:
        raise ValueError(f"expected 1 to {MOST_GROUPS} weights that share an activation, given {groups}")
    if not len(indices) == len(counts) == groups:
        raise ValueError(f"expected {groups} indices and counts, given {len(indices)} and {len(counts)}")
    for number, (index, count) in enumerate(zip(indices, counts, strict=True)):
        check_index(number, index, count, plan, device)
    if plan.token_rows.device != device:
        raise ValueError(f"plan: expected on {device} with the activations, given on {plan.token_rows.device}")


def check_parameters(
    name: str, tensors: Sequence[Tensor], shapes: list[tuple[int, ...]], x: Tensor, strided: bool = False
) -> None:
    """Weights or biases of such shapes on the device of x, all of x's dtype or all float32.

    They are contiguous unless they may be `strided`: their rows lie apart, the elements of each side by side.
    """
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        what = f"{name}[{number}]"
        if tensor.dtype not in (x.dtype, torch.float32) or tensor.dtype != tensors[0].dtype:
            raise TypeError(f"{what}: expected {x.dtype} or float32, the same for all, given {tensor.dtype}")
        if tuple(tensor.shape) != shape or 0 in shape:
            raise ValueError(f"{what}: expected shape {shape}, given {tuple(tensor.shape)}")
        if not (tensor.is_contiguous() or (strided and 1 in (tensor.stride(-1), tensor.shape[-1]))):
            raise ValueError(f"{what}: expected contiguous rows, given strides {tensor.stride()}")
        if tensor.device != x.device:
            raise ValueError(f"{what}: expected on {x.device} with the activations, given on {tensor.device}")


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
    with_bias: bool
    transposed: bool
    column_sums: bool
    config: Config | None
    allow_tf32: bool

    def check(self) -> None:
        """Raise what `row_weight_grad` says."""
        G, x, plan = len(self.dys), self.x, self.plan
        check_activation("x", x, plan)
        check_rows(self.indices, self.counts, G, plan, x.device)
        for number, dy in enumerate(self.dys):
            check_activation(f"dys[{number}]", dy, plan, like=x)
        if self.weight_dtype not in (x.dtype, torch.float32):
            raise TypeError(f"weight_dtype: expected {x.dtype} or torch.float32, given {self.weight_dtype}")
        if len(self.n_rows) != G or min(self.n_rows) < 1:
            raise ValueError(f"n_rows: expected {G} positive integers, given {list(self.n_rows)}")
        if len(self.units) != G or any(u < 1 or n % u for u, n in zip(self.units, self.n_rows, strict=True)):
            raise ValueError(f"units: expected a divisor of each of {list(self.n_rows)}, given {list(self.units)}")
        if self.with_bias and self.column_sums:
            given = "column_sums are a bias's gradient in the place of db"
            raise ValueError(f"{given}: expected one of with_bias, column_sums")

    def sum_step(self, BN: int) -> int:
        """Tokens in a step of programs that sum columns of X, or else BN elements of db."""
        return SUM_BYTES // self.x.itemsize // (SUM_COLUMNS if self.column_sums else BN)

    def chosen(
        self, kernel: str, table: Table, outer: dict[str, list[int]], tokens: int, pieces: int = 1, unit: int = 0
    ) -> Config:
        """The config given, measured or chosen (`configs.choose`); a program sums over `tokens`, BN divides `unit`."""
        if self.config is not None:
            return self.config
        K, widths = self.x.shape[1], [dy.shape[1] for dy in self.dys]
        kind, fits = kind_of(self.x, None, self.allow_tf32), aligned(self.x, *self.dys)

        def usable(config: Config) -> bool:
            return unit % config["BN"] == 0

        sizes = [K, unit] if unit else [K]
        return tuned(kernel, self.x, None, widths, sizes, self.plan, self.allow_tf32) or choose(
            table, self.x.device, kind, fits, outer, ("BM", tokens), pieces=pieces, usable=usable
        )
