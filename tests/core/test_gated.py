"""Batches with few tokens of each language run with gates, and others do not."""

from __future__ import annotations

import pytest
import torch

from fastmask import Mask
from fastmask.masks import UNPACKED
from fastmask.torch_path import layers
from fastmask.torch_path.layers import Layers

L, N, K = 8, 1024, 256


def is_gated(density=0.5, tokens=16, ids=tuple(range(L)), packed=True, dtype=torch.float32):
    """Whether a batch of one row-masked layer is run with gates."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(L, N, generator=generator).argsort(1) < density * N
    mask = Mask.rows(keep, K)
    x = torch.empty(len(ids), tokens, K, dtype=dtype)
    return bool(layers.prepare(Layers([mask], [N if packed else UNPACKED]), x, torch.tensor(ids)).gated)


@pytest.mark.parametrize(
    ("setting", "gated"),
    [
        ({"tokens": 4}, True),
        ({"tokens": 4, "packed": False}, True),
        ({"tokens": 512}, False),
        ({"tokens": 32, "density": 0.1}, False),
        ({"tokens": 4, "ids": (-1,) * 4}, False),  # the full network: nothing is left out
        ({"tokens": 512, "ids": (3,) * 4}, False),
    ],
    ids=str,
)
def test_the_cheaper_way(setting, gated):
    """Few tokens are computed densely and gated; many are gathered."""
    assert is_gated(**setting) == gated


@pytest.mark.parametrize("kind", ["blocks", "weights"])
def test_masks_without_units_have_no_gates(kind):
    """Blocks and single weights are never gated as whole rows."""
    mask = {
        "blocks": lambda: Mask.blocks(torch.rand(2, 4, 4) < 0.5, (4, 4)),
        "weights": lambda: Mask.weights(torch.rand(2, 16, 16) < 0.5),
    }[kind]()
    x, ids = torch.empty(2, 1, 16), torch.tensor([0, 1])
    assert not layers.prepare(Layers([mask], [UNPACKED]), x, ids).gated
