"""The rivals: each computes the masked layer, whatever the languages of the batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from oracle import gathered, spread

from benchmarks import baselines
from benchmarks.baselines import BASELINES, BaselineLinear, Task
from benchmarks.cases.op import mask_of as mask_at
from benchmarks.row import Setting
from fastmask import Mask
from fastmask.torch_path.naive import masked_linear_naive

L, N, K = 3, 32, 48
IDS = {
    "mixed": [2, 0, 0, 1, -1, 2, 0],
    "one": [0, 0],
    "dead": [1, 1, 1],
    "full": [-1, -1],
    "shares": [0, 0, 2, 2],
    "uneven": [0, 2, 2, 2],
}


def mask_of(kind: str) -> Mask:
    """Language 1 owns nothing, 2 everything."""
    generator = torch.Generator().manual_seed(0)

    def keep(*shape: int) -> torch.Tensor:
        flags = torch.rand(L, *shape, generator=generator) < 0.5
        flags[1], flags[2] = False, True
        return flags

    if kind == "rows":
        return Mask.rows(keep(N), K)
    if kind == "columns":
        return Mask.columns(keep(K), N)
    return Mask.blocks(keep(N // 16, K // 16), (16, 16)) if kind == "blocks" else Mask.weights(keep(N, K))


def gradients(function, x, weight, bias, dy):  # type: ignore[no-untyped-def]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = function(*leaves, *([None] if bias is None else []))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", [(3,), (), (2, 3)], ids=["tokens", "no_tokens", "two_axes"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
@pytest.mark.parametrize("name", ["multiply", "loop", "gating"])
def test_baselines_compute_the_masked_layer(name, kind, ids, with_bias, shape):
    """We would be compared with something that computes less, or something else."""
    mask, language_ids = mask_of(kind), torch.tensor(IDS[ids])
    task, baseline = Task(mask, language_ids), BASELINES[name]
    torch.manual_seed(1)
    x, dy = (torch.randn(len(language_ids), *shape, size, dtype=torch.float64) for size in (K, N))
    weight, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    bias = bias if with_bias else None

    def ours():  # type: ignore[no-untyped-def]
        return gradients(lambda x, w, b: baseline(x, w, task, b), x, weight, bias, dy)

    if (name == "multiply" and len(set(IDS[ids])) > 1) or (name == "gating" and kind in ("blocks", "weights")):
        with pytest.raises(ValueError, match=r"one mask for a whole batch|gates are for masks"):
            ours()
        return
    expected = gradients(lambda x, w, b: masked_linear_naive(x, w, mask, language_ids, b), x, weight, bias, dy)
    for found, exact in zip(ours(), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_dense_knows_no_masks():
    """The yardstick of every row would be masked."""
    task = Task(mask_of("weights"), torch.tensor(IDS["mixed"]))
    x, weight, bias = torch.randn(7, 3, K), torch.randn(N, K), torch.randn(N)
    assert torch.equal(baselines.dense(x, weight, task, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(("kind", "ids"), [("rows", "mixed"), ("columns", "uneven"), ("weights", "one")])
def test_packed_refuses_what_it_cannot_pack(kind, ids):
    """Live rows of languages that own more and less, or of unsorted examples, are refused, and not mixed up."""
    task = Task(mask_of(kind), torch.tensor(IDS[ids]))
    with pytest.raises(ValueError, match="live rows are those of masks over rows or columns, equally many each"):
        baselines.packed(torch.randn(len(IDS[ids]), 3, K), torch.randn(N, K), task)


def test_baseline_linear_shares_parameters():
    """A model under a baseline trains other weights than the one it stands for."""
    linear = torch.nn.Linear(K, N)
    layer = BaselineLinear(linear, Task(mask_of("rows"), torch.tensor([0, 2])), baselines.loop)
    assert layer.weight is linear.weight
    assert layer(torch.randn(2, 3, K)).shape == (2, 3, N)


# ---- masks and activations


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_packed_and_spread(kind):
    """Packed layers are checked against the wrong numbers."""
    mask, ids = mask_of(kind), torch.tensor([0, 2, 1, -1])
    size = N if kind == "rows" else K
    full = torch.randn(4, 3, size)
    own = torch.cat([mask.to_dense(), torch.ones(1, N, K, dtype=torch.bool)])[ids].any(2 if kind == "rows" else 1)
    packed = gathered(full, mask, ids, size + 2)
    count = mask.live_counts()[0]
    assert torch.equal(packed[0, :, :count], full[0][:, own[0]])
    assert not packed[0, :, count:].any()
    assert torch.equal(spread(packed, mask, ids, size), full * own[:, None])


def test_masks_are_as_dense_as_the_row_says():
    """Every language owns exactly its share, in whole heads."""
    setting = Setting("op", shape="toy", unit="heads")
    keep = mask_at(setting).to_dense()[:, :, 0]
    assert keep.sum(1).tolist() == [16] * 8
    assert torch.equal(keep, keep[:, ::8].repeat_interleave(8, 1))
