"""`sparse_update_linear`: forward and dX of the whole weight; dW and db are dense gradients times masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import KINDS, assert_close, gradients, random_mask

import fastmask as fm
from fastmask.masks import UNPACKED
from fastmask.operators import run
from fastmask.torch_path import tiles
from fastmask.torch_path.layers import Layers
from fastmask.traced import Settings

MIXED = [2, 0, 0, 1, -1, 2, 0]  # scattered, an empty language (1), a full one (2) and the full network (-1)


def naive(x, weight, mask, ids, bias=None):
    """The whole weight forward; what an example's language does not own takes part as a constant."""
    keep = mask.to_dense().to(weight.dtype)
    outputs = []
    for example, language in zip(x, ids.tolist(), strict=True):
        live = keep[language] if language >= 0 else torch.ones_like(weight)
        own, own_bias = torch.where(live.bool(), weight, weight.detach()), bias
        if bias is not None and mask.kind == "rows":
            own_bias = torch.where(live[:, 0].bool(), bias, bias.detach())
        outputs.append(F.linear(example, own, own_bias))
    return torch.stack(outputs) if outputs else F.linear(x, weight, bias)


def check(x, weight, bias, mask, ids):
    dy = torch.randn(*x.shape[:-1], mask.out_features)
    dy64, bias64 = dy.to(x.dtype).double(), None if bias is None else bias.double()
    truth = gradients(naive, x.double(), weight.double(), bias64, dy64, mask, ids)
    plain = gradients(naive, x, weight, bias, dy, mask, ids)
    result = gradients(fm.sparse_update_linear, x, weight, bias, dy, mask, ids)
    for name, ours, exact, reference in zip(("y", "dx", "dW", "db"), result, truth, plain, strict=True):
        if exact is not None:
            assert_close(name, ours, exact, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [MIXED, [0, 0, 0], [1, 1], [-1, -1]], ids=["mixed", "one", "dead", "full"])
@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_masking_a_dense_gradient(kind, ids, unit, has_bias, dtype, every_way):
    """The whole weight runs, and only what a language owns gets its gradient."""
    torch.manual_seed(0)
    mask = random_mask(kind, 4, 24, 40, unit=unit)
    x, weight = torch.randn(len(ids), 5, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)
    check(x, weight, torch.randn(24, dtype=dtype) if has_bias else None, mask, torch.tensor(ids))


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    L=st.integers(1, 5),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    ids=st.lists(st.integers(-1, 4), max_size=9),
    middle=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_mix(kind, L, N, K, density, ids, middle, seed):
    """Any shape, empty batches, absent and dead languages; in float64, to rounding."""
    torch.manual_seed(seed)
    ids = torch.tensor([min(i, L - 1) for i in ids], dtype=torch.int64)
    mask = random_mask(kind, L, N, K, density, seed=seed)
    x, weight, bias = torch.randn(len(ids), *middle, K), torch.randn(N, K), torch.randn(N)
    arguments = (x.double(), weight.double(), bias.double(), torch.randn(len(ids), *middle, N).double(), mask, ids)
    for ours, exact in zip(gradients(fm.sparse_update_linear, *arguments), gradients(naive, *arguments), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "whole"])
@pytest.mark.parametrize("tokens", [0, 1, 64, 200])
@pytest.mark.parametrize("ids", [[0, 1, 2, 0, -1], [1, 1, 1, 1, 1]], ids=["mixed", "one"])
def test_few_live_weights(dtype, sampled, tokens, ids, monkeypatch):
    """The gradient of few live weights is the same one by one as all at once, some of the tokens at a time."""
    monkeypatch.setattr(tiles, "SAMPLED", 1.0 if sampled else 0.0)
    monkeypatch.setattr(tiles, "SAMPLED_ONEDNN", 1.0 if sampled else 0.0)
    torch.manual_seed(0)
    mask = random_mask("weights", 3, 50, 70, density=0.05, extremes=False)
    x, weight, dy = (torch.randn(*size, dtype=dtype) for size in ((5, tokens, 70), (50, 70), (5, tokens, 50)))
    ids = torch.tensor(ids)
    found = gradients(fm.sparse_update_linear, x, weight, None, dy, mask, ids)[2]
    truth = masked_dense(dy.double(), x.double(), mask, ids)
    if dtype == torch.float32:
        assert_close("dW", found, truth, masked_dense(dy, x, mask, ids))
    else:
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-11)


def masked_dense(dy, x, mask, ids):
    """The dW that others compute: one dense product for each language, and its mask put on it."""
    keep = {language: own for language, own in enumerate(mask.to_dense())} | {-1: torch.ones(())}
    parts = [(dy[ids == i].flatten(0, 1).t() @ x[ids == i].flatten(0, 1)) * keep[i] for i in ids.unique().tolist()]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_weights_get_exactly_zero(kind):
    """What no language of the batch owns has a gradient of exactly 0, and what one owns has one."""
    torch.manual_seed(0)
    mask = random_mask(kind, 2, 8, 8, unit=2)
    x, weight, bias = torch.randn(3, 4, 8), torch.randn(8, 8), torch.randn(8)
    _, _, dw, db = gradients(
        fm.sparse_update_linear, x, weight, bias, torch.randn(3, 4, 8), mask, torch.zeros(3).long()
    )
    assert not dw[~mask.to_dense()[0]].any()
    assert dw[mask.to_dense()[0]].all()
    if kind == "rows":
        assert torch.equal(db != 0, mask.to_dense()[0, :, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_master_weights_under_autocast(kind):
    """Under autocast the gradient of a float32 weight is float32, as accurate as that of a masked dense gradient."""
    torch.manual_seed(0)
    mask = random_mask(kind, 3, 8, 6, unit=2)
    x, weight, bias, ids = torch.randn(4, 3, 6), torch.randn(8, 6), torch.randn(8), torch.tensor([0, 1, 2, -1])
    dy = torch.randn(4, 3, 8)

    def under_autocast(function):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(function, x, weight, bias, dy, mask, ids)

    ours, plain = under_autocast(fm.sparse_update_linear), under_autocast(naive)
    assert (ours[0].dtype, ours[2].dtype) == (torch.bfloat16, torch.float32)
    truth = gradients(naive, x.double(), weight.double(), bias.double(), dy.double(), mask, ids)
    for name, result, exact, reference in zip(("y", "dx", "dW", "db"), ours, truth, plain, strict=True):
        assert_close(name, result.float(), exact, reference.bfloat16().float().to(result.float().dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_only_what_is_asked_for(kind, trained):
    """A frozen input or weight gets no gradient, and takes none from the others."""
    torch.manual_seed(0)
    mask, ids = random_mask(kind, 4, 8, 12, unit=2), torch.tensor(MIXED)
    tensors = {"x": torch.randn(7, 3, 12), "weight": torch.randn(8, 12), "bias": torch.randn(8)}
    tensors = {name: tensor.double().requires_grad_(name == trained) for name, tensor in tensors.items()}
    found, expected = (
        torch.autograd.grad(
            f(tensors["x"], tensors["weight"], mask, ids, tensors["bias"]).square().sum(), tensors[trained]
        )
        for f in (fm.sparse_update_linear, naive)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_traced_as_one_graph(kind):
    """A compiled function is one graph with the same result and gradients."""
    torch.manual_seed(0)
    mask, ids = random_mask(kind, 4, 24, 40, unit=4), torch.tensor(MIXED)
    compiled = torch.compile(
        lambda x, w, b: fm.sparse_update_linear(x, w, mask, ids, b), fullgraph=True, backend="aot_eager"
    )
    given = (torch.randn(7, 3, 40), torch.randn(24, 40), torch.randn(24), torch.randn(7, 3, 24))
    found = gradients(lambda x, w, b: compiled(x, w, b), *given)
    for ours, eager in zip(found, gradients(lambda x, w, b: naive(x, w, mask, ids, b), *given), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    """The operator's schema, fake kernels and autograd registration fit what it computes."""
    torch.manual_seed(0)
    mask, ids = random_mask(kind, 3, 12, 6, unit=2), torch.tensor([0, 1, 2, 2, -1])
    x, weight, bias = torch.randn(5, 2, 6), torch.randn(12, 6), torch.randn(12)
    rest = Settings(kind, list((*mask.geometry, 0)[:2]), 3, [UNPACKED], "", True)
    stored = (ids, [mask.index], [mask.extents], *rest)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastmask.masked_linear, (leaves[0], [leaves[1]], [leaves[2]], *stored))
    backward = ([torch.randn(5, 2, 12)], x, [weight], *stored, True, [True], [True])
    torch.library.opcheck(torch.ops.fastmask.masked_linear_backward, backward)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_several_of_one_input(activation, every_way):
    """Q, K and V computed together, behind an activation that is computed again, are what each is alone."""
    torch.manual_seed(0)
    masks, ids = [random_mask("rows", 3, n, 6, unit=2, seed=n) for n in (12, 6, 6)], torch.tensor([0, 2, 1, 0, -1])
    x = torch.randn(5, 2, 6).double().requires_grad_()
    weights = [torch.randn(mask.out_features, 6).double().requires_grad_() for mask in masks]
    biases = [torch.randn(mask.out_features).double().requires_grad_() for mask in masks]
    together = run(Layers(masks, [UNPACKED] * 3, activation, full_forward=True), x, weights, biases, ids)
    active = F.gelu(x) if activation else x
    apart = [naive(active, *given) for given in zip(weights, masks, [ids] * 3, biases, strict=True)]
    upstreams = [torch.randn_like(y) for y in together]
    for found, expected in zip(
        torch.autograd.grad(together, [x, *weights, *biases], upstreams),
        torch.autograd.grad(apart, [x, *weights, *biases], upstreams),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_module():
    """`MaskedLinear(forward="full")` runs the whole layer, says so, and is masked again without it."""
    torch.manual_seed(0)
    mask, x, ids = random_mask("rows", 4, 8, 6), torch.randn(2, 6), torch.tensor([0, 1])
    layer = fm.MaskedLinear(6, 8, mask, forward="full")
    torch.testing.assert_close(layer(x, ids), F.linear(x, layer.weight, layer.bias))
    layer(x, ids).sum().backward()
    assert torch.equal(layer.bias.grad != 0, mask.to_dense()[0, :, 0])
    assert "forward='full'" in repr(layer)
    assert "forward" not in repr(fm.MaskedLinear(6, 8, mask))
    with pytest.raises(KeyError, match="unknown forward 'ful'; did you mean 'full'"):
        fm.MaskedLinear(6, 8, mask, forward="ful")


def test_errors_are_those_of_masked_linear():
    """Ids out of range are named before anything runs."""
    mask = random_mask("rows", 2, 8, 6)
    with pytest.raises(ValueError, match=r"language_ids\[1\] is 2"):
        fm.sparse_update_linear(torch.randn(2, 6), torch.randn(8, 6), mask, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="a weight of shape"):
        fm.sparse_update_linear(torch.randn(2, 6), torch.randn(6, 8), mask, torch.tensor([0, 1]))
