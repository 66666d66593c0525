"""What is kept of a mask beside it: how much, and for whom."""

from __future__ import annotations

import copy

import torch
from oracle import random_mask

from fastmask import masked_linear
from fastmask.operators import run
from fastmask.torch_path import layers
from fastmask.torch_path.layers import Layers

L, N, K = 20, 256, 32


def bytes_kept(*found) -> int:
    """Of all tensors that can be reached."""
    storages, seen, left = {}, set(), list(found)
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        left += [*item] if isinstance(item, (tuple, list)) else []
        left += item.values() if isinstance(item, dict) else vars(item).values() if hasattr(item, "__dict__") else []
    return sum(storages.values())


def test_tables_do_not_grow_with_packed_widths(every_way):
    """However many widths batches are packed to, the tables kept are the same few."""
    mask = random_mask("rows", L, N, K, density=0.3, extremes=False)
    x, weight = torch.randn(L, 3, K), torch.randn(N, K)
    kept = []
    for width in range(128, N + 1, 8):
        run(Layers([mask], [width]), x, [weight], [], torch.arange(L))
        kept.append(bytes_kept(vars(mask.index)))
    assert kept[0] > 0
    assert kept[-1] == kept[0]


def test_tables_of_one_batch_do_not_serve_the_next(every_way):
    """A batch of other languages, or of the same in another order, gets tables of its own."""
    mask, weight = random_mask("rows", L, N, K, density=0.3, extremes=False), torch.randn(N, K)
    for ids in (torch.arange(L), torch.arange(L).flip(0), torch.arange(2, 6)):
        x = torch.randn(len(ids), 3, K)
        afresh, found = (run(Layers([m], [128]), x, [weight], [], ids)[0] for m in (copy.deepcopy(mask), mask))
        assert torch.equal(found, afresh)


def test_tracers_operators_make_no_tables_anew(monkeypatch):
    """A compiled layer reads the tables of its mask, which are made once."""
    mask, x, weight = random_mask("rows", L, N, K, density=0.3, extremes=False), torch.randn(L, 3, K), torch.randn(N, K)
    made, make = [], layers._made
    monkeypatch.setattr(layers, "_made", lambda *given: made.append(given) or make(*given))
    compiled = torch.compile(lambda x: masked_linear(x, weight, mask, ids), fullgraph=True, backend="aot_eager")
    ids = torch.arange(L)
    for _ in range(2):
        compiled(x)
    masked_linear(x, weight, mask, ids)
    assert len(made) == 1


def test_a_copy_leaves_tables_behind():
    """Copies and pickles of a mask do not hold what products keep of it."""
    mask = random_mask("columns", L, K, N)
    x, weight = torch.randn(L, 3, N), torch.randn(K, N)
    y = masked_linear(x, weight, mask, torch.arange(L))
    assert bytes_kept(vars(mask.index)) > 0
    copied = copy.deepcopy(mask)
    assert bytes_kept(vars(copied.index)) == 0
    assert torch.equal(masked_linear(x, weight, copied, torch.arange(L)), y)
