"""Gradient of weights under row masks, all languages in one launch: only live work, and the same bits every run.

The rows of two languages overlap, so their sums meet in the same rows of dW. Where rows live and die in units of whole
blocks (heads), one program owns a block and adds the languages (`row_owned_grad`). Where they do so one by one
(neurons), one language's blocks of rows lie across another's, and their programs take turns (`row_turn_grad`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask_kernels.configs import Config
from fastmask_kernels.launching import described, described_masks, prepared
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_arguments import RowProblem
from fastmask_kernels.row_owned_grad import OwnedGrad, owned
from fastmask_kernels.row_turn_grad import TurnGrad

__all__ = ["row_weight_grad"]


def row_weight_grad(
    dys: Sequence[Tensor],
    x: Tensor,
    indices: Sequence[Tensor],
    counts: Sequence[Tensor],
    plan: Plan,
    n_rows: Sequence[int],
    *,
    weight_dtype: torch.dtype,
    units: Sequence[int] | None = None,
    with_bias: bool = False,
    transposed: bool = False,
    column_sums: bool = False,
    config: Config | None = None,
    allow_tf32: bool = False,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """dW_g[index_g[l, j]] = sum over the tokens m of each language l of dys_g[m, j] x[m], and db_g likewise.

    Sums are float32, in an order that depends on nothing but the arguments: two runs give the same bits.

    Args:
        dys: one to three packed gradients [M, width_g]; what lies behind a language's live units is never used. Widths
            that are multiples of 16 copy fast.
        x: [M, K] in the gradients' dtype.
        indices: the live rows of each, int64 [L, most_g].
        counts: how many they are, int64 [L].
        plan: the batch; for its rows of the full network column j of dys_g belongs to row j.
        n_rows: N_g of each weight.
        weight_dtype: of fresh results, x's dtype or float32.
        units: rows of each weight that live and die together, in every language and from a multiple of it on: the rows
            of a head. None says nothing of that, as does 1.
        with_bias: also sum db.
        transposed: return fresh dW_g as contiguous [K, N_g]: a mask over columns is one over the transposed weight's
            rows.
        column_sums: in the place of db, return the sum of x over all tokens, [K]: there x is the gradient of y, and
            this the bias's. Not with `with_bias`.
        config: block sizes BM (tokens in one step), BN (rows) and BK (columns); None chooses.
        allow_tf32: lets float32 products use TF32 (10 bits of mantissa).

    Returns:
        The list of dW_g [N_g, K] and that of db_g [N_g] (None without a bias), dead rows exactly zero.

    Raises:
        TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
    """
    problem = RowProblem(
        dys, x, indices, counts, plan, n_rows, units or [1] * len(n_rows), weight_dtype, with_bias, transposed,
        column_sums, config, allow_tf32,
    )  # fmt: skip
    key = (
        "row_weight_grad", described(x, *dys), described_masks(*indices, *counts), plan.sizes,
        tuple(n_rows), units and tuple(units), weight_dtype, with_bias, transposed, column_sums, config, allow_tf32,
    )  # fmt: skip
    kind = OwnedGrad if owned(problem.units) else TurnGrad
    run: OwnedGrad | TurnGrad = prepared(key, lambda: kind.of(problem))
    return run(problem)
