"""What a run spends: the same sentences with and without episodes, on one axis of steps."""

import itertools

import pytest
from toy_run import toy_config

from fastmask.settings import ConfigError
from fastmask.training.episodes import Budget

META = {"meta": "fomaml", "inner_steps": 5, "support_sentences": 4, "query_sentences": 2}


def test_an_episode_counts_as_many_steps_as_its_sentences_make(tmp_path) -> None:
    """If this fails, meta-learning sees more or fewer sentences than the methods it is compared with."""
    config = toy_config(tmp_path, steps=100, batch_size=8, discover_at=0.6, **META)
    budget = Budget.of(config, 3)
    # 3 languages x (5 x 4 + 2) = 66 sentences; the 40 steps after the switch have 320.
    assert (budget.plain_steps, budget.episodes, budget.episode_sentences) == (60, 4, 66)
    assert budget.sentences == 60 * 8 + 4 * 66
    assert budget.gradient_passes == 60 + 4 * 3 * 6
    assert [budget.step_after(e) for e in (1, 2, 3, 4)] == [70, 80, 90, 100]
    assert [budget.passes_after(e) for e in (0, 1, 4)] == [60, 78, 132]
    plain = Budget.of(toy_config(tmp_path, steps=100, batch_size=8), 3)
    assert (plain.episodes, plain.sentences, plain.gradient_passes) == (0, 800, 100)


def test_reptile_has_no_query_and_a_meta_batch_counts(tmp_path) -> None:
    """If this fails, sentences that nobody sees are paid for."""
    config = toy_config(tmp_path, steps=100, batch_size=8, **{**META, "meta": "reptile", "meta_batch": 2})
    budget = Budget.of(config, 3)
    assert budget.episode_sentences == 2 * 5 * 4
    assert budget.gradient_passes == 50 + budget.episodes * 2 * 5


@pytest.mark.parametrize("batch_size", [1, 3, 7, 30, 200])
@pytest.mark.parametrize("steps", [4, 11, 90])
def test_steps_rise_to_the_last_one(batch_size: int, steps: int, tmp_path) -> None:
    """If this fails, the learning rate jumps back, or a run ends before its last episode; small ones share a step."""
    small = {"meta": "fomaml", "inner_steps": 1, "support_sentences": 1, "query_sentences": 1, "meta_batch": 1}
    budget = Budget.of(toy_config(tmp_path, steps=steps, batch_size=batch_size, **small), 3)
    after = [budget.step_after(e) for e in range(1, budget.episodes + 1)]
    assert all(a <= b for a, b in itertools.pairwise(after))
    assert after[0] >= budget.plain_steps
    assert after[-1] == steps
    assert steps not in after[:-1]
    assert steps * batch_size - 2 < budget.sentences <= steps * batch_size


def test_what_does_not_fit(tmp_path) -> None:
    """If this fails, a run trains for hours up to the switch and then has nothing to do, or too few languages."""
    with pytest.raises(ConfigError, match=r"an episode sees 66 sentences .* have only 36: expected more steps"):
        Budget.of(toy_config(tmp_path, steps=12, batch_size=6, **META), 3)
    with pytest.raises(ConfigError, match=r"meta_batch is 4 \(expected at most the number of languages, 3\)"):
        Budget.of(toy_config(tmp_path, meta_batch=4, **META), 3)
