"""What the row kernels compute, in a few lines of plain torch; slow, and the oracle of their tests.

Each function takes the language of every row, `languages` (a list of M ints, -1 for the full network), in the place of
a plan, and computes in the dtype of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["naive_pack", "naive_row_matmul", "naive_row_matmul_t", "naive_row_weight_grad", "naive_unpack"]


def live_rows(index: Tensor, counts: Tensor, language: int, n: int) -> Tensor:
    """The rows that a language owns of n; all of them for -1."""
    if language < 0:
        return torch.arange(n, device=index.device)
    return index[language, : int(counts[language])]


def rows_of(languages: Sequence[int], language: int) -> list[int]:
    """The rows of a batch that are in a language."""
    return [m for m, own in enumerate(languages) if own == language]


def naive_row_matmul(
    x: Tensor, weight: Tensor, index: Tensor, counts: Tensor, languages: Sequence[int], width: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of x [M, K] and the live rows of weight [N, K], packed: [M, width]."""
    y = x.new_zeros(len(languages), width)
    for language in set(languages):
        m, rows = rows_of(languages, language), live_rows(index, counts, language, weight.shape[0])
        part = x[m] @ weight[rows].to(x.dtype).t()
        y[m, : len(rows)] = part if bias is None else part + bias[rows].to(x.dtype)
    return y


def naive_row_matmul_t(
    x: Tensor, weight: Tensor, index: Tensor, counts: Tensor, languages: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Packed x [M, width] times the live rows of weight [N, K], as they are: [M, K]."""
    y = x.new_zeros(len(languages), weight.shape[1])
    for language in set(languages):
        m, rows = rows_of(languages, language), live_rows(index, counts, language, weight.shape[0])
        y[m] = x[m, : len(rows)] @ weight[rows].to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def naive_row_weight_grad(
    dy: Tensor, x: Tensor, index: Tensor, counts: Tensor, languages: Sequence[int], n_rows: int
) -> tuple[Tensor, Tensor]:
    """The gradients dW [n_rows, K] and db [n_rows] of packed dy [M, width] and x [M, K]."""
    dW, db = x.new_zeros(n_rows, x.shape[1]), x.new_zeros(n_rows)
    for language in set(languages):
        m, rows = rows_of(languages, language), live_rows(index, counts, language, n_rows)
        part = dy[m][:, : len(rows)]
        dW[rows] += part.t() @ x[m]
        db[rows] += part.sum(0)
    return dW, db


def naive_pack(x: Tensor, index: Tensor, counts: Tensor, languages: Sequence[int], width: int) -> Tensor:
    """The live columns of x [M, N] in front of [M, width], zeros behind."""
    out = x.new_zeros(len(languages), width)
    for m, language in enumerate(languages):
        rows = live_rows(index, counts, language, x.shape[1])
        out[m, : len(rows)] = x[m, rows]
    return out


def naive_unpack(xp: Tensor, index: Tensor, counts: Tensor, languages: Sequence[int], n: int) -> Tensor:
    """The live columns of packed xp [M, width] back in their places of [M, n], zeros elsewhere."""
    out = xp.new_zeros(len(languages), n)
    for m, language in enumerate(languages):
        rows = live_rows(index, counts, language, n)
        out[m, rows] = xp[m, : len(rows)]
    return out
