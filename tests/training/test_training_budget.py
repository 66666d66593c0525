"""What a run spends: the same sentences, or the same updates, with and without episodes, on one axis of steps."""

import itertools

import pytest
from toy_run import toy_config, toy_data, toy_task

from fastmask.settings import ConfigError
from fastmask.training.batches import episode_sampler
from fastmask.training.config import Budget

META = {"meta": "fomaml", "inner_steps": 5, "support_sentences": 4, "query_sentences": 2}


def test_an_episode_counts_as_many_steps_as_the_sentences_that_it_draws(tmp_path) -> None:
    """Runs with and without episodes draw equally many sentences; a support sentence counts once, not K times."""
    config = toy_config(tmp_path, steps=100, batch_size=8, discover_at=0.6, **META)
    budget = Budget.of(config, 3)
    # 3 languages x (4 + 2) = 18 sentences; the 40 steps after the switch have 320.
    assert (budget.plain_steps, budget.episodes, budget.outer_steps) == (60, 17, 77)
    assert (budget.episode_sentences, budget.sentences) == (18, 60 * 8 + 17 * 18)
    assert budget.gradient_passes == 60 + 17 * 3 * 6
    assert [budget.step_after(e) for e in (1, 2, 16, 17)] == [62, 64, 97, 100]
    assert str(budget) == (
        "77 optimizer steps (60 plain, 17 episodes), 786 training examples drawn, 366 gradient passes"
    )
    plain = Budget.of(toy_config(tmp_path, steps=100, batch_size=8), 3)
    assert (plain.episodes, plain.outer_steps, plain.sentences, plain.gradient_passes) == (0, 100, 800, 100)
    assert str(plain) == "100 optimizer steps, 800 training examples drawn, 100 gradient passes"


def test_inner_steps_cost_passes_and_no_sentences(tmp_path) -> None:
    """The number of episodes does not depend on K, by which alone a support set is seen more often."""
    few, many = (Budget.of(toy_config(tmp_path, **{**META, "inner_steps": K, "steps": 90}), 3) for K in (1, 20))
    assert few.sentences == many.sentences
    assert few.episodes == many.episodes
    assert many.gradient_passes - few.gradient_passes == few.episodes * 3 * 19


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_the_sentences_of_an_episode_are_those_that_are_drawn(meta: str, tmp_path) -> None:
    """The budget counts the different sentences of an episode, which the sampler draws."""
    config = toy_config(tmp_path, steps=100, batch_size=8, meta_batch=2, **{**META, "meta": meta})
    task = toy_task()
    draws = next(episode_sampler(config, {n: task.training_examples(of["train"], n) for n, of in toy_data().items()}))
    different = {(draw.language, row) for draw in draws for row in [*draw.support.tolist(), *draw.query.tolist()]}
    assert Budget.of(config, 3).episode_sentences == len(different)


def test_reptile_draws_a_batch_for_each_inner_step_and_no_query(tmp_path) -> None:
    """Sentences that nobody sees are not paid for, and those of each of Reptile's K batches are."""
    config = toy_config(tmp_path, steps=100, batch_size=8, **{**META, "meta": "reptile", "meta_batch": 2})
    budget = Budget.of(config, 3)
    assert budget.episode_sentences == 2 * 5 * 4
    assert budget.gradient_passes == 50 + budget.episodes * 2 * 5


def test_one_episode_for_each_step_of_the_optimizer(tmp_path) -> None:
    """With `meta_budget` updates a run takes as many steps of the optimizer as one without meta-learning."""
    config = toy_config(tmp_path, steps=100, batch_size=8, meta_budget="updates", **META)
    budget = Budget.of(config, 3)
    assert (budget.plain_steps, budget.episodes, budget.outer_steps) == (50, 50, 100)
    assert budget.sentences == 50 * 8 + 50 * 18
    assert [budget.step_after(e) for e in range(1, 51)] == list(range(51, 101))
    long = toy_config(tmp_path, steps=4, batch_size=1, meta_budget="updates", **META)
    assert Budget.of(long, 3).episodes == 2, "an episode may see more than a step"


@pytest.mark.parametrize("meta_budget", ["sentences", "updates"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 30, 200])
@pytest.mark.parametrize("steps", [4, 11, 90])
def test_steps_rise_to_the_last_one(steps: int, batch_size: int, meta_budget: str, tmp_path) -> None:
    """The learning rate never jumps back, and a run does not end before its last episode; small ones share a step."""
    small = {"meta": "fomaml", "inner_steps": 1, "support_sentences": 1, "query_sentences": 1, "meta_batch": 1}
    config = toy_config(tmp_path, steps=steps, batch_size=batch_size, meta_budget=meta_budget, **small)
    budget = Budget.of(config, 3)
    after = [budget.step_after(e) for e in range(1, budget.episodes + 1)]
    assert all(a <= b for a, b in itertools.pairwise(after))
    assert after[0] >= budget.plain_steps
    assert after[-1] == steps
    assert steps not in after[:-1]
    if meta_budget == "sentences":
        assert steps * batch_size - 2 < budget.sentences <= steps * batch_size
    else:
        assert budget.outer_steps == steps


def test_what_does_not_fit(tmp_path) -> None:
    """A run is refused that would come to the switch and then have nothing to do, or too few languages."""
    with pytest.raises(ConfigError, match=r"an episode draws 18 sentences .* have only 6: expected more steps"):
        Budget.of(toy_config(tmp_path, steps=12, batch_size=1, **META), 3)
    with pytest.raises(ConfigError, match=r"meta_batch is 4 \(expected at most the number of languages, 3\)"):
        Budget.of(toy_config(tmp_path, meta_batch=4, **META), 3)
