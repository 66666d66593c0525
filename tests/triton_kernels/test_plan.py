"""A batch sorted by language: every token once, in the segment of its language."""

from __future__ import annotations

import itertools

import pytest
import torch
from covering import covering
from fastmask_kernels import plan as plan_module
from fastmask_kernels.plan import Plan
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, launches_kernels

pytestmark = launches_kernels

slow_launches = settings(deadline=None, max_examples=40 if ON_GPU else 15)

BATCHES = st.integers(1, 6).flatmap(
    lambda L: st.tuples(st.lists(st.integers(-1, L - 1), max_size=12), st.integers(0, 9), st.just(L))
)


def make(ids: list[int], tokens: int, L: int) -> Plan:
    """A plan on the tests' device."""
    return Plan(torch.tensor(ids, dtype=torch.int64, device=DEVICE), tokens, L)


def segments(plan: Plan) -> list[list[int]]:
    """The rows of each segment."""
    rows, starts = plan.token_rows.tolist(), plan.starts.tolist()
    return [rows[first:last] for first, last in itertools.pairwise(starts)]


@slow_launches
@given(BATCHES)
def test_segments_hold_the_rows_of_their_language_in_order(batch: tuple[list[int], int, int]) -> None:
    """Each segment holds the rows of its language, in order, and no others."""
    ids, tokens, L = batch
    plan = make(*batch)
    languages = [language for language in ids for _ in range(tokens)]
    expected = [[row for row, own in enumerate(languages) if own == s - 1] for s in range(L + 1)]
    assert segments(plan) == expected
    assert (plan.n_rows, plan.n_languages, plan.n_segments) == (len(languages), L, L + 1)
    assert plan.starts.shape == (L + 2,)
    assert plan.starts[-1] == len(languages)


@slow_launches
@given(BATCHES)
def test_present_lists_the_segments_that_have_tokens(batch: tuple[list[int], int, int]) -> None:
    """Each segment that has tokens is listed once."""
    ids, tokens, L = batch
    plan = make(*batch)
    expected = sorted({language + 1 for language in ids}) if tokens else []
    assert plan.present.shape == (min(L + 1, len(ids)),)
    assert plan.present.tolist() == expected + [-1] * (len(plan.present) - len(expected))


@slow_launches
@given(BATCHES, st.integers(1, 16))
def test_tiles_cut_the_segments_into_pieces(batch: tuple[list[int], int, int], size: int) -> None:
    """Each token is in exactly one tile, and each tile in one segment."""
    plan = make(*batch)
    tiles = plan.tiles(size).tolist()
    assert len(tiles) == plan.n_tiles(size)
    needed = [tile for tile in tiles if tile[0] >= 0]
    assert tiles == needed + [[-1, 0, 0]] * (len(tiles) - len(needed)), "spare tiles come last"
    starts = plan.starts.tolist()
    expected = []
    for s, (start, end) in enumerate(itertools.pairwise(starts)):
        expected += [[s, first, min(first + size, end)] for first in range(start, end, size)]
    assert needed == expected


@slow_launches
@given(BATCHES, st.sampled_from([-3, -2, 6, 10**9, -(2**40)]))
def test_ids_out_of_range_are_reported(batch: tuple[list[int], int, int], wrong: int) -> None:
    """A wrong id is reported, a right one is not, and no row outside of the batch is read."""
    ids, tokens, L = batch
    assert make(*batch).ok.item() == 1
    plan = make([*ids, wrong], tokens, L)
    assert plan.ok.item() == 0
    assert sorted(plan.token_rows.tolist()) == list(range((len(ids) + 1) * tokens))


@pytest.mark.parametrize(
    ("L", "sorts"),
    [
        *covering([130, 7, 8, 1], {"compared": False, "sorted": True}, whole=ON_GPU),
        *(pytest.param(1500, sorts, marks=() if ON_GPU else pytest.mark.slow) for sorts in (False, True)),
    ],
)
def test_many_languages_and_examples(L: int, sorts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More languages than a block of programs compares at once, more examples, more tokens than a program writes."""
    if sorts:
        monkeypatch.setattr(plan_module, "_MANY", 1)
    examples, tokens = 300, 700
    if not ON_GPU:  # the interpreter runs a program for each example
        monkeypatch.setattr(plan_module, "_BLOCK", 32)
        examples, tokens = 40, 90
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, L, (examples,), generator=generator).tolist()
    plan = make(ids, 2, L)
    expected = [[row for b, own in enumerate(ids) if own == s - 1 for row in (2 * b, 2 * b + 1)] for s in range(L + 1)]
    assert segments(plan) == expected
    needed = [tile for tile in plan.tiles(4).tolist() if tile[0] >= 0]
    assert sum(last - first for _, first, last in needed) == 2 * examples
    assert all(plan.starts[s] <= first < last <= plan.starts[s + 1] for s, first, last in needed)
    long = make([0, 0], tokens, L)
    assert segments(long)[1] == list(range(2 * tokens))


@slow_launches
@given(BATCHES)
def test_everything_is_int32_and_on_the_device_of_the_ids(batch: tuple[list[int], int, int]) -> None:
    """Kernels read these as 32-bit integers: another width reads other numbers."""
    plan = make(*batch)
    for tensor in (plan.token_rows, plan.starts, plan.present, plan.tiles(4)):
        assert tensor.dtype == torch.int32
        assert tensor.device.type == DEVICE
        assert tensor.is_contiguous()


def test_an_example_in_plain_numbers() -> None:
    """The layout that kernels rely on, for a reader."""
    plan = make([1, -1, 1, 0], 2, 3)
    assert plan.token_rows.tolist() == [2, 3, 6, 7, 0, 1, 4, 5]
    assert plan.starts.tolist() == [0, 2, 4, 8, 8]
    assert plan.present.tolist() == [0, 1, 2, -1]
    assert plan.tiles(3).tolist() == [[0, 0, 2], [1, 2, 4], [2, 4, 7], [2, 7, 8], [-1, 0, 0], [-1, 0, 0]]


def test_tiles_are_made_once_for_each_size() -> None:
    """Each layer of a model asks for the same tiles: making them anew would cost several launches a layer."""
    plan = make([1, -1, 1, 0], 5, 3)
    assert plan.tiles(4) is plan.tiles(4)
    assert plan.tiles(4).shape != plan.tiles(2).shape


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_the_device() -> None:
    """A wait in every forward pass leaves the GPU idle."""
    ids = torch.tensor([1, -1, 1, 0], device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        Plan(ids, 5, 3).tiles(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
