"""One-root spanning trees, against trying every tree."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmask.tasks.parsing.biaffine import maximum_spanning_trees


def is_tree(heads: np.ndarray) -> bool:
    """One root, and every word reaches it."""
    if (np.asarray(heads) == 0).sum() != 1:
        return False
    for start in range(1, len(heads) + 1):
        word = start
        for _ in heads:
            word = int(heads[word - 1]) if word else 0
        if word:
            return False
    return True


@cache
def all_trees(n: int) -> np.ndarray:
    """Every one-root tree of n words: int [trees, n]."""
    candidates = itertools.product(*([head for head in range(n + 1) if head != word] for word in range(1, n + 1)))
    return np.array([heads for heads in candidates if is_tree(np.array(heads))])


def best_total(scores: np.ndarray) -> float:
    n = len(scores)
    return float(scores[np.arange(n), all_trees(n)].sum(axis=1).max())


def check(scores: np.ndarray) -> None:
    (heads,) = maximum_spanning_trees(scores[None], [len(scores)])
    n = len(scores)
    assert heads.dtype == np.int32
    assert is_tree(heads)
    total = float(scores.astype(np.float64)[np.arange(n), heads].sum())
    best = best_total(scores.astype(np.float64))
    assert total == pytest.approx(best, abs=1e-9 * max(1.0, float(np.abs(scores).max())))


def test_the_number_of_trees_is_the_known_one() -> None:
    """The reference lists every tree: there are n^(n-1) rooted labelled ones."""
    assert [len(all_trees(n)) for n in (1, 2, 3, 4, 5)] == [1, 2, 9, 64, 625]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["normal", "roots-attract", "roots-repel", "ties", "float32", "large"])
def test_best_of_all_trees(n: int, kind: str) -> None:
    """Decoding returns the best of all trees with one root."""
    rng = np.random.default_rng(n)
    for _ in range(40):
        scores = rng.normal(size=(n, n + 1))
        if kind == "roots-attract":
            scores[:, 0] += 50
        elif kind == "roots-repel":
            scores[:, 0] -= 1e4
        elif kind == "ties":
            scores = rng.integers(0, 2, size=(n, n + 1)).astype(float)
        elif kind == "float32":
            scores = scores.astype(np.float32)
        elif kind == "large":
            scores = scores * 1e6 - 1e7
        check(scores)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: hnp.arrays(np.float32, (n, n + 1), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
    )
)
def test_any_scores_give_the_best_tree(scores: np.ndarray) -> None:
    """Ties, zeros and huge scores, too, give the best tree with one root."""
    check(scores)


def test_padding_and_self_arcs_are_not_read() -> None:
    """Scores in the padding or on the diagonal do not change a tree."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 6, 7))
    lengths = [6, 3, 1, 0]
    clean = maximum_spanning_trees(scores, lengths)
    dirty = scores.copy()
    for sentence, n in enumerate(lengths):
        dirty[sentence, n:], dirty[sentence, :, n + 1 :] = np.nan, np.inf
        dirty[sentence, np.arange(n), np.arange(1, n + 1)] = -np.inf
    before = dirty.copy()
    for expected, heads in zip(clean, maximum_spanning_trees(dirty, np.array(lengths)), strict=True):
        np.testing.assert_array_equal(heads, expected)
    np.testing.assert_array_equal(dirty, before)
    assert [len(heads) for heads in clean] == lengths


def test_long_sentences_are_trees() -> None:
    """Trees of long sentences have one root, whatever is lost to rounding."""
    scores = np.random.default_rng(0).normal(size=(3, 150, 151)).astype(np.float32)
    scores[1, :, 0] += 1000
    assert all(is_tree(heads) for heads in maximum_spanning_trees(scores, [150, 149, 77]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    """Scores of a model that diverged are an error."""
    scores = np.zeros((2, 3, 4))
    scores[1, 2, 1] = value
    with pytest.raises(ValueError, match="sentence 1, word 3, head 1"):
        maximum_spanning_trees(scores, [3, 3])


def test_wrong_shapes_and_lengths_are_refused() -> None:
    """A transposed or cropped tensor of scores is refused."""
    with pytest.raises(ValueError, match="W\\+1"):
        maximum_spanning_trees(np.zeros((1, 3, 3)), [3])
    with pytest.raises(ValueError, match="2 lengths for 1 sentences"):
        maximum_spanning_trees(np.zeros((1, 3, 4)), [3, 3])
    with pytest.raises(ValueError, match="length 4 of sentence 0"):
        maximum_spanning_trees(np.zeros((1, 3, 4)), [4])
    with pytest.raises(ValueError, match="too large"):
        maximum_spanning_trees(np.array([[[1e308, 0, -1e308], [0, 1e308, 0]]]), [2])
