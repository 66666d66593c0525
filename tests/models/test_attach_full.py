"""`attach(forward="full")`: the plain model's outputs, and gradients that reach what each example's language owns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_attach import LANGUAGES, MIXED, subnetworks
from tiny_models import DECODERS, ENCODERS, batch, tiny, unit_masks

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models.attach import attached, is_attached
from fastmask.models.editing import set_subnetwork


def upstream_of(output):
    return torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5))


def masked_gradients(model, inputs, ids, multipliers):
    """Output of the plain model, and the sum over examples of its gradients times their languages' masks."""
    output = model(**inputs)[0]
    upstream, sums = upstream_of(output), {}
    for position, language in enumerate(ids):
        example = {name: value[position : position + 1] for name, value in inputs.items()}
        grads = torch.autograd.grad(
            (model(**example)[0] * upstream[position : position + 1]).sum(), list(model.parameters()), allow_unused=True
        )
        own = multipliers(language) if language >= 0 else {}
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            if grad is not None:
                sums[name] = sums.get(name, 0) + grad * own.get(name, 1)
    return output.detach(), sums


def assert_equals_masking_gradients(model, subnets, ids=MIXED, multipliers=None):
    inputs = batch(len(ids))
    multipliers = multipliers or (lambda language: unit_masks(model, subnets, language))
    expected, expected_grads = masked_gradients(model, inputs, ids, multipliers)
    fm.attach(model, subnets, forward="full")
    output = model(**inputs, language_ids=torch.tensor(ids))[0]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    (output * upstream_of(output)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected_grads:
            torch.testing.assert_close(
                parameter.grad, expected_grads[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("model_type", [*ENCODERS, *DECODERS])
def test_every_family(model_type, every_way):
    """Each family runs whole, and learns where its masks say."""
    model = tiny(model_type)
    assert_equals_masking_gradients(model, subnetworks(model))


@pytest.mark.parametrize("ids", [[1, 1, 1], [-1, -1], [2, 0, -1, 1, 0]], ids=["one", "full", "with_full"])
def test_batches(ids):
    """Any mix of languages, the full network among them, which learns everywhere."""
    model = tiny("bert")
    assert_equals_masking_gradients(model, subnetworks(model), ids)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_masks_over_weights(model_type, density):
    """Single weights learn, those of an empty language not at all."""
    model = tiny(model_type)
    generator = torch.Generator().manual_seed(2)
    names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    keep = {n: torch.rand(3, *model.get_submodule(n).weight.shape, generator=generator) < density for n in names}
    for own in keep.values():
        own[1] = False
    subnets = fm.Subnetworks(LANGUAGES, weights=keep)
    assert_equals_masking_gradients(
        model, subnets, multipliers=lambda language: {f"{n}.weight": keep[n][language].double() for n in names}
    )


def test_uneven_and_dead_layers():
    """A layer that a language owns nothing of runs whole, and learns nothing from it."""
    model = tiny("bert")
    subnets = subnetworks(model)
    heads, neurons = subnets.heads.clone(), subnets.neurons.clone()
    heads[0, 0], neurons[0, 0], heads[1], neurons[1] = False, False, True, True
    assert_equals_masking_gradients(model, fm.Subnetworks(LANGUAGES, heads, neurons))


@pytest.mark.parametrize("model_type", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph(model_type):
    """A compiled model is one graph with the gradients of an eager one, whatever languages a batch has."""
    model = tiny(model_type, num_hidden_layers=1)
    fm.attach(model, subnetworks(model), forward="full")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (MIXED, MIXED[::-1]):
        inputs, found = {**batch(7), "language_ids": torch.tensor(ids)}, []
        for each in (model, compiled):
            model.zero_grad()
            output = each(**inputs)[0]
            (output * upstream_of(output)).sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"": output.detach()})
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected)


def test_a_pass_without_gradients_needs_no_language():
    """Evaluation is that of the plain model; a pass that will be differentiated must say what may learn."""
    model, inputs = tiny("bert"), batch(3)
    expected = model(**inputs)[0]
    fm.attach(model, subnetworks(model), forward="full")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(**inputs)[0], expected)
            torch.testing.assert_close(model(**inputs, language_ids=torch.tensor([0, 1, 2]))[0], expected)
    with torch.no_grad():
        model.encoder.layer[0].output.dense(torch.randn(1, 2, 20).double())  # around the model's own forward
    with pytest.raises(ValueError, match="no language was given"):
        model(**inputs)
    with torch.no_grad(), pytest.raises(ValueError, match="out of range"):
        model(**inputs, language_ids=torch.tensor([0, 1, 3]))


def test_generation_makes_a_cache_as_ever():
    """A decoder continues its cache as the plain one does."""
    model, inputs = tiny("llama", "causal"), batch(2)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    fm.attach(model, subnetworks(model), forward="full")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    with torch.no_grad():
        assert model(**inputs).past_key_values is not None


def test_detach_copies_and_pickles():
    """The plain model comes back, and copies and pickles run as the attached one."""
    model, inputs = tiny("bert"), batch(3)
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    fm.attach(model, subnetworks(model), forward="full")
    assert is_attached(model)
    assert list(model.state_dict()) == list(state)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        grads = []
        for each in (model, twin):
            each.zero_grad()
            each(**inputs, language_ids=torch.tensor([0, 2, 1]))[0].square().sum().backward()
            grads.append([p.grad for p in each.parameters() if p.grad is not None])
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            twin(**inputs)
    fm.detach(model)
    assert type(model.encoder.layer[0].output.dense) is torch.nn.Linear
    torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0])


def test_language_and_set_subnetwork():
    """One language for the whole batch; its new subnetwork learns from the next pass on."""
    model, inputs = tiny("bert"), batch(2)
    subnets = subnetworks(model)
    fm.attach(model, subnets, forward="full")
    neurons = torch.zeros(2, 20, dtype=torch.bool)
    neurons[:, 3] = True
    set_subnetwork(model, "bb", neurons=neurons)
    with fm.language(model, "bb"):
        model(**inputs)[0].square().sum().backward()
    grad = model.encoder.layer[1].intermediate.dense.weight.grad
    assert grad[3].all()
    assert not grad[[i for i in range(20) if i != 3]].any()
    assert attached(model).subnets.neurons[1].sum() == 2


def test_checkpointing():
    """A layer that is recomputed in the backward pass learns what it would have without."""
    found = []
    for checkpointing in (False, True):
        model, inputs = tiny("bert").train(), batch(3)
        fm.attach(model, subnetworks(model), forward="full")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, language_ids=torch.tensor([0, 2, 1]))[0].square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_an_episode():
    """Inner steps of meta-learning through the full network move what the language owns, and are taken back."""
    model, inputs = tiny("bert"), batch(2)
    subnets = subnetworks(model)
    fm.attach(model, subnets, forward="full")
    before, owned = copy.deepcopy(model.state_dict()), unit_masks(model, subnets, 1)
    learner = fm.MetaLearner(model, lambda b: model(**b)[0].square().mean(), inner_learning_rate=0.1)
    with learner.adapt("bb", [inputs]):
        for name, keep in owned.items():
            moved = model.get_parameter(name) != before[name]
            assert moved.any() or name.endswith("key.bias")  # whose true gradient is 0
            assert not moved[~keep.bool().expand_as(moved)].any()
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_freeze_unmasked():
    """What no mask touches stays as it is, under a task head too; a model without masks is refused."""
    model = tiny("bert", "tokens")
    with pytest.raises(ValueError, match="nothing in this BertForTokenClassification has a mask"):
        fm.freeze_unmasked(model)
    fm.attach(model, subnetworks(model), forward="full")
    assert fm.freeze_unmasked(model) is model
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    expected = {f"bert.encoder.layer.{i}.{n}.{kind}" for i in (0, 1) for n in names for kind in ("weight", "bias")}
    expected |= {
        f"bert.encoder.layer.{i}.{n}.weight" for i in (0, 1) for n in ("attention.output.dense", "output.dense")
    }
    assert left == expected
    before = copy.deepcopy(model.state_dict())
    optimizer = fm.LiveAdamW([p for p in model.parameters() if p.requires_grad], model=model)
    with fm.language(model, "aa"):
        model(**batch(2)).logits.sum().backward()
    optimizer.step()
    owned = unit_masks(model, attached(model).subnets, 0)
    for name, now in model.state_dict().items():
        moved = now != before[name]
        assert not moved[~owned[name].bool().expand_as(moved)].any() if name in owned else not moved.any(), name


def test_what_scores_units_is_refused():
    """Scores of units would be of a forward pass that leaves units out, which this one does not."""
    model = tiny("bert")
    fm.attach(model, subnetworks(model), forward="full")
    with pytest.raises(ValueError, match='forward="masked"'):
        fm.DynamicSubnetworks(model)
    with pytest.raises(ValueError, match='forward="masked"'):
        importance(model, [batch(2)], lambda b: model(**b)[0].sum((1, 2)), "aa")


def test_an_unknown_forward():
    """A misspelt mode is named before anything changes."""
    model = tiny("bert")
    with pytest.raises(KeyError, match="unknown forward 'dense'"):
        fm.attach(model, subnetworks(model), forward="dense")
    assert not is_attached(model)
