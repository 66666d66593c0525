"""`Mask`: constructors, storage, densities and their errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask import Mask, bits


@settings(max_examples=50, deadline=None)
@given(
    L=st.integers(1, 4),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    seed=st.integers(0, 99),
    p=st.sampled_from([0, 0.3, 1]),
)
def test_every_kind_round_trips_to_dense(L, N, K, seed, p):
    """The stored form loses or invents a live weight."""
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
    """A bit lands in the wrong word or the padding is read."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = bits.pack(keep)
    assert words.shape == (*shape[:2], (shape[2] + 31) // 32)
    assert torch.equal(bits.unpack(words, shape[2]), keep)
    # The documented position: bit k % 32 of word k // 32.
    k = shape[2] - 1
    assert torch.equal(((words[..., k // 32] >> (k % 32)) & 1).bool(), keep[..., k])


def test_units_are_found():
    """Heads would be gathered row by row instead of as runs of head_dim rows."""
    heads = torch.tensor([[True, False, True, True], [False, False, True, True]])
    assert Mask.rows(heads.repeat_interleave(16, 1), 8).geometry == (16,)
    assert Mask.rows(torch.ones(2, 64, dtype=torch.bool), 8).geometry == (64,)
    assert Mask.rows(torch.tensor([[True, False, False]]), 8).geometry == (1,)


def test_weights_cost_one_bit_each():
    """Arbitrary masks of 100 languages would not fit."""
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
    """A wrong mask is accepted and fails later, far from its cause."""
    with pytest.raises(error, match=message):
        build()
