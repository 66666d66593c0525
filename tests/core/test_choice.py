"""Which way a batch is run: that each is taken where it is cheapest, and none where it gives another result."""

from __future__ import annotations

import pytest
import torch

from fastmask import Mask
from fastmask.masks import UNPACKED, StoredMask
from fastmask.torch_path import layers
from fastmask.torch_path.choice import cheapest, possible
from fastmask.torch_path.segments import Split

L, N, K = 8, 1024, 256


def batch(density=0.5, tokens=16, ids=tuple(range(L)), packed=True, dtype=torch.float32):
    """(layers, x, split) of one row-masked layer, as `cheapest` takes them."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(L, N, generator=generator).argsort(1) < density * N
    mask = Mask.rows(keep, K)
    stored = StoredMask("rows", mask.geometry, mask.index, mask.extents, N if packed else UNPACKED)
    x = torch.empty(len(ids), tokens, K, dtype=dtype)
    return [layers._pieces_of(stored, torch.empty(N, K))], x, Split(list(ids))


@pytest.mark.parametrize(
    ("setting", "way"),
    [
        ({"tokens": 4}, "gated"),
        ({"tokens": 4, "packed": False}, "gated"),
        ({"tokens": 512}, "looped"),
        ({"tokens": 32, "density": 0.1}, "batched"),
        ({"tokens": 32, "density": 0.1, "dtype": torch.bfloat16}, "looped"),
        ({"tokens": 4, "ids": (-1,) * 4}, "looped"),  # the full network: nothing is left out
        ({"tokens": 512, "ids": (3,) * 4}, "looped"),
    ],
    ids=str,
)
def test_the_cheapest_way(setting, way):
    """Few tokens pay for gathering, many for dead units, or a batched product runs where it is slow."""
    assert cheapest(*batch(**setting)) == way


@pytest.mark.parametrize(
    "setting", [{"packed": False}, {"ids": (0, -1, 1)}, {"ids": (0, 0)}, {"ids": (*(0,) * 7, 1, 2)}], ids=str
)
def test_what_a_batched_product_cannot_do(setting):
    """It is given a batch that it would compute wrongly, or that is mostly padding."""
    assert "batched" in possible(*batch())
    assert "batched" not in possible(*batch(**setting))


@pytest.mark.parametrize("kind", ["blocks", "weights"])
def test_masks_without_units_are_looped(kind):
    """Blocks or single weights are gated as if whole rows were dead."""
    mask = {
        "blocks": lambda: Mask.blocks(torch.rand(2, 4, 4) < 0.5, (4, 4)),
        "weights": lambda: Mask.weights(torch.rand(2, 16, 16) < 0.5),
    }[kind]()
    stored = StoredMask(mask.kind, mask.geometry, mask.index, mask.extents, UNPACKED)
    pieces = layers._pieces_of(stored, torch.empty(16, 16))
    assert possible([pieces], torch.empty(2, 1, 16), Split([0, 1])) == ["looped"]
