"""The yardstick itself: what `python -m benchmarks` reports is what it says."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.__main__ import Result
from benchmarks.layer import WeightMaskedLayer
from benchmarks.measure import Side, compare, saved_bytes


def test_ratio_is_baseline_over_ours():
    """A slower library would be reported as a faster one."""
    ratio = compare(Side(lambda: time.sleep(0.02)), Side(lambda: time.sleep(0.005)), seconds=0.1)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median > 1.5
    assert ratio.pairs >= 7


def test_saved_bytes_counts_each_storage_once():
    """Activation memory is counted twice, or parameters are taken for activations."""
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [x, weight]) == 8 * 4 * 4  # what exp keeps
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [weight]) == 2 * 8 * 4 * 4  # and x, for the weight's gradient


@pytest.mark.parametrize(("value", "at_least", "reached"), [(2.0, True, True), (1.8, True, False), (1.8, False, True)])
def test_targets(value, at_least, reached):
    """A row that falls short is reported as reached."""
    assert Result("row", value, None, None, None, 1.9, at_least, "").reached is reached


def test_nothing_is_timed_before_it_is_right():
    """A wrong layer would be reported as a fast one."""
    layer = WeightMaskedLayer(tokens=128)
    layer.check()
    layer.masked.mask = layer.mask.map(lambda tensor: tensor ^ 1)
    with pytest.raises(AssertionError):
        layer.check()
