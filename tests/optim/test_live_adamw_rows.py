"""Sparse gradients of embeddings: the rows that were looked up move as AdamW moves them, and no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmask as fm
from fastmask.optim import by_rows, can_be_sparse, sparse_gradients

LOOKED_UP = [[0, 3, 3], [3, 5, 1], [0, 1, 5], [7, 7, 7]]


def literal(table: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """AdamW row by row in float64: a row has moments of its own steps; corrections count the steps of the table."""
    table = table.detach().double()
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    for step, gradient in enumerate(gradients, start=1):
        for row in gradient.abs().sum(1).nonzero().flatten().tolist():
            g = gradient[row].double()
            first[row] = 0.9 * first[row] + 0.1 * g
            second[row] = 0.999 * second[row] + 0.001 * g * g
            table[row] *= 1 - lr * decay
            scale = (second[row] / (1 - 0.999**step)).sqrt() + 1e-8
            table[row] -= lr * first[row] / (1 - 0.9**step) / scale
    return table


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_move_as_by_the_book(kind: str) -> None:
    """A looked-up row moves as AdamW moves it, with moments of its own steps; all others keep their bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    table = net[0].weight
    before = table.detach().clone()
    optimizer = fm.LiveAdamW(net.parameters(), lr=0.1, weight_decay=0.2, model=net)
    gradients = []
    for ids in LOOKED_UP:
        optimizer.zero_grad()
        with sparse_gradients([net[0]] if kind == "sparse" else []):
            net(torch.tensor(ids)).square().sum().backward()
        assert table.grad.is_sparse == (kind == "sparse")
        gradients.append(table.grad.to_dense().clone())
        by_rows(table)
        optimizer.step()
    assert not net[0].sparse
    torch.testing.assert_close(table.detach().double(), literal(before, gradients, 0.1, 0.2), rtol=1e-5, atol=1e-6)
    never = [2, 4, 6, 8]
    assert torch.equal(table[never], before[never])
    assert not optimizer.state[table]["exp_avg"][never].any()


def test_it_goes_on_from_a_state_dict() -> None:
    """Moments of rows survive in the state dict, which has the form of torch's."""
    torch.manual_seed(0)
    net = nn.Embedding(9, 4, sparse=True)
    optimizer = fm.LiveAdamW(net.parameters(), lr=0.1, model=net)
    for number, ids in enumerate(LOOKED_UP):
        if number == 2:
            other = copy.deepcopy(net)
            resumed = fm.LiveAdamW(other.parameters(), lr=0.1, model=other)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, step in ((net, optimizer), *([(other, resumed)] if number >= 2 else [])):
            step.zero_grad()
            model(torch.tensor(ids)).square().sum().backward()
            step.step()
    assert torch.equal(net.weight, other.weight)


def test_what_is_refused() -> None:
    """A gradient that is sparse in single numbers, or of a masked weight, is not taken for one of rows."""
    layer = fm.MaskedLinear(4, 4, fm.Mask.rows(torch.ones(1, 4, dtype=torch.bool), 4))
    optimizer = fm.LiveAdamW(layer.parameters(), model=layer)
    layer.weight.grad = torch.eye(4).to_sparse(1)
    with pytest.raises(RuntimeError, match="sparse gradients of a weight that has a mask"):
        optimizer.step(languages=0)
    net = nn.Embedding(3, 2)
    optimizer = fm.LiveAdamW(net.parameters(), model=net)
    net.weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"of rows \(1 sparse dimension\), given 2"):
        optimizer.step()
    assert not can_be_sparse(nn.EmbeddingBag(3, 2, mode="max"))
    assert not can_be_sparse(nn.Embedding(3, 2, max_norm=1.0))


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_without_a_gradient_stay(sparse: bool) -> None:
    """Padding is looked up and learns nothing, whether the gradient is sparse, as in one process, or not."""
    table = nn.Parameter(torch.ones(5, 2))
    gradient = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, torch.nan], [0, 0]])
    table.grad = gradient if not sparse else torch.sparse_coo_tensor([[0, 1, 3]], gradient[[0, 1, 3]], (5, 2))
    by_rows(table)
    assert table.grad.is_coalesced()
    assert table.grad.indices().tolist() == [[1, 3]]
