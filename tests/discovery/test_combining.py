"""Combining draws: what was asked for is what is kept, whatever the vote and however many; and how much draws agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmask.discovery import VOTES, Draw, Stability, combine, stability
from fastmask.discovery.pruning import live_units
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.subnetworks import random_of_sizes


def draw_of(rows, scores=None, language="a"):
    """A draw of one language, from its rows of 0 and 1; a unit's score is a half where none is given."""
    keep = torch.tensor([rows], dtype=torch.bool)
    values = torch.full(keep.shape[1:], 0.5) if scores is None else torch.tensor(scores, dtype=torch.float32)
    return Draw(Subnetworks([language], keep), {language: {"heads": values}})


@st.composite
def draws(draw):
    """Draws of one density, over heads and neurons, with scores that are all different."""
    layers, heads, neurons, languages = (draw(st.integers(1, most)) for most in (4, 6, 9, 3))
    count, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**31))
    density = draw(st.sampled_from([0.01, 0.25, 0.5, 0.7, 0.95, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    names = [f"l{number}" for number in range(languages)]

    def masks(units):
        score = torch.rand(languages, layers, units, generator=generator)
        forced = score.clone().scatter_(2, score.argmax(2, keepdim=True), 2.0)
        order = forced.flatten(1).argsort(1, descending=True)[:, : live_units(density, layers, layers * units)]
        return torch.zeros(languages, layers * units, dtype=torch.bool).scatter_(1, order, True).view_as(score)

    def one():
        scores = {
            name: {
                kind: torch.rand(layers, units, generator=generator)
                for kind, units in (("heads", heads), ("neurons", neurons))
            }
            for name in names
        }
        return Draw(Subnetworks(names, masks(heads), masks(neurons)), scores)

    return [one() for _ in range(count)]


@given(draws())
def test_a_density_is_kept(found):
    """By "most", every language must keep as many units as each draw did, and one in every layer at least."""
    combined = combine(found, "most")
    for kind in ("heads", "neurons"):
        keep, first = combined.units[kind], found[0].subnetworks.units[kind]
        assert torch.equal(keep.sum((1, 2)), first.sum((1, 2)))
        assert (keep.sum(2) >= 1).all()
        votes = sum(draw.subnetworks.units[kind].long() for draw in found)
        for language, name in enumerate(combined.languages):
            mean = sum(draw.scores[name][kind].double() for draw in found) / len(found)
            order = votes[language].double() + mean / 2  # scores are below 1, so votes come first
            best = order == order.amax(1, keepdim=True)
            others = keep[language] & ~best
            left = ~keep[language]
            assert keep[language][best].all()
            if others.any() and left.any():
                assert order[others].min() > order[left].max()


@given(draws(), st.sampled_from(VOTES), st.randoms(use_true_random=False))
def test_neither_the_order_of_draws_nor_that_of_units_decides(found, vote, random):
    """Renumbered units must give the renumbered mask, and draws in another order the same: a tie is broken by worth."""
    combined = combine(found, vote)
    assert combine(random.sample(found, len(found)), vote) == combined
    places = list(range(combined.heads.shape[2]))
    random.shuffle(places)
    moved = [
        Draw(
            Subnetworks(draw.subnetworks.languages, draw.subnetworks.heads[:, :, places], draw.subnetworks.neurons),
            {name: {**score, "heads": score["heads"][:, places]} for name, score in draw.scores.items()},
        )
        for draw in found
    ]
    assert torch.equal(combine(moved, vote).heads, combined.heads[:, :, places])


@given(draws())
def test_one_draw_is_itself(found):
    """A single draw is returned as it is, by every vote."""
    for vote in VOTES:
        assert combine(found[:1], vote) == found[0].subnetworks


@given(draws())
def test_votes_that_elect(found):
    """A vote must keep the units it elects, and besides them only the best one of a layer."""
    votes = sum(draw.subnetworks.heads.long() for draw in found)
    elected = {
        "majority": votes * 2 > len(found),
        "union": votes > 0,
        "intersection": votes == len(found),
    }
    for vote, wanted in elected.items():
        keep = combine(found, vote).heads
        assert (keep | ~wanted).all()
        more = keep & ~wanted
        assert (more.sum(2) <= 1).all()
        assert not more[wanted.any(2)].any()
        assert (keep.sum(2) >= 1).all()


def test_by_hand():
    """Votes 3 2 1 0, and a layer where nobody agrees: there the unit of the highest mean score stays."""
    scores = [[0.5, 0.5, 0.5, 0.5], [0.2, 0.1, 0.3, 0.9]]
    seeds = [
        draw_of([[1, 1, 1, 0], [1, 0, 0, 0]], scores),
        draw_of([[1, 1, 0, 0], [0, 1, 0, 0]], scores),
        draw_of([[1, 0, 0, 0], [0, 0, 1, 0]], scores),
    ]

    def rows(*vote):
        return combine(seeds, *vote).heads[0].int().tolist()

    assert rows() == rows("majority") == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert rows("union") == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert rows("intersection") == [[1, 0, 0, 0], [0, 0, 1, 0]]
    # Of 4, 3 and 2 units on average 3: the best of each layer, then the one with two votes.
    assert rows("most") == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_two_draws_at_half_the_units_keep_half_of_them():
    """Two draws that share one of three units must not leave a third of what was asked for."""
    first, second = [[1, 1, 1, 0, 0, 0]], [[0, 0, 1, 1, 1, 0]]
    scores = [[0.1, 0.4, 0.5, 0.3, 0.2, 0.9]]
    found = combine([draw_of(first, scores), draw_of(second, scores)], "most")
    assert found.heads[0].int().tolist() == [[0, 1, 1, 1, 0, 0]]
    assert combine([draw_of(first), draw_of(second)]).heads.sum() == 1  # a tie is no majority


@given(draws(), st.sampled_from(VOTES))
def test_each_language_comes_from_the_draws_that_have_it(found, vote):
    """Draws over one language each must give what draws over all of them give, in the order they come in."""
    apart = [Draw(draw.subnetworks.select([name]), draw.scores) for draw in found for name in draw.scores]
    assert combine(apart, vote) == combine(found, vote)
    names = combine(found).languages
    assert combine(apart[::-1], vote) == combine(found, vote).select(names[::-1])


def test_draws_of_some_languages_only():
    """A language that one draw lacks must be decided by the others alone."""
    both = Draw(
        Subnetworks(["a", "b"], torch.tensor([[[1, 1, 0]], [[0, 1, 1]]]).bool()),
        {name: {"heads": torch.full((1, 3), 0.5)} for name in "ab"},
    )
    found = combine([draw_of([[1, 0, 1]], language="b"), both, draw_of([[1, 0, 1]], language="b")])
    assert found.languages == ("b", "a")
    assert found.heads.int().tolist() == [[[1, 0, 1]], [[1, 1, 0]]]


def test_stability_by_hand():
    """The mean within a language, between languages and by chance must be those of the masks, each pair once."""
    found = [
        draw_of([[1, 1, 0, 0], [1, 0, 0, 0]]),
        draw_of([[1, 0, 1, 0], [1, 0, 0, 0]]),
        draw_of([[0, 0, 1, 1], [0, 1, 0, 0]], language="b"),
    ]
    chance = (2 * 2 / 4 + 1 * 1 / 4) / (6 - 1.25)
    assert stability(found) == {"heads": Stability(2 / 4, pytest.approx((0 / 6 + 1 / 5) / 2), pytest.approx(chance))}
    assert stability(found[:2])["heads"].languages is None
    assert stability(found[1:])["heads"].draws is None
    with pytest.raises(ValueError, match="two masks or more to compare, given 1"):
        stability(found[:1])


def test_chance_is_what_random_masks_agree_by():
    """Random masks of several densities must agree by the chance that is reported, within and between languages."""
    sizes = torch.tensor([[30, 10, 50]]).expand(8, -1)
    keep = [random_of_sizes(sizes, [60] * sizes.shape[1], torch.Generator().manual_seed(seed)) for seed in range(4)]
    names = [f"l{number}" for number in range(8)]
    found = stability([Draw(Subnetworks(names, neurons=masks), {}) for masks in keep])["neurons"]
    assert found.draws == pytest.approx(found.chance, abs=0.02)
    assert found.languages == pytest.approx(found.chance, abs=0.01)


def test_what_cannot_be_combined():
    """An unknown vote, nothing at all, and draws over other units must be refused."""
    one = draw_of([[1, 0]])
    with pytest.raises(KeyError, match="did you mean 'majority'"):
        combine([one], "majorty")
    with pytest.raises(ValueError, match="no subnetworks"):
        combine([])
    with pytest.raises(ValueError, match="different heads"):
        combine([one, draw_of([[1, 0, 1]])])
    with pytest.raises(ValueError, match="different heads"):
        combine([one, draw_of([[1, 0, 1]], language="b")])
    with pytest.raises(ValueError, match="different neurons"):
        combine([one, Draw(Subnetworks(["a"], one.subnetworks.heads, one.subnetworks.heads), one.scores)])
