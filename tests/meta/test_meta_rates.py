"""Inner learning rates by group, and everything a caller can get wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmask as fm
from fastmask.meta import Task
from fastmask.meta.fast_weights import rates_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.encoder_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder_norm(self.encoder(x))).square().mean()


def by_name(model, rates):
    found = rates_of(model, rates)
    return {name: found.get(parameter, 0.0) for name, parameter in model.named_parameters()}


def test_the_longest_prefix_that_ends_at_a_dot_counts():
    """`encoder` does not take `encoder_norm` along, and the order of groups does not matter."""
    rates = by_name(Model(), {"": 1.0, "encoder.1.weight": 4.0, "encoder": 2.0, "head": 3.0})
    assert rates["encoder.0.weight"] == rates["encoder.1.bias"] == 2.0
    assert rates["encoder.1.weight"] == 4.0
    assert rates["encoder_norm.weight"] == 1.0
    assert rates["head.bias"] == 3.0


def test_a_rate_of_zero_leaves_a_group_out_of_the_inner_loop_but_not_of_the_outer():
    """An encoder with rate 0 is not adapted, but gets its meta-gradient."""
    model = Model()
    learner = fm.MetaLearner(model, model, inner_learning_rate={"head": 0.1, "": 0})
    before = model.encoder[0].weight.detach().clone()
    with learner.adapt(None, [torch.randn(3, 4)]):
        assert torch.equal(model.encoder[0].weight, before)
    learner.episode([Task(None, [torch.randn(3, 4)], torch.randn(3, 4))])
    assert model.encoder[0].weight.grad.any()


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ({"encoder": 0.1, "haed": 0.1}, KeyError, "did you mean 'head'"),
        ({"encoder": 0.1}, ValueError, "'encoder_norm.weight' has no inner learning rate"),
        ({"": -0.1}, ValueError, "expected a finite number"),
        (float("nan"), ValueError, "expected a finite number"),
        (0.0, ValueError, "no parameter would be adapted"),
        ([{"params": [], "lr": 0.1}], ValueError, "expected a finite number"),
    ],
)
def test_wrong_rates(rates, error, message):
    """A misspelt group is refused."""
    model = Model()
    with pytest.raises(error, match=message):
        fm.MetaLearner(model, model, inner_learning_rate=rates)


def test_wrong_settings():
    """A misspelt algorithm or a number out of range is refused at once."""
    model = Model()
    with pytest.raises(ValueError, match="expected one of fomaml, reptile"):
        fm.MetaLearner(model, model, algorithm="maml")
    with pytest.raises(ValueError, match="inner steps is 0"):
        fm.MetaLearner(model, model, inner_steps=0)
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)  # a real one needs processes
    with pytest.raises(ValueError, match="give the module inside"):
        fm.MetaLearner(wrapped, model)


def test_wrong_tasks_are_refused_before_anything_runs():
    """A wrong task of the last language is refused before work on the first."""
    calls = []
    model = Model()
    learner = fm.MetaLearner(model, lambda x: calls.append(x) or model(x))
    good = Task(None, [torch.randn(3, 4)], torch.randn(3, 4))
    with pytest.raises(ValueError, match="no support batch"):
        learner.episode([good, Task("aa", [], torch.randn(3, 4))])
    with pytest.raises(ValueError, match="FOMAML needs a query"):
        learner.episode([good, Task("aa", [torch.randn(3, 4)])])
    with pytest.raises(TypeError, match="a list of batches, given Tensor"):
        learner.episode([good, Task("aa", torch.randn(3, 4), torch.randn(3, 4))])
    with pytest.raises(ValueError, match="at least one task"):
        learner.episode([])
    assert not calls
    learner = fm.MetaLearner(model, lambda x: model.head(x))
    with pytest.raises(ValueError, match=r"a scalar tensor, given shape \(3, 2\)"):
        learner.episode([good])


def test_unknown_languages():
    """A language without a subnetwork is refused."""
    layer = fm.MaskedLinear(4, 4, fm.Mask.rows(torch.ones(2, 4, dtype=torch.bool), 4))
    learner = fm.MetaLearner(layer, lambda x: layer(x, torch.zeros(len(x), dtype=torch.int64)).sum())
    batch = torch.randn(3, 4)
    with pytest.raises(ValueError, match="no subnetworks with names"):
        learner.episode([Task("aa", [batch], batch)])
    with pytest.raises(ValueError, match="language id 2 is out of range: expected 0 to 1"):
        learner.episode([Task(2, [batch], batch)])


def test_unknown_names():
    """A misspelt language is answered with the nearest name."""
    from tests.models.tiny_models import tiny

    model = tiny("bert")
    fm.attach(model, fm.Subnetworks.random(model.config, ["en", "de"], 0.5, seed=0))
    learner = fm.MetaLearner(model, lambda x: model(x)[0].sum())
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(KeyError, match="unknown language 'dee'; did you mean 'de'"):
        learner.episode([Task("dee", [ids], ids)])
