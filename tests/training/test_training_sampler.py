"""The sampler: unbiased shares, whole epochs, little padding, the same stream after a resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask.training.batches import MixedLanguageSampler


def lengths_of(*sizes: int, seed: int = 0) -> list[np.ndarray]:
    """Return log-normal sentence lengths, every language with its own scale."""
    random = np.random.default_rng(seed)
    return [np.clip(random.lognormal(2 + 0.4 * i, 0.6, n), 1, 90).astype(int) for i, n in enumerate(sizes)]


def test_equal_shares_are_equal_in_every_batch() -> None:
    """Of 8 languages in 32 sentences, each has 4 in every batch."""
    sampler = MixedLanguageSampler(lengths_of(*[50 + 30 * i for i in range(8)]), 32)
    for _ in range(200):
        rows, languages = next(sampler)
        assert np.bincount(languages, minlength=8).tolist() == [4] * 8
        assert (np.diff(languages) >= 0).all()
        assert (np.searchsorted(sampler._offsets, rows, side="right") - 1 == languages).all()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    st.integers(1, 40),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_counts_are_never_off_by_one(sizes: list[int], batch_size: int, temperature: float, seed: int) -> None:
    """Each language's count is its share rounded up or down, and batches are full."""
    sampler = MixedLanguageSampler(lengths_of(*sizes), batch_size, temperature, seed)
    expected = sampler.shares * batch_size
    for _ in range(20):
        rows, languages = next(sampler)
        counts = np.bincount(languages, minlength=len(sizes))
        assert len(rows) == batch_size
        assert (np.abs(counts - expected) < 1 + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_shares_are_unbiased(temperature: float) -> None:
    """In the long run each language is drawn as often as its temperature says."""
    sizes = np.array([900, 100, 37, 350])
    sampler = MixedLanguageSampler(lengths_of(*sizes), 10, temperature, seed=1)
    wanted = sizes**temperature / (sizes**temperature).sum()
    counts = sum(np.bincount(next(sampler)[1], minlength=4) for _ in range(3000))
    np.testing.assert_allclose(counts / counts.sum(), wanted, atol=0.004)


def test_every_sentence_once_per_epoch_in_another_order() -> None:
    """Each sentence is drawn once in each epoch, in another order."""
    sizes = [64, 23, 7]
    sampler = MixedLanguageSampler(lengths_of(*sizes), 9, seed=2)
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(64):
        for row, language in zip(*next(sampler), strict=True):
            drawn[int(language)].append(int(row) - int(sampler._offsets[language]))
    for language, size in enumerate(sizes):
        epochs = [drawn[language][i : i + size] for i in range(0, 192, size)]
        for epoch in epochs[: 192 // size]:
            assert sorted(epoch) == list(range(size))
        assert epochs[0] != epochs[1]


def test_length_buckets_save_padding_without_tying_languages_to_lengths() -> None:
    """Buckets save padding, and in each batch all languages are short or long together."""
    lengths = lengths_of(2000, 1500, 800, 3000)
    flat = np.concatenate(lengths)

    def run(bins: int) -> tuple[float, np.ndarray]:
        sampler = MixedLanguageSampler(lengths, 32, seed=3, bins=bins)
        padded, quantiles = 0, []
        for _ in range(400):
            rows, languages = next(sampler)
            padded += 32 * flat[rows].max()
            ranks = [np.mean(np.asarray(lengths[x]) < flat[r]) for r, x in zip(rows, languages, strict=True)]
            quantiles.append(np.bincount(languages, ranks, 4) / np.bincount(languages, minlength=4))
        return padded / 400, np.array(quantiles)

    padded, quantiles = run(10)
    padded_random, _ = run(1)
    assert padded < 0.72 * padded_random
    assert np.corrcoef(quantiles.T).min() > 0.9  # all languages are short or long together
    np.testing.assert_allclose(quantiles.mean(0), quantiles.mean(), atol=0.03)


def test_a_resumed_sampler_draws_the_same() -> None:
    """A resumed run sees the batches of an unbroken one."""
    lengths = lengths_of(40, 13, 5)
    unbroken = MixedLanguageSampler(lengths, 7, 0.5, seed=4)
    for _ in range(33):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = MixedLanguageSampler(lengths, 7, 0.5, seed=4)
    resumed.load_state_dict(state)
    for _ in range(40):
        for wanted, found in zip(next(unbroken), next(resumed), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_ranks_share_a_batch() -> None:
    """Processes share each batch out among them: different sentences, but the same mix of languages."""
    whole = MixedLanguageSampler(lengths_of(40, 40, 40, 40), 16, seed=5)
    parts = [MixedLanguageSampler(lengths_of(40, 40, 40, 40), 16, seed=5, rank=r, world_size=4) for r in range(4)]
    for _ in range(12):
        rows, _ = next(whole)
        shares = [next(part) for part in parts]
        assert sorted(np.concatenate([s[0] for s in shares])) == sorted(rows)
        assert all(s[1].tolist() == [0, 1, 2, 3] for s in shares)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"lengths": []}, "without")],
)
def test_wrong_settings(change: dict, message: str) -> None:
    """Wrong settings are refused at once."""
    with pytest.raises(ValueError, match=message):
        MixedLanguageSampler(**{"lengths": lengths_of(5), "batch_size": 4, **change})
