"""Several packed projections of one input equal one after the other, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from oracle import random_mask

from fastmask.masks import UNPACKED, Mask
from fastmask.operators import run
from fastmask.torch_path import layers
from fastmask.torch_path.layers import Layers, Needs
from fastmask.traced import Settings

UNITS = (4, 2, 2)  # rows of one head in Q, K and V: those of a key/value group in grouped-query attention


def setting(dtype, has_bias, needs=(True, True, True)):
    torch.manual_seed(0)
    masks = [random_mask("rows", 3, 3 * unit, 6, unit=unit) for unit in UNITS]
    x = torch.randn(5, 2, 6, dtype=dtype, requires_grad=needs[0])
    weights = [torch.randn(3 * unit, 6, dtype=dtype, requires_grad=needs[1]) for unit in UNITS]
    biases = [torch.randn(3 * unit, dtype=dtype, requires_grad=needs[2]) for unit in UNITS] if has_bias else []
    return x, weights, masks, biases, [3 * unit for unit in UNITS]


@pytest.mark.parametrize("ids", [[0, 0, 0, 0, 0], [0, 2, 1, 0, 2], [-1, 0, 0, 2, -1], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_equals_one_after_the_other(ids, has_bias, every_way):
    """Q, K and V computed together are what each is alone, gradients included."""
    ids = torch.tensor(ids)
    x, weights, masks, biases, widths = setting(torch.float64, has_bias)
    together = run(Layers(masks, widths), x, weights, biases, ids)
    upstreams = [torch.randn_like(y) for y in together]
    found = torch.autograd.grad(together, [x, *weights, *biases], upstreams)
    apart = [
        run(Layers([mask], [widths[g]]), x, [weight], biases[g : g + 1], ids)[0]
        for g, (weight, mask) in enumerate(zip(weights, masks, strict=True))
    ]
    expected = torch.autograd.grad(apart, [x, *weights, *biases], upstreams)
    for ours, theirs in zip([*together, *found], [*apart, *expected], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_asked_for(needs):
    """A frozen weight gets no gradient, and takes none from the others."""
    x, weights, masks, biases, widths = setting(torch.float64, True, needs)
    for y in run(Layers(masks, widths), x, weights, biases, torch.tensor([0, 0, 1, 2, 2])):
        y.sum().backward(retain_graph=True)
    assert (x.grad is not None) == needs[0]
    assert all((w.grad is not None) == needs[1] for w in weights)
    assert all((b.grad is not None) == needs[2] for b in biases)


def test_an_unused_output():
    """A projection whose output nobody uses does not disturb the backward pass of the others."""
    x, weights, masks, biases, widths = setting(torch.float64, True)
    query, _, _ = run(Layers(masks, widths), x, weights, biases, torch.tensor([0, 0, 2, 2, 2]))
    query.sum().backward()
    assert weights[0].grad.any()
    assert not weights[1].grad.any()


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck(has_bias):
    """The operators' schema, fake kernels and autograd registration fit what they compute."""
    x, weights, masks, biases, widths = setting(torch.float32, has_bias)
    ids = torch.tensor([0, 1, 2, 2, 0])
    indices, extents = [mask.index for mask in masks], [mask.extents for mask in masks]
    settings = Settings("rows", [n for mask in masks for n in (mask.geometry[0], 0)], 3, widths, "")
    stored = (ids, indices, extents, *settings)
    torch.library.opcheck(torch.ops.fastmask.masked_linear, (x, weights, biases, *stored))
    plain = [w.detach() for w in weights]
    upstreams = [torch.randn(5, 2, width) for width in widths]
    wanted = (True, [True, True, False], [True, False, True] if has_bias else [False] * 3)
    torch.library.opcheck(torch.ops.fastmask.masked_linear_backward, (upstreams, x.detach(), plain, *stored, *wanted))


@pytest.mark.parametrize("ids", [[1, 1, 1, 1], [0, 0, 1, 2], [-1, 2, 2, -1]])
@pytest.mark.parametrize("kind", ["rows", "columns", "weights"])
def test_weights_that_were_cast_are_kept_for_backward(kind, ids, every_way):
    """What is kept for the backward pass is of this layer and these languages."""
    torch.manual_seed(0)
    L, N, K, tokens = 3, 96, 64, 40
    build = {
        "rows": lambda: Mask.rows(torch.rand(L, N) < 0.6, K),
        "columns": lambda: Mask.columns(torch.rand(L, K) < 0.6, N),
        "weights": lambda: Mask.weights(torch.rand(L, N, K) < 0.6),
    }[kind]
    weights, x = [torch.randn(N, K) for _ in range(3)], torch.randn(4, tokens, K).bfloat16()
    kept: list[torch.Tensor] = []
    given = Layers([build() for _ in weights], [UNPACKED] * 3)
    batch = layers.prepare(given, x, torch.tensor(ids))
    ys = layers.forward(given, batch, x, weights, [], kept)
    assert all(weight.dtype == torch.bfloat16 for weight in kept)
    assert len(kept) == 3
    dys = [torch.randn_like(y) for y in ys]
    arguments = (given, batch, dys, x, weights, Needs(True, [True] * 3, [False] * 3))
    (dx, dws, _), (expected_dx, expected_dws, _) = layers.backward(*arguments, kept), layers.backward(*arguments)
    assert torch.equal(dx, expected_dx)
    assert all(torch.equal(dw, expected) for dw, expected in zip(dws, expected_dws, strict=True))


@pytest.mark.parametrize("needs_x", [True, False])
def test_weights_are_cast_once_a_pass(needs_x, monkeypatch):
    """The backward pass of an input that needs no gradient reads no weight."""
    x, weights, masks, biases, widths = setting(torch.float32, True, (needs_x, True, True))
    calls, read = [], layers._read
    monkeypatch.setattr(layers, "_read", lambda *of: calls.append(of) or read(*of))
    for y in run(Layers(masks, widths), x, weights, biases, torch.tensor([0, 0, 1, 2, 2])):
        y.sum().backward(retain_graph=True)
    assert len(calls) == 1
