"""Sums of products of L gradients, added up parameter by parameter: all that cosines and shares of conflict need."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmask.linear import MaskedLinear
from fastmask.masks import Mask

__all__ = ["Products", "cosines_of", "masks_of", "owned_squares", "with_halves"]

CHUNK = 1 << 16  # coordinates of L gradients at a time, as float64: a few MB, which the processor's cache holds
Matrix = NDArray[np.float64]


class Products:
    """Sums over coordinates of products of L gradients, float64; [L, L] of languages i and j unless said otherwise."""

    def __init__(self, L: int) -> None:
        self.dot, self.absolute = np.zeros((L, L)), np.zeros((L, L))
        self.signs, self.both = np.zeros((L, L)), np.zeros((L, L))  # sums of sign(g_i g_j) and of its square
        self.halves = np.zeros((L, L))  # a_i . b_j of the halves of the languages' batches; 0 without halves
        self.squares = np.zeros((2, L))  # |a_i|^2, |b_i|^2
        self.owned = np.zeros((3, L, L))  # |g_i|^2, |a_i|^2, |b_i|^2 over what j owns; "shared" only

    @classmethod
    def of(cls, parts: Tensor) -> Products:
        """The sums of one parameter's gradients [L, halves, coordinates]."""
        found = cls(parts.shape[0])
        for piece in parts.split(CHUNK, 2):
            g, a, b = with_halves(piece.double())
            signs = g.sign().float()  # sums of so few ones are exact in float32
            found.dot += (g @ g.t()).cpu().numpy()
            found.absolute += (g.abs() @ g.abs().t()).cpu().numpy()
            found.signs += (signs @ signs.t()).cpu().numpy()
            found.both += (signs.abs() @ signs.abs().t()).cpu().numpy()
            if a is not None and b is not None:
                found.halves += (a @ b.t()).cpu().numpy()
                found.squares += torch.stack([a.square().sum(1), b.square().sum(1)]).cpu().numpy()
        return found

    def add_owned(self, parts: Tensor, mask: Mask, ids: Tensor) -> None:
        """Add `owned_squares` of one masked parameter's gradients [L, halves, ...]."""
        for number, grads in enumerate(with_halves(parts)):
            if grads is not None:
                self.owned[number] += owned_squares(grads, mask, ids)

    def add(self, other: Products) -> None:
        """Add the sums over other coordinates."""
        for name, value in vars(other).items():
            vars(self)[name] = vars(self)[name] + value


def with_halves(grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients [L, ...] of [L, halves, ...], and those of the two halves, where there are two."""
    if grads.shape[1] == 1:
        return grads[:, 0], None, None
    return grads[:, 0] + grads[:, 1], grads[:, 0], grads[:, 1]


def masks_of(whole: nn.Module) -> dict[str, Mask]:
    """The masks of the masked parameters: weights, and biases whose rows are masked."""
    found = {}
    for name, module in whole.named_modules():
        if isinstance(module, MaskedLinear):
            stem = f"{name}." if name else ""
            found[f"{stem}weight"] = module.mask
            if module.mask.kind == "rows" and module.bias is not None:
                found[f"{stem}bias"] = module.mask
    return found


def owned_squares(grads: Tensor, mask: Mask, ids: Tensor) -> Matrix:
    """|g_i|^2 over the weights that language j owns, [L, L]; grads [L, N, K], or [L, N] of a bias."""
    if mask.kind in ("rows", "columns"):
        keep = mask.to_dense()[ids.to(mask.device)]
        keep = keep[:, :, 0] if mask.kind == "rows" else keep[:, 0]
        squares = grads.square()
        if squares.ndim == 3:
            squares = squares.sum(2 if mask.kind == "rows" else 1)
        return (squares.double() @ keep.double().t()).cpu().numpy()
    keep, result = mask.to_dense()[ids.to(mask.device)].flatten(1), np.zeros((len(ids), len(ids)))
    for piece, kept in zip(grads.flatten(1).split(CHUNK, 1), keep.split(CHUNK, 1), strict=True):
        result += (piece.double().square() @ kept.double().t()).cpu().numpy()
    return result


def cosines_of(found: Products, scope: str) -> tuple[Matrix, Matrix]:
    """Cosines of whole gradients, and of halves; [L, L]."""

    def ratio(products: Matrix, norms: Matrix) -> Matrix:
        return np.divide(products, np.sqrt(norms), out=np.full_like(products, np.nan), where=norms > 0)

    if scope == "shared":
        whole, first, second = found.owned
        halves = ratio(found.halves, first * second.T)
        return ratio(found.dot, whole * whole.T), (halves + halves.T) / 2
    squares, (first, second) = np.diag(found.dot), found.squares
    halves = ratio(found.halves, first[:, None] * second[None])
    return ratio(found.dot, squares[:, None] * squares[None]), (halves + halves.T) / 2
