"""What the kernels compute, in a few lines of plain torch: their definition, and the oracle of their tests.

Functions of rows take the language of every row of the batch, `languages` (a list of M ints, -1 for the full network),
in the place of a plan. Those of tiles take masks that are spelled out, bool [L, N, K], and `language_of`, int64 [M].
All compute in the dtype of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "naive_pack", "naive_row_matmul", "naive_row_matmul_t", "naive_row_weight_grad", "naive_tile_matmul",
    "naive_tile_weight_grad", "naive_unpack",
]  # fmt: skip


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


# ---- tiles


def _with_full(keep: Tensor) -> Tensor:
    """Masks of all segments, [L + 1, N, K]: first the full network, which owns everything."""
    return torch.cat([torch.ones_like(keep[:1]), keep])


def naive_tile_matmul(
    x: Tensor, weight: Tensor, keep: Tensor, language_of: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """y_m = (W o M_l) x_m + bias, or x_m (W o M_l) if transposed, for each row m of language l; in x's dtype."""
    masked = weight.to(x.dtype) * _with_full(keep)[language_of + 1]  # [M, N, K]
    if transposed:
        return torch.einsum("mn,mnk->mk", x, masked)
    y = torch.einsum("mk,mnk->mn", x, masked)
    return y if bias is None else y + bias.to(y.dtype)


def naive_tile_weight_grad(dy: Tensor, x: Tensor, keep: Tensor, language_of: Tensor) -> Tensor:
    """dW_l = M_l o (dY_l^T X_l) of every segment, [L + 1, N, K]; their sum is dW."""
    return torch.stack(
        [
            mask * (dy[language_of + 1 == segment].t() @ x[language_of + 1 == segment])
            for segment, mask in enumerate(_with_full(keep))
        ]
    )
