"""Gradients of languages without their conflicts: by hand, and in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_run import assert_same_weights, toy_config, toy_data, toy_task

from fastmask.gradients import without_conflict
from fastmask.settings import ConfigError
from fastmask.training.batches import MixedBatches
from fastmask.training.engine import accelerator_for
from fastmask.training.loop import train


def generator():
    return np.random.default_rng(0)


def test_by_hand():
    """Two gradients that point against each other lose their projections; those that do not are added up."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    total, share = without_conflict([a, b], generator())
    # a . b = -1: a - (-1 / 2) b = (0.5, 0.5); b - (-1 / 1) a = (0, 1)
    torch.testing.assert_close(total, torch.tensor([0.5, 1.5]))
    assert share == 1
    total, share = without_conflict([a, torch.tensor([1.0, 2.0])], generator())
    torch.testing.assert_close(total, torch.tensor([2.0, 2.0]))
    assert share == 0
    assert without_conflict([a], generator())[1] == 0


def test_no_gradient_points_against_another_language():
    """With two languages, what is left of each is orthogonal to the other's or agrees with it, whatever the numbers."""
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = torch.randn(2, 9).double()
        total, _ = without_conflict([a, b], generator())
        kept = total - (b - min(0.0, float(a @ b / (a @ a))) * a)  # of a
        assert kept @ b >= -1e-12


def gradients_of(conflict, data=None):
    """`.grad` of the model after the first batch, without dropout."""
    task, config = toy_task(dropout=0.0), toy_config("unused", conflict=conflict)
    task.model.idle = torch.nn.Parameter(torch.ones(3))  # that no loss depends on
    examples = {name: task.training_examples(splits["train"], name) for name, splits in (data or toy_data()).items()}
    batches = MixedBatches(task, task.model, examples, config, accelerator_for("cpu", "no"))
    seen = batches.accumulate(0)
    return {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}, seen


def test_of_one_language_it_is_the_gradient():
    """Where there is nothing to be in conflict with, gradient and loss are those of a plain batch."""
    one = dict(list(toy_data().items())[:1])
    plain, seen = gradients_of("none", one)
    projected, other = gradients_of("pcgrad", one)
    for name, gradient in plain.items():
        torch.testing.assert_close(projected[name], gradient)
    assert other.losses == {"loss": pytest.approx(seen.losses["loss"]), "conflict": 0.0}
    assert other.words == seen.words


def test_without_conflicts_it_is_the_gradient_of_the_batch():
    """Gradients of a new model agree; their sum is then that of the mixed batch, where every word counts alike."""
    plain, seen = gradients_of("none")
    projected, other = gradients_of("pcgrad")
    assert projected.keys() == plain.keys()  # a gradient of zeros would let weight decay in
    assert other.losses == {"loss": pytest.approx(seen.losses["loss"]), "conflict": 0.0}
    for name, gradient in plain.items():
        torch.testing.assert_close(projected[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_run_resumes_exactly(tmp_path):
    """A run with it that is stopped ends with the weights of one that is not, and its metrics say how much conflict."""
    whole = train(toy_task(), toy_data(), toy_config(tmp_path / "whole", conflict="pcgrad"), progress=False)

    class StoppedError(Exception):
        pass

    def stop(step):
        if step == 8:
            raise StoppedError

    config = toy_config(tmp_path / "parts", conflict="pcgrad")
    with pytest.raises(StoppedError):
        train(toy_task(), toy_data(), config, on_step=stop, progress=False)
    config.resume = True
    parts = train(toy_task(), toy_data(), config, progress=False)
    assert_same_weights(whole.task.model, parts.task.model)
    assert max(record.get("conflict", 0.0) for record in whole.history) > 0


def test_not_in_episodes():
    """Episodes have a gradient of their own."""
    with pytest.raises(ConfigError, match=r"conflict is 'pcgrad' \(expected none in episodes of fomaml\)"):
        toy_config("unused", conflict="pcgrad", meta="fomaml")
