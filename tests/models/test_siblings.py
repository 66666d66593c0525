"""Projections that share their input are computed together, and handed out only for what they were computed for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

import fastmask as fm
from fastmask.models import layers as layers_module
from fastmask.models.routing import Route

IDS = torch.tensor([0, 1, 0])


@pytest.fixture
def model():
    model = tiny("bert")
    return fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b"], 0.5, seed=0))


@pytest.fixture
def projections(model):
    attention = model.encoder.layer[0].attention.self
    return attention.query, attention.key, attention.value


def route(model):
    return model._fastmask.router.using(model._fastmask.router.resolve(IDS))


def count_computations(monkeypatch):
    calls = []
    run = layers_module.run

    def counting(layers, *args):
        calls.extend([1] * (len(layers.masks) > 1))
        return run(layers, *args)

    monkeypatch.setattr(layers_module, "run", counting)
    return calls


@pytest.mark.parametrize(("model_type", "groups"), [("bert", 1), ("distilbert", 1), ("llama", 2), ("qwen3", 2)])
def test_one_computation_for_each_group(model_type, groups, monkeypatch):
    """Q, K and V (gate and up) are computed together, once."""
    model = tiny(model_type)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b"], 0.5, seed=0, units="both"))
    calls, routes, of = count_computations(monkeypatch), [], Route.of
    monkeypatch.setattr(Route, "of", lambda *args: routes.append(of(*args)) or routes[-1])
    model(input_ids=torch.randint(0, 50, (3, 5)), language_ids=IDS)
    assert len(calls) == groups * 2  # layers
    assert [route.waiting for route in routes] == [{}], "activations are kept"


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_inference_mode(model_type):
    """Tensors of inference mode, which keep no version, are accepted."""
    model = tiny(model_type)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b"], 0.5, seed=0, units="both"))
    model.eval()
    words = torch.randint(0, 50, (3, 5))
    with torch.inference_mode():
        found = model(input_ids=words, language_ids=IDS)[0]
    assert torch.equal(found, model(input_ids=words, language_ids=IDS)[0])


def test_another_input_is_computed_afresh(model, projections):
    """The key of one input is never handed out for another."""
    query, key, _ = projections
    x, other = torch.randn(3, 5, 24).double(), torch.randn(3, 5, 24).double()
    with route(model):
        query(x)
        found = key(other)
    with route(model):
        assert torch.equal(found, key(other))


def test_an_input_changed_in_place_is_computed_afresh(model, projections):
    """A key computed before its input changed is not handed out."""
    query, key, _ = projections
    x = torch.randn(3, 5, 24).double()
    with route(model):
        query(x)
        before = key(x)
        query(x)
        x.mul_(2)
        assert not torch.equal(key(x), before)


def test_another_route_or_gradient_mode_is_computed_afresh(model, projections):
    """A key without a graph, or of another batch's languages, is not handed out."""
    query, key, _ = projections
    x = torch.randn(3, 5, 24).double()
    with route(model), torch.no_grad():
        query(x)
    with route(model):
        assert key(x).requires_grad


def test_calling_one_alone_twice(model, projections):
    """A layer that is called without its siblings never hands out an old output."""
    query, _, _ = projections
    x = torch.randn(3, 5, 24).double()
    with route(model):
        assert torch.equal(query(x), query(x))
