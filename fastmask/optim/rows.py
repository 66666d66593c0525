"""Embeddings stepped by rows: gradients that hold the rows that were looked up, and steps of those rows alone.

A batch looks up a few thousand of the hundred thousand pieces of a multilingual vocabulary. A dense gradient of the
table, its norm, and a step of AdamW over table and moments read and write all of it several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmask.live import WHOLE
from fastmask.optim.step import Update

__all__ = ["RowUpdate", "by_rows", "can_be_sparse", "sparse_gradients"]


def can_be_sparse(module: nn.Module) -> bool:
    """Whether a module is an embedding that can hand out sparse gradients, and does not yet."""
    if isinstance(module, nn.EmbeddingBag) and module.mode not in ("sum", "mean"):
        return False
    return (
        isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and not module.sparse
        and not module.scale_grad_by_freq
        and module.max_norm is None
    )


@contextmanager
def sparse_gradients(tables: Iterable[nn.Module]) -> Iterator[None]:
    """Let embeddings (those that `can_be_sparse`) hand out sparse gradients of forward passes inside."""
    changed = list(tables)
    for table in changed:
        table.sparse = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for table in changed:
            table.sparse = False  # type: ignore[assignment]


@torch.no_grad()
def by_rows(parameter: Tensor) -> None:
    """Make the gradient of a table [V, D] sparse: the rows with anything but zeros, or those that it holds, once."""
    if parameter.grad is not None:
        sparse = parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)
        parameter.grad = sparse.coalesce()


class RowUpdate:
    """The step of the rows of a table [V, D] that a sparse gradient holds; all others, moments too, stay as they are.

    Args:
        parameter: the table.
        gradient: sparse, with one sparse dimension.
        state: "step", and "exp_avg" and "exp_avg_sq" [V, D].

    Raises:
        RuntimeError: a gradient with other dimensions.
    """

    def __init__(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        if gradient.sparse_dim() != 1:
            raise RuntimeError(
                f"LiveAdamW takes sparse gradients of rows (1 sparse dimension), given {gradient.sparse_dim()}"
            )
        gradient = gradient.coalesce()
        self.rows = gradient.indices()[0]
        self.tables = parameter, state["exp_avg"], state["exp_avg_sq"]
        p, m, v = (table.index_select(0, self.rows) for table in self.tables)
        self.update = Update(p, gradient.values(), m, v, state["step"], WHOLE)

    def put_back(self) -> None:
        """Write the rows back, once the step of `update` is taken."""
        for table, rows in zip(self.tables, self.update.held, strict=True):
            table.index_copy_(0, self.rows, rows)
