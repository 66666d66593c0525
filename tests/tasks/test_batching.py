"""Batches for predicting: every example once, little padding, and no batch too large."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmask.tasks.predicting import ENOUGH, PADDING, like_lengths

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(1, 300), max_size=200), most=st.integers(1, 70))
def test_every_example_once_in_order_of_length(lengths: list[int], most: int) -> None:
    """No example is lost or predicted twice, and a batch has `most` examples at most."""
    batches = list(like_lengths(np.array(lengths, dtype=np.int64), most, CPU))
    rows = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert all(1 <= len(batch) <= most for batch in batches)


@pytest.mark.parametrize(("device", "of"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_large_batches_hold_little_padding(device: str, of: str) -> None:
    """What is computed for nothing is a tenth at most, but for the few positions that a device is kept busy with."""
    lengths = np.random.default_rng(0).integers(3, 90, 5000)
    for batch in like_lengths(lengths, 1000, torch.device(device)):
        padded, real = len(batch) * int(lengths[batch].max()), int(lengths[batch].sum())
        assert real >= (1 - PADDING) * padded or real <= ENOUGH[of] + 90
