"""What the tile kernels compute, in a few lines of plain torch: the definition, and the oracle of their tests.

Masks are spelled out here, bool [L, N, K]; `language_of` is int64 [M], the language of each row, -1 for the
full network.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tile_matmul_naive", "tile_scores_naive", "tile_weight_grad_naive"]


def _with_full(keep: Tensor) -> Tensor:
    """Masks of all segments, [L + 1, N, K]: first the full network, which owns everything."""
    return torch.cat([torch.ones_like(keep[:1]), keep])


def tile_matmul_naive(
    x: Tensor, weight: Tensor, keep: Tensor, language_of: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """y_m = (W o M_l) x_m + bias, or x_m (W o M_l) if transposed, for each row m of language l; in x's dtype."""
    masked = weight.to(x.dtype) * _with_full(keep)[language_of + 1]  # [M, N, K]
    if transposed:
        return torch.einsum("mn,mnk->mk", x, masked)
    y = torch.einsum("mk,mnk->mn", x, masked)
    return y if bias is None else y + bias.to(y.dtype)


def tile_weight_grad_naive(dy: Tensor, x: Tensor, keep: Tensor, language_of: Tensor) -> Tensor:
    """dW_l = M_l o (dY_l^T X_l) of every segment, [L + 1, N, K]; their sum is dW."""
    return torch.stack(
        [
            mask * (dy[language_of + 1 == segment].t() @ x[language_of + 1 == segment])
            for segment, mask in enumerate(_with_full(keep))
        ]
    )


def tile_scores_naive(grads: Tensor, weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """The sum of dW_l o W over each tile, [L + 1, NT, KT], of `grads` [L + 1, N, K]."""
    N, K = weight.shape
    edge = (0, -K % tile[1], 0, -N % tile[0])
    product = torch.nn.functional.pad(grads * weight.to(grads.dtype), edge)
    return product.unflatten(2, (-1, tile[1])).unflatten(1, (-1, tile[0])).sum((2, 4))
