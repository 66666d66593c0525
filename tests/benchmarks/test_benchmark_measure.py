"""The yardstick itself: what is reported is what a clock would say."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from benchmarks import measure
from benchmarks.cases.case import Side
from benchmarks.cases.encoder import saved_bytes
from benchmarks.measure import peak_bytes, rounds
from benchmarks.row import Spread


class Clock:
    """Time that passes only when a side runs."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def side(self, *seconds: float, reset: float = 0.0) -> Side:
        """A side that takes these times in turn, and so long to reset."""
        runs = iter(seconds * 1000)
        return Side(lambda: self._pass(next(runs)), lambda: self._pass(reset))

    def _pass(self, seconds: float) -> None:
        self.now += seconds


def test_only_the_run_is_timed(monkeypatch):
    """What is done before a run counts as the run, or the warm-up as a round."""
    clock = Clock(monkeypatch)
    sides = [clock.side(9, 9, 9, 9, *[0.3] * 9, reset=5), clock.side(9, 9, 9, 9, *[0.1] * 9, reset=7)]
    dense, ours = rounds(sides, "cpu", seconds=0, least=7)
    assert (dense, ours) == (pytest.approx([300] * 7), pytest.approx([100] * 7))


def test_every_side_runs_in_turn(monkeypatch):
    """One side always runs first, with the other's data in the cache, or in another round than its rivals."""
    order: list[str] = []
    times = rounds([Side(lambda name=name: order.append(name)) for name in "abc"], "cpu", seconds=0, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "abccba"
    assert [len(own) for own in times] == [2, 2, 2]


def test_runs_for_as_long_as_asked(monkeypatch):
    """`--seconds` is ignored, or runs without an end."""
    clock = Clock(monkeypatch)
    times = rounds([clock.side(0.3), clock.side(0.2)], "cpu", seconds=10, least=3)
    assert [len(own) for own in times] == [20, 20]
    assert [len(own) for own in rounds([clock.side(9.0)], "cpu", seconds=10, least=3)] == [3]


def test_quartiles_lie_within_what_was_seen():
    """Quartiles are extrapolated beyond the ratios."""
    assert Spread.of([2.0, 4.0, 6.0]) == (4.0, 3.0, 5.0)


def test_saved_bytes_counts_each_storage_once():
    """Activation memory is counted twice, or parameters are taken for activations."""
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [x, weight]) == 8 * 4 * 4  # what exp keeps
    assert saved_bytes(lambda: (x @ weight).exp().sum(), [weight]) == 2 * 8 * 4 * 4  # and x, for the weight's gradient


def test_saved_bytes_lets_go():
    """Every model that is measured stays in memory until there is none left."""
    x, weights = torch.randn(8, 4), [torch.randn(4, 4, requires_grad=True)]
    held = weakref.ref(weights[0])
    saved_bytes(lambda: (x @ weights[0]).exp().sum(), [])
    weights.clear()
    gc.collect()
    assert held() is None


def test_peak_is_of_what_is_alive_at_once():
    """Memory that was given back is counted, or temporaries are not."""

    def run() -> torch.Tensor:
        first = torch.zeros(100_000)
        del first
        second = torch.zeros(50_000)
        third = torch.zeros(25_000)
        del second
        return third

    found = peak_bytes(Side(run), "cpu")
    assert 400_000 <= found < 420_000


def test_the_profiler_is_silent(capfd):
    """Counting memory writes the profiler's greetings between the lines of a table."""
    held: list[torch.Tensor] = []
    peak_bytes(Side(held.clear, lambda: held.append(torch.zeros(10))), "cpu")  # it frees what was there before
    assert capfd.readouterr() == ("", "")
