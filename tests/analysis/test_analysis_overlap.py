"""Overlap and use of units against cases counted by hand, all possible masks, and literal loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

import fastmask as fm
from fastmask.analysis import sharing
from fastmask.analysis.drawing import LANGUAGE_FAMILIES, families_of
from fastmask.analysis.sharing import chance_jaccard, chance_owners


def subnets(rows, languages=("aa", "bb", "cc")):
    """Subnetworks over heads, from strings like "110 011": a word for each layer."""
    heads = [[[unit == "1" for unit in layer] for layer in row.split()] for row in rows]
    return fm.Subnetworks(list(languages)[: len(rows)], heads=torch.tensor(heads))


def every_jaccard(sizes_a, sizes_b, n):
    """Jaccard of every pair of masks of these sizes per layer, all equally likely."""

    def masks(sizes):
        layers = [list(itertools.combinations(range(n), size)) for size in sizes]
        return [{(at, unit) for at, layer in enumerate(mask) for unit in layer} for mask in itertools.product(*layers)]

    return sorted(len(a & b) / len(a | b) for a in masks(sizes_a) for b in masks(sizes_b))


@pytest.mark.parametrize(("sizes_a", "sizes_b", "n"), [([2], [3], 5), ([1, 2], [2, 3], 4), ([0, 2], [1, 2], 3)])
def test_chance_equals_counting_all_masks(sizes_a, sizes_b, n, monkeypatch):
    """The band of random masks is that of all masks of these sizes, counted one by one."""
    every = np.array(every_jaccard(sizes_a, sizes_b, n))
    for level in (0.5, 0.8, 0.95):
        monkeypatch.setattr(sharing, "LEVEL", level)
        found = chance_jaccard(sizes_a, sizes_b, [n] * len(sizes_a))
        assert found.expected == pytest.approx(every.mean())
        tail = (1 - level) / 2 + 1e-9
        low = max(value for value in every if (every < value - 1e-9).mean() <= tail)
        high = min(value for value in every if (every > value + 1e-9).mean() <= tail)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_chance_of_many_units():
    """With thousands of units, the terms that the sums leave out are negligible."""
    found = chance_jaccard([1000], [1500], [3072])
    shared = np.arange(1001)
    jaccard = shared / (2500 - shared)
    probability = hypergeom.pmf(shared, 3072, 1000, 1500)
    assert found.expected == pytest.approx(float(probability @ jaccard), rel=1e-12)
    assert found.low < found.expected < found.high
    generator = np.random.default_rng(0)
    drawn = generator.hypergeometric(1000, 2072, 1500, 100_000)
    inside = (drawn / (2500 - drawn) >= found.low) & (drawn / (2500 - drawn) <= found.high)
    assert 0.95 <= inside.mean() + 0.002 <= 0.965


def test_chance_owners_equals_drawing_masks():
    """The bands for units owned by all, one or no language are those of masks drawn at random."""
    sizes, n, draws = [3, 5, 2], 7, 20_000
    found = chance_owners(sizes, n, draws, [1])
    assert (found.sum(1) == n).all()
    assert (found @ np.arange(4) == sum(sizes)).all()
    generator = np.random.default_rng(2)
    owners = sum((generator.random((draws, n)).argsort(1).argsort(1) < size).astype(int) for size in sizes)
    literal = np.stack([(owners == k).sum(1) for k in range(4)], 1)
    for k in range(4):
        for count in range(n + 1):
            a, b = (found[:, k] == count).mean(), (literal[:, k] == count).mean()
            assert abs(a - b) <= 5 * math.sqrt(0.25 * 2 / draws)


def test_overlap_by_hand():
    """Each pair has its Jaccard similarity, relation and band."""
    one = subnets(["110 100", "100 100", "001 011"])
    other = subnets(["110 010", "110 100", "001 011"])
    table = fm.analysis.overlap(one, seeds=[other]).table.set_index(["language_a", "seed_a", "language_b", "seed_b"])
    assert len(table) == 15
    assert table.jaccard["aa", 0, "bb", 0] == 2 / 3
    assert table.jaccard["aa", 0, "cc", 0] == 0
    assert table.jaccard["aa", 0, "aa", 1] == 2 / 4
    assert table.jaccard["cc", 0, "cc", 1] == 1
    assert table.jaccard["bb", 0, "aa", 1] == 1 / 4
    assert table.relation["aa", 0, "bb", 0] == table.relation["bb", 1, "cc", 1] == "languages"
    assert table.relation["aa", 0, "aa", 1] == "seeds"
    assert table.relation["bb", 0, "aa", 1] == "languages and seeds"
    every = every_jaccard([2, 1], [1, 1], 3)
    assert table.expected["aa", 0, "bb", 0] == pytest.approx(np.mean(every))
    relations = fm.analysis.overlap(one, seeds=[other]).more["relations"].set_index("relation")
    assert relations.pairs.to_dict() == {"languages": 6, "seeds": 3, "languages and seeds": 6}
    assert relations["mean"]["seeds"] == pytest.approx((0.5 + 1 / 2 * 1 + 0 + 1 - 0 + (2 / 3 - 0.5)) / 3)


def test_overlap_agrees_with_subnetworks():
    """`Subnetworks.overlap` and the analysis give the same numbers."""
    found = fm.Subnetworks(
        ["a", "b", "c"], neurons=torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(1)) < 0.4
    )
    table, matrix = fm.analysis.overlap(found).table, found.overlap()
    expected = [float(matrix[i, j]) for i, j in itertools.combinations(range(3), 2)]
    np.testing.assert_allclose(table.jaccard, expected, rtol=1e-6)


def test_band_says_random_masks_are_inside():
    """Random masks lie inside the band, and masks of related languages above it."""
    keep = torch.zeros(12, 4, 12, dtype=torch.bool)
    for at, (row, layer) in enumerate(itertools.product(range(12), range(4))):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(at))
        keep[row, layer, order[:7]] = True
    found = fm.analysis.overlap(fm.Subnetworks([f"x{i}" for i in range(12)], heads=keep)).table
    assert (found.band == "inside").mean() > 0.9
    same = fm.analysis.overlap(fm.Subnetworks(["a", "b"], heads=keep[:1].repeat(2, 1, 1))).table
    assert same.band.tolist() == ["above"]


def test_families_by_hand():
    """Related languages are compared with unrelated ones over the right pairs, with the right p-value."""
    masks = subnets(["1100", "1100", "0011", "0011"], ["p", "q", "r", "s"])
    families = {"p": "one", "q": "one", "r": "two", "s": "two"}
    row = fm.analysis.overlap(masks, families=families).more["families"].iloc[0]
    assert (row.pairs_within, row.pairs_across, row.within, row.across) == (2, 4, 1, 0)
    assert row.p == pytest.approx(1 / 3)  # 8 of 24 orders put each pair together
    unrelated = fm.analysis.overlap(masks, families={}).more["families"]
    assert unrelated.empty
    assert families_of(["en", "no", "tlh"]) == {"en": "Germanic", "no": "Germanic", "tlh": "other"}
    assert LANGUAGE_FAMILIES["qaa"] == "west"


def test_weights_overlap():
    """Masks over single weights can be compared."""
    keep = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]]], dtype=torch.bool)
    table = fm.analysis.overlap(fm.Subnetworks(["a", "b"], weights={"m": keep})).table
    assert table.jaccard.tolist() == [0.5]
    assert table.expected[0] == pytest.approx(0.5 * 0.5)  # the second's weight is one of the first's two with 1/2


def test_unit_use_by_hand():
    """Owners of each unit are counted, and so is what random masks would share."""
    result = fm.analysis.unit_use(subnets(["110 100", "100 100", "101 011"]))
    table = result.table.set_index(["layer", "unit"])
    assert table.owners.tolist() == [3, 1, 1, 2, 1, 1]
    assert table.languages[0, 0] == "aa bb cc"
    assert table.languages[1, 0] == "aa bb"
    layers = result.more["layers"].set_index(["layer", "group"])
    assert layers["count"].to_dict() == {
        (0, "all"): 1, (0, "one"): 2, (0, "none"): 0, (1, "all"): 0, (1, "one"): 2, (1, "none"): 0,
    }  # fmt: skip
    assert layers.expected[0, "all"] == pytest.approx(3 * (2 / 3) * (1 / 3) * (2 / 3))
    assert layers.expected[0, "none"] == pytest.approx(3 * (1 / 3) * (2 / 3) * (1 / 3))
    one = (2 / 3) * (2 / 3) * (1 / 3) + (1 / 3) * (1 / 3) * (1 / 3) + (1 / 3) * (2 / 3) * (2 / 3)
    assert layers.expected[0, "one"] == pytest.approx(3 * one)
    drawn = chance_owners([2, 1, 2], 3, 40_000, [5]).mean(0)
    assert drawn[[3, 1, 0]] == pytest.approx(layers.expected[0].loc[["all", "one", "none"]].to_numpy(), abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fm.analysis.overlap(subnets(["10", "01"]), units="neuron"), "unknown masked part 'neuron'"),
        (lambda: fm.analysis.overlap(subnets(["10"]), seeds=[subnets(["10"], ["zz"])]), "same languages"),
        (lambda: fm.analysis.overlap(subnets(["10"]), seeds=[subnets(["100"])]), "one geometry"),
        (lambda: fm.analysis.unit_use(subnets(["10"])), "at least two languages"),
        (lambda: fm.analysis.unit_use(subnets(["10", "01"]), units="neurons"), "unknown masked part"),
        (lambda: fm.analysis.nothing, "no attribute 'nothing'"),
    ],
)
def test_bad_input(call, message):
    """Bad input is refused at once, by a message that names it."""
    with pytest.raises((ValueError, KeyError, AttributeError), match=message):
        call()
