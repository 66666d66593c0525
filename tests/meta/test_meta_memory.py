"""What an episode allocates, counted by torch's own allocator."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastmask as fm
from fastmask.meta import Task
from fastmask.meta.fast_weights import FastWeights
from tests.models.tiny_models import tiny


def peak_bytes(run):
    """Most bytes that were allocated at once during `run`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(torch.tensor([size for _, size in changes]).cumsum(0).max())


def test_peak_bytes_counts():
    """The measure that the other tests here use is right."""

    def run():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + 1

    assert 8000 <= peak_bytes(run) <= 8200


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_peak_memory_grows_neither_with_steps_nor_with_languages(algorithm):
    """Nothing of an inner step or of a language is kept to the end."""
    model = tiny("bert", "tokens").float()
    languages = ["aa", "bb", "cc", "dd", "ee", "ff"]
    subnets = fm.Subnetworks.random(model.config, languages, 0.5, seed=3, units="both")
    subnets.heads[:], subnets.neurons[:] = subnets.heads[:1].clone(), subnets.neurons[:1].clone()  # all alike in size
    fm.attach(model, subnets)

    def loss(ids):
        return model(ids).logits.square().mean()

    ids = torch.arange(40).reshape(4, 10)

    def episode(steps, n_languages):
        learner = fm.MetaLearner(model, loss, algorithm=algorithm, inner_steps=steps)
        tasks = [Task(name, [ids], ids) for name in languages[:n_languages]]
        return lambda: learner.episode(tasks)

    episode(1, 6)()  # from now on `.grad`, scratch memory and the masks' layouts are there
    least = peak_bytes(episode(2, 1))  # the copy is made in the first step and there in the second
    assert peak_bytes(episode(12, 1)) <= least + 1024  # 12 losses and a list of them
    assert peak_bytes(episode(2, 6)) <= least + 1024


def copied(fast):
    """Bytes of what was copied of dense parameters."""
    return sum(backup.live.nbytes for backup in fast._backups.values())


def test_gradients_of_the_whole_model_never_exist_together():
    """Each inner gradient is used as it comes, so they never take as much memory as the model."""
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(12)]
    model = torch.nn.Sequential(*layers)
    size = 256 * 256 * 4

    def loss(x):
        return model(x).mean()

    x = torch.randn(2, 256)
    with FastWeights(model, dict.fromkeys(model.parameters(), 0.1), -1) as fast:
        fast.step(lambda: loss(x))  # all is copied
        assert copied(fast) == 12 * size
        assert peak_bytes(lambda: fast.step(lambda: loss(x))) < 3 * size


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (fm.Mask.rows(torch.arange(64)[None] < 16, 64), 0.25),
        (fm.Mask.columns(torch.arange(64)[None] % 4 == 0, 64), 0.25),
        (fm.Mask.blocks((torch.arange(16) % 4 == 0).reshape(1, 4, 4), (16, 16)), 0.25),
        (fm.Mask.weights((torch.arange(64 * 64) % 8 == 0).reshape(1, 64, 64)), 0.125),
    ],
    ids=lambda value: value.kind if isinstance(value, fm.Mask) else "",
)
def test_only_live_slices_are_copied(mask, share):
    """Fast weights take memory for what a language owns, not for the model."""
    layer = fm.MaskedLinear(64, 64, mask, bias=False)
    ids = torch.zeros(2, dtype=torch.int64)
    x = torch.randn(2, 64)
    for language, expected in ((0, share), (-1, 1.0)):
        with FastWeights(layer, {layer.weight: 0.1}, language) as fast:
            assert copied(fast) == 0
            fast.step(lambda: layer(x, ids + language).square().mean())  # noqa: B023
            assert copied(fast) == expected * 64 * 64 * 4
