"""Batches with few tokens of each language run with gates, and others do not."""

from __future__ import annotations

import pytest
import torch

from fastmask import Mask, masked_linear
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


def test_faster_products_make_gates_pay_sooner(monkeypatch):
    """Gathering takes as long in half precision, and products a fraction: with 8 times as fast ones it pays later."""
    monkeypatch.setattr(layers, "speed", lambda x, tokens: 8.0 if x.dtype == torch.bfloat16 else 1.0)
    setting = {"tokens": 144, "density": 0.7, "packed": False}
    assert not is_gated(**setting)
    assert is_gated(**setting, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_gate_keeps_everything_out(monkeypatch, kind, dtype):
    """Behind a gate not even NaN is left of what is dead, in upstreams or inputs."""
    monkeypatch.setattr(layers, "is_cheaper", lambda *batch: True)
    torch.manual_seed(0)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    mask = Mask.rows(keep, 5) if kind == "rows" else Mask.columns(keep, 5)
    ids, dead = torch.tensor([0, 0]), [1]
    weight = torch.randn(*((3, 5) if kind == "rows" else (5, 3)), dtype=dtype)
    x, dy = torch.randn(2, 4, weight.shape[1], dtype=dtype), torch.randn(2, 4, weight.shape[0], dtype=dtype)
    spoilt = [tensor.clone() for tensor in (x, weight, dy)]
    (spoilt[2] if kind == "rows" else spoilt[0])[..., dead] = torch.nan

    def run(x, weight, dy):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = masked_linear(x, weight, mask, ids)
        return [y, *torch.autograd.grad(y, (x, weight), dy)]

    found, expected = run(*spoilt), run(x, weight, dy)
    for name, ours, clean in zip(("y", "dx", "dw"), found, expected, strict=True):
        assert torch.equal(ours, clean), name


@pytest.mark.parametrize("kind", ["blocks", "weights"])
def test_masks_without_units_have_no_gates(kind):
    """Blocks and single weights are never gated as whole rows."""
    mask = {
        "blocks": lambda: Mask.blocks(torch.rand(2, 4, 4) < 0.5, (4, 4)),
        "weights": lambda: Mask.weights(torch.rand(2, 16, 16) < 0.5),
    }[kind]()
    x, ids = torch.empty(2, 1, 16), torch.tensor([0, 1])
    assert not layers.prepare(Layers([mask], [UNPACKED]), x, ids).gated
