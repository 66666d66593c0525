"""`attach` takes the model itself, and linear layers that it really calls; anything else is refused and left alone."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.utils.parametrizations
from tiny_models import batch, multiplied, tiny
from torch import nn
from torch.nn.utils import prune

import fastmask as fm

LANGUAGES = ["aa", "bb"]
IDS = torch.tensor([1, 0])
QUERY = "encoder.layer.0.attention.self.query"
ACTIVATION = "encoder.layer.0.intermediate.intermediate_act_fn"


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def weight_masks(*names, shape=(8, 8)):
    return fm.Subnetworks(LANGUAGES, weights={name: torch.rand(2, *shape) > 0.5 for name in names})


def assert_refused(model, subnets, message):
    """The error has the message, and the model is as it was, down to its class and modules."""
    modules, kind, attributes = dict(model.named_modules()), type(model), {**vars(model)}
    with pytest.raises(ValueError, match=message):
        fm.attach(model, subnets)
    assert dict(model.named_modules()) == modules
    assert type(model) is kind
    assert vars(model) == attributes


class Quantised(torch.Tensor):
    """A weight of another library, as torchao's: a subclass of Tensor."""


class Held(nn.Linear):
    """A subclass, which may do anything with its weight."""


def nothing(*_):
    return None


def with_weight(module, weight):
    module._parameters["weight"] = weight


CHANGES = {
    "forward hook": (lambda m: m.register_forward_hook(nothing), "it has forward hooks. Remove them"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(nothing), "it has forward pre hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(nothing), "it has backward hooks"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(nothing), "it has backward pre hooks"),
    "state dict hook": (lambda m: m.register_state_dict_post_hook(nothing), "it has state dict hooks"),
    "parametrization": (torch.nn.utils.parametrizations.weight_norm, "ParametrizedLinear: remove the parametrization"),
    "weight_norm": (torch.nn.utils.weight_norm, "its parameters are bias, weight_g, weight_v"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), r"parameters are bias, weight_orig .*prune\.remove"),
    "own forward": (lambda m: setattr(m, "forward", lambda x: x), "its forward has been replaced"),
    "child module": (lambda m: m.add_module("lora", nn.Linear(2, 2)), "it also holds lora"),
    "subclass": (lambda m: setattr(m, "__class__", Held), r"found test_refused_models\.Held: quantised layers"),
    "foreign weight": (
        lambda m: with_weight(m, nn.Parameter(m.weight.detach().as_subclass(Quantised), requires_grad=False)),
        r"its weight is test_refused_models\.Quantised of torch\.float64, and quantised",
    ),
    "integer weight": (
        lambda m: with_weight(m, nn.Parameter(m.weight.detach().to(torch.int8), requires_grad=False)),
        r"its weight is torch\.nn\.parameter\.Parameter of torch\.int8",
    ),
    "weight of another shape": (
        lambda m: with_weight(m, nn.Parameter(torch.zeros(20, 24))),
        r"its weight has shape \(20, 24\), expected \(24, 24\)",
    ),
    "flat weight": (lambda m: with_weight(m, nn.Parameter(torch.zeros(24))), "its weight is sharded"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_more_than_a_linear_layer(change):
    """A module with something of others hung on it is refused, because attach would lose it or mask something else."""
    model = tiny("bert")
    change, message = CHANGES[change]
    change(model.get_submodule(QUERY))
    assert_refused(model, subnetworks(model), f"{QUERY}.*{message}")


def test_pruning_that_was_made_permanent():
    """What the message advises works."""
    model = tiny("bert")
    query = model.get_submodule(QUERY)
    prune.l1_unstructured(query, "weight", 0.5)
    prune.remove(query, "weight")
    expected = multiplied(model, subnetworks(model), batch(2), IDS.tolist())
    found = fm.attach(model, subnetworks(model))(**batch(2), language_ids=IDS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_activation_with_a_hook():
    """A hook on an activation that the next layer would take over is refused."""
    model = tiny("bert")
    model.get_submodule(ACTIVATION).register_forward_hook(nothing)
    assert_refused(model, subnetworks(model), "intermediate_act_fn.*it has forward hooks")
    heads = fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3)
    fm.attach(model, heads)(**batch(2), language_ids=IDS)  # nothing takes it over


def test_hooks_elsewhere_are_called_as_before():
    """Hooks of the model, of its blocks and of its parameters are none of attach's business."""
    model, called = tiny("bert"), []
    layer = model.encoder.layer[0]
    model.register_forward_pre_hook(lambda *_: called.append("model"))
    layer.register_forward_hook(lambda *_: called.append("layer"))
    layer.output.dense.weight.register_hook(lambda _: called.append("weight"))
    fm.attach(model, subnetworks(model))(**batch(2), language_ids=IDS)[0].sum().backward()
    assert called == ["model", "layer", "weight"]


def test_a_module_under_two_names():
    """A module that is called under two names is refused."""
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert_refused(model, weight_masks("0"), "cannot mask '2': it is the same module as '0'")
    assert_refused(model, weight_masks("2"), "cannot mask '2': it is the same module as '0'")


def test_tied_weights_are_not_a_shared_module():
    """An output layer that shares its weight with an embedding is a module of its own."""
    model = tiny("llama", "causal", tie_word_embeddings=True)
    plain, masks = copy.deepcopy(model), weight_masks("lm_head", shape=(50, 24))
    fm.attach(model, masks)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with fm.language(model, "bb"):
        found = model(**batch(2)).logits
    hidden = plain.model(**batch(2))[0]
    torch.testing.assert_close(found, hidden @ (plain.lm_head.weight * masks.weights["lm_head"][1]).T)
    fm.detach(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_layers_whose_weights_are_read_without_a_call():
    """Layers whose weights torch's fast path reads without calling them are refused."""
    model = nn.Sequential(OrderedDict(encoder=nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)))
    assert_refused(model, weight_masks("encoder.linear1"), r"encoder\.linear1.*without calling them")
    assert_refused(model, weight_masks("encoder.self_attn.out_proj"), "NonDynamicallyQuantizableLinear")
    decoder = nn.TransformerDecoderLayer(8, 2, 8, batch_first=True).eval()  # has no such path
    fm.attach(decoder, weight_masks("linear1"))


WRAPPERS = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), r"given OptimizedModule of torch\.compile: attach first"),
    "DataParallel": (lambda m: nn.DataParallel(m), "given DataParallel: attach first"),
    "PEFT": (lambda m: type("PeftModel", (nn.Module,), {})(), "PEFT: attach to the model inside"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_instead_of_the_model(wrapper):
    """A wrapped model is refused, and the message says to attach first."""
    wrap, message = WRAPPERS[wrapper]
    model = tiny("bert")
    with pytest.raises(ValueError, match=message):
        fm.attach(wrap(model), subnetworks(model))
    assert type(model.get_submodule(QUERY)) is nn.Linear


def test_a_forward_that_was_replaced():
    """`Accelerator.prepare(bf16)` puts a forward on the instance, which is called, and needs to know no languages."""
    model = tiny("bert")
    expected, called = multiplied(model, subnetworks(model), batch(2), IDS.tolist()), []
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: called.append(kwargs) or inner(*args, **kwargs))
    fm.attach(model, subnetworks(model))
    torch.testing.assert_close(model(**batch(2), language_ids=IDS)[0], expected, rtol=1e-9, atol=1e-9)
    assert [sorted(kwargs) for kwargs in called] == [["attention_mask", "input_ids", "use_cache"]]


def test_a_forward_that_hooks_left_behind():
    """Hooks that are taken off leave the model's own forward on the instance: it hides nothing that matters."""
    model = tiny("bert")
    expected = multiplied(model, subnetworks(model), batch(2), IDS.tolist())
    model.forward = model.forward
    query = model.get_submodule(QUERY)
    query.forward = query.forward
    fm.attach(model, subnetworks(model))
    torch.testing.assert_close(model(**batch(2), language_ids=IDS)[0], expected, rtol=1e-9, atol=1e-9)


def test_what_is_no_linear_layer():
    """A module that exists is told apart from a name that does not."""
    model = tiny("bert")
    assert_refused(model, weight_masks("encoder"), r"expected a plain nn.Linear at 'encoder', found .*BertEncoder")


def test_a_model_made_from_the_class_of_an_attached_one():
    """`type(model)(config)` is a plain model until subnetworks are attached to it."""
    first = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
    model = type(first)(first.config).double().eval()
    model.load_state_dict(first.state_dict())
    assert torch.equal(model(**batch(2))[0], tiny("bert")(**batch(2))[0])
    fm.attach(model, subnetworks(model))
    assert type(model) is type(first)
    assert torch.equal(model(**batch(2), language_ids=IDS)[0], first(**batch(2), language_ids=IDS)[0])
