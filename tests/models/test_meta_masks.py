"""Masks keep their values while weights have none: on the meta device, after `to_empty`, in another dtype."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import batch, multiplied, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import fastmask as fm
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
IDS = [1, 0, -1, 2]


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def assert_right(model, plain):
    found = model.eval()(**batch(len(IDS)), language_ids=torch.tensor(IDS))[0]
    expected = multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


CONTEXTS = {
    "outside": nullcontext,
    "meta": lambda: torch.device("meta"),
    "init_empty_weights": init_empty_weights,
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def without_memory(config):
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def assigned(model, plain):
    model.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=True)


def emptied(model, plain):
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("load", [assigned, emptied])
@pytest.mark.parametrize("make", [on_meta, without_memory])
@pytest.mark.parametrize("context", CONTEXTS)
def test_attached_without_weights_and_loaded_later(make, load, context):
    """Large models are made without memory, attached to and then loaded, inside such a context or outside."""
    plain = tiny("llama", "causal")
    model = make(plain.config)
    with CONTEXTS[context]():
        fm.attach(model, subnetworks(plain))
    load(model, plain)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):  # those that no state dict holds
            ours.register_buffer(name, buffer, persistent=False)
    layers = [module for module in model.modules() if isinstance(module, AttachedLinear)]
    assert {layer.mask.device.type for layer in layers} == {"cpu"}
    assert_right(model, plain)
    fm.detach(model)
    assert torch.equal(model(**batch(2)).logits, plain(**batch(2)).logits)


@pytest.mark.parametrize("context", ["meta", "init_empty_weights"])
def test_attached_to_weights_inside_such_a_context(context):
    """The weights of a model that has some stay the same Parameters, and masks made inside have values."""
    model = tiny("llama", "causal")
    before = [id(parameter) for parameter in model.parameters()]
    with CONTEXTS[context]():
        fm.attach(model, subnetworks(model))
    assert [id(parameter) for parameter in model.parameters()] == before
    assert_right(model, tiny("llama", "causal"))


@pytest.mark.parametrize("kind", ["units", "weights"])
def test_attached_in_inference_mode(kind):
    """Masks made in inference mode can be trained with."""
    model, plain = tiny("bert"), tiny("bert")
    name = "encoder.layer.0.output.dense"
    keep = torch.rand(3, 24, 20) > 0.5
    with torch.inference_mode():
        subnets = subnetworks(model) if kind == "units" else fm.Subnetworks(LANGUAGES, weights={name: keep.clone()})
        fm.attach(model, subnets)
        model(**batch(3), language_ids=torch.tensor([0, 1, 2]))
    model(**batch(3), language_ids=torch.tensor([1, 1, 1]))[0].square().sum().backward()
    if kind == "units":
        multiplied(plain, subnets, batch(3), [1, 1, 1]).square().sum().backward()
    else:
        masked = copy.deepcopy(plain)
        masked.get_submodule(name).weight.data *= keep[1]
        masked(**batch(3))[0].square().sum().backward()
        masked.get_submodule(name).weight.grad *= keep[1]
        plain = masked
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if found.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "change",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float(), lambda m: m.to(torch.float16)],
    ids=["half", "bfloat16", "float", "to"],
)
def test_a_change_of_dtype_of_a_model(change):
    """Bits and indices are no numbers to be converted."""
    model = tiny("bert")
    fm.attach(model, subnetworks(model))
    before = {name: m.mask.to_dense() for name, m in model.named_modules() if isinstance(m, AttachedLinear)}
    change(model)
    assert all(torch.equal(model.get_submodule(name).mask.to_dense(), dense) for name, dense in before.items())
    plain = tiny("bert")
    plain.load_state_dict(model.double().state_dict())
    assert_right(model, plain)


def test_moving_only_what_is_on_another_device():
    """A model that is moved to where it is keeps its masks, and the tables made of them."""
    model = tiny("bert")
    layer = fm.attach(model, subnetworks(model)).encoder.layer[0].output.dense
    mask = layer.mask
    assert model.to("cpu").encoder.layer[0].output.dense.mask is mask
    assert isinstance(layer, nn.Linear)
