"""Products in half precision on a CPU, whose sizes are rounded up because oneDNN compiles code for every new shape."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import fastmask as fm
from fastmask.torch_path import gemm


@pytest.mark.parametrize("dtype", gemm.HALF)
def test_batches_of_many_lengths_share_shapes(monkeypatch, dtype):
    """Batches of many lengths share a few shapes, and distances of two rows, for which oneDNN compiles code once."""
    shapes = set()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                factors = args[-2:]
                shapes.add(tuple((tuple(factor.shape), factor.stride()) for factor in factors))
            return func(*args, **kwargs or {})

    monkeypatch.setattr("fastmask.torch_path.layers.is_cheaper", lambda *args: False)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    heads = (torch.arange(4) < torch.tensor([[1], [2], [3]])).unsqueeze(1).expand(3, 2, 4)
    neurons = torch.stack([torch.rand(2, 512).argsort(1).argsort(1) < count for count in (250, 101, 237)])
    model = fm.attach(BertModel(config), fm.Subnetworks(["a", "b", "c"], heads, neurons))
    ids = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    for length in range(65, 97, 2):
        with Recording(), torch.autocast("cpu", dtype):
            model(torch.randint(50, (12, length)), language_ids=ids)[0].float().sum().backward()
    assert len(shapes) <= 100  # hundreds if nothing is rounded


@pytest.mark.parametrize("dtype", gemm.HALF)
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_what_is_rounded_up_does_not_show(stored, dtype):
    """Nor NaN in it, for languages of any number of tokens, whose matrices have gaps."""
    torch.manual_seed(0)
    size, S, tokens, own, filled = 96, 40, [0, 1, 30, 64, 515], [31, 32, 0, 50, 33], [32, 32, 0, 64, 64]
    w = (torch.randn(size, S) if stored == "rows" else torch.randn(S, size).t()).to(dtype)
    indices = [torch.randperm(size)[:n] for n in filled]
    live = gemm.Live(torch.cat(indices), filled, own)
    x, masked = torch.randn(sum(tokens), 50).to(dtype)[:, :S], torch.randn(sum(tokens), 70).to(dtype)
    ys, dxs, grad = (
        torch.full_like(masked, torch.nan).split(tokens),
        torch.ones_like(x).split(tokens),
        torch.ones_like(w),
    )
    for part, n in zip(masked.split(tokens), own, strict=True):
        part[:, n:] = 1e4  # of no unit
    xs, narrow = x.split(tokens), [a[:, :n] for a, n in zip(masked.split(tokens), filled, strict=True)]
    gemm.products([*xs], w, live, [y[:, :n] for y, n in zip(ys, filled, strict=True)], transposed=True)
    gemm.products(narrow, w, live, [*dxs], add=True)
    gemm.add_outer(grad, live, narrow, [*xs])
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=0.1)
    dw = torch.ones(size, S)
    for x, a, y, dx, index, n, f in zip(xs, narrow, ys, dxs, indices, own, filled, strict=True):
        rows = w[index[:n]].float()
        close(y[:, :f].float(), torch.nn.functional.pad(x.float() @ rows.t(), (0, f - n)))
        assert y[:, f:].isnan().all()
        close(dx.float(), 1 + a[:, :n].float() @ rows)
        dw[index[:n]] += a[:, :n].float().t() @ x.float()
    close(grad.float(), dw, atol=0.3)  # rounded three times
