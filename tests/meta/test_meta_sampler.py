"""Episodes: support and query apart, every sentence its turn, the same again after a resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.meta import EpisodeSampler

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def samplers(draw):
    support, query = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    n = draw(st.integers(1, 5))
    sizes = {f"l{i}": draw(st.integers(support + query, 40)) for i in range(n)}
    meta_batch = draw(st.one_of(st.none(), st.integers(1, n)))
    seed = draw(st.integers(0, 2**32))

    def make():
        return EpisodeSampler(sizes, support, query, meta_batch=meta_batch, seed=seed)

    return make


def same(a, b):
    return a.language == b.language and np.array_equal(a.support, b.support) and np.array_equal(a.query, b.query)


@given(samplers())
@SETTINGS
def test_every_draw_is_what_was_asked_for(make):
    """Support and query are disjoint, the languages of a meta-batch differ, and sampling never runs dry."""
    sampler = make()
    passes = {language: Counter() for language in sampler.languages}
    pieces = Counter()
    for _ in range(30):
        draws = next(sampler)
        names = [draw.language for draw in draws]
        assert len(names) == len(set(names)) == sampler.meta_batch
        for draw in draws:
            rows = [*draw.support.tolist(), *draw.query.tolist()]
            size, need = sampler.sizes[draw.language], len(rows)
            assert (len(draw.support), len(draw.query)) == (sampler.support_size, sampler.query_size)
            assert len(set(rows)) == need
            assert 0 <= min(rows) <= max(rows) < size
            if pieces[draw.language] % (size // need) == 0:
                passes[draw.language].clear()
            pieces[draw.language] += 1
            passes[draw.language].update(rows)
            assert passes[draw.language].most_common(1)[0][1] == 1  # nothing twice in one pass


@given(samplers(), st.integers(0, 25))
@SETTINGS
def test_a_killed_run_goes_on_where_it_was(make, taken):
    """A resumed run sees the same sentences, wherever in a meta-batch it was stopped."""
    sampler, resumed = make(), make()
    for _ in range(taken):
        next(sampler)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for _ in range(20):
        assert all(map(same, next(sampler), next(resumed)))
    assert sampler.state_dict() == resumed.state_dict()


def test_every_language_and_every_sentence_gets_its_turn():
    """Every language and sentence is drawn, in an order that does not depend on length."""
    sampler = EpisodeSampler(dict.fromkeys("abcdef", 23), 3, 2, meta_batch=2, seed=0)
    languages, rows = Counter(), Counter()
    for _ in range(600):
        for draw in next(sampler):
            languages[draw.language] += 1
            rows.update(draw.support.tolist() + draw.query.tolist())
    assert min(languages.values()) > 0.8 * max(languages.values())
    assert len(rows) == 23
    assert min(rows.values()) > 0.8 * max(rows.values())


def test_seeds_differ():
    """Different seeds give different runs."""
    draws = [next(EpisodeSampler({"a": 100}, 10, 10, seed=seed))[0] for seed in (0, 0, 1)]
    assert same(draws[0], draws[1])
    assert not same(draws[0], draws[2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"support_size": 20, "query_size": 11},
            ValueError,
            r"support \(20\) and query \(11\) .*: b has 30",
        ),
        ({"meta_batch": 3}, ValueError, "a meta-batch of 3 languages needs as many, given 2: a, b"),
        ({"sizes": {}}, ValueError, "at least one language"),
        ({"support_size": 0}, ValueError, "support_size is 0"),
        ({"query_size": -1}, ValueError, "query_size is -1"),
        ({"meta_batch": 0}, ValueError, "meta_batch is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_wrong_use(options, error, message):
    """What cannot work is refused before training."""
    with pytest.raises(error, match=message):
        EpisodeSampler(**{"sizes": {"a": 40, "b": 30}, "support_size": 5, "query_size": 5, **options})
