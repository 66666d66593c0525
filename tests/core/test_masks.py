"""`Mask`: constructors, storage, densities and their errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import KINDS, gradients, random_mask

from fastmask import Mask, bits, masked_linear
from fastmask.torch_path.naive import masked_linear_naive


@settings(max_examples=50, deadline=None)
@given(
    L=st.integers(1, 4),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    seed=st.integers(0, 99),
    p=st.sampled_from([0, 0.3, 1]),
)
def test_every_kind_round_trips_to_dense(L, N, K, seed, p):
    """The stored form of every kind holds exactly the live weights."""
    generator = torch.Generator().manual_seed(seed)

    def flags(*shape):
        return torch.rand(shape, generator=generator) < p

    rows, columns, weights, blocks = flags(L, N), flags(L, K), flags(L, N, K), flags(L, N, K)
    dense = {
        Mask.rows(rows, K): rows[:, :, None].expand(L, N, K),
        Mask.columns(columns, N): columns[:, None, :].expand(L, N, K),
        Mask.weights(weights): weights,
        Mask.blocks(blocks, (3, 2)): blocks.repeat_interleave(3, 1).repeat_interleave(2, 2),
    }
    for mask, expected in dense.items():
        assert torch.equal(mask.to_dense(), expected), mask
        torch.testing.assert_close(mask.density, expected.float().mean((1, 2)))


@settings(max_examples=50, deadline=None)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 100)), seed=st.integers(0, 99))
def test_bits_round_trip(shape, seed):
    """Each bit is in its place, and the padding is not read."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = bits.pack(keep)
    assert words.shape == (*shape[:2], (shape[2] + 31) // 32)
    assert torch.equal(bits.unpack(words, shape[2]), keep)
    # The documented position: bit k % 32 of word k // 32.
    k = shape[2] - 1
    assert torch.equal(((words[..., k // 32] >> (k % 32)) & 1).bool(), keep[..., k])


def test_units_are_found():
    """Whole heads are found, and gathered as runs of head_dim rows."""
    heads = torch.tensor([[True, False, True, True], [False, False, True, True]])
    assert Mask.rows(heads.repeat_interleave(16, 1), 8).geometry == (16,)
    assert Mask.rows(torch.ones(2, 64, dtype=torch.bool), 8).geometry == (64,)
    assert Mask.rows(torch.tensor([[True, False, False]]), 8).geometry == (1,)


def test_weights_cost_one_bit_each():
    """A mask over single weights takes one bit for each, so those of 100 languages fit."""
    mask = Mask.weights(torch.ones(4, 64, 96, dtype=torch.bool))
    assert mask.nbytes <= 4 * 64 * 96 / 8 + 100


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Mask.rows(torch.ones(2, 3), 4), TypeError, "torch.bool"),
        (lambda: Mask.rows([[True]], 4), TypeError, "bool tensor, given list"),
        (lambda: Mask.rows(torch.ones(3, dtype=torch.bool), 4), ValueError, r"given shape \(3,\)"),
        (lambda: Mask.rows(torch.ones(2, 3, dtype=torch.bool), 0), ValueError, "in_features must be a positive"),
        (lambda: Mask.blocks(torch.ones(2, 3, 3, dtype=torch.bool), (0, 4)), ValueError, r"block\[0\]"),
        (lambda: Mask.weights(torch.ones(2, 0, 3, dtype=torch.bool)), ValueError, "every size >= 1"),
    ],
)
def test_bad_masks(build, error, message):
    """A wrong mask is refused where it is made."""
    with pytest.raises(error, match=message):
        build()


L, N, K = 5, 12, 70


@pytest.fixture(params=KINDS)
def masked(request):
    """A mask of each kind, the second language empty and the third full, with its dense form; units of 2."""
    mask = random_mask(request.param, L, N, K, unit=2)
    return mask, mask.to_dense().clone()


def stored(mask):
    return [tensor.clone() for tensor in (mask.live, mask.index, mask.extents)]


def assert_made_anew(mask, dense):
    """The mask is that of `dense`, stored as a constructor stores it, and computes what float64 products say."""
    makers = {
        "rows": lambda: Mask.rows(dense[:, :, 0], K),
        "columns": lambda: Mask.columns(dense[:, 0], N),
        "blocks": lambda: Mask.blocks(dense[:, ::2, ::2], (2, 2)),
        "weights": lambda: Mask.weights(dense),
    }
    expected = makers[mask.kind]()
    assert (mask.n_languages, mask.out_features, mask.in_features) == dense.shape
    for mine, fresh in zip(stored(mask), stored(expected), strict=True):
        assert mine.equal(fresh)
        assert mine.dtype == fresh.dtype
    assert all(whole % unit == 0 for whole, unit in zip(expected.geometry, mask.geometry, strict=True))
    assert mask.to_dense().equal(dense)
    ids = torch.arange(-1, len(dense))
    generator = torch.Generator().manual_seed(1)
    sizes = (len(ids), 3, K), (N, K), (N,), (len(ids), 3, N)
    x, weight, bias, dy = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    results, truth = (gradients(form, x, weight, bias, dy, mask, ids) for form in (masked_linear, masked_linear_naive))
    for name, ours, exact in zip(("y", "dx", "dW", "db"), results, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ids", [[0], [1], [1, 1], [4, 2, 0], [3, 3, 1, 3], [0, 1, 2, 3, 4]], ids=str)
def test_select(masked, ids):
    """A selected language has its own mask, without the padding that it no longer needs."""
    mask, dense = masked
    before = stored(mask)
    assert_made_anew(mask.select(ids), dense[ids])
    assert_made_anew(mask.select(torch.tensor(ids)), dense[ids])
    with torch.device("meta"):
        found = mask.select(iter(ids))
    assert_made_anew(found, dense[ids])
    assert all(map(torch.equal, before, stored(mask)))


def test_units_of_a_replaced_mask():
    """A mask in which one language is replaced is copied in runs as long as the units of old and new allow."""
    coarse = Mask.rows(torch.tensor([[True, False]]).repeat_interleave(12, 1), 3)
    fine = torch.tensor([True, False, False]).repeat_interleave(8)
    assert coarse.replaced(0, ~coarse.flags()[0]).geometry == (12,)
    assert coarse.replaced(0, fine).geometry == (4,)


def test_masks_of_inference_mode(masked):
    """Masks selected in inference mode can be trained with."""
    mask, dense = masked
    with torch.inference_mode():
        found = mask.select([4, 1])
    assert_made_anew(found, dense[[4, 1]])


ROWS = Mask.rows(torch.ones(2, 6, dtype=torch.bool), 4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ROWS.select([]), ValueError, "at least one language id, given none"),
        (lambda: ROWS.select([0, 2]), ValueError, "language id 2 is out of range: expected 0 to 1"),
        (lambda: ROWS.select([-1]), ValueError, "language id -1 is out of range"),
        (lambda: ROWS.select([0.5]), TypeError, "float"),
    ],
)
def test_what_cannot_be_selected(build, error, message):
    """Languages that are not there are refused."""
    with pytest.raises(error, match=message):
        build()
