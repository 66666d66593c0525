"""What other libraries do to masked layers after `attach`: it works, or the next forward pass names the layer."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from tiny_models import batch, multiplied, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import fastmask as fm
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
IDS = [1, 0, -1, 2]
QUERY, DOWN = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"


class Adapter(nn.Module):
    """Adds to what a layer computes, as PEFT's do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x) + 1


class Quantised(torch.Tensor):
    """A weight of another library."""


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def run(model):
    return model(**batch(len(IDS)), language_ids=torch.tensor(IDS))[0]


@pytest.fixture
def model():
    model = tiny("bert")
    return fm.attach(model, subnetworks(model))


@pytest.fixture
def expected():
    model = tiny("bert")
    return multiplied(model, subnetworks(model), batch(len(IDS)), IDS)


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def assert_right(model, expected):
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)


def assert_refused(model, message):
    """Every forward pass is refused, whoever asks and however often."""
    with fm.language(model, "aa"), pytest.raises(ValueError, match=message):
        model(**batch(2))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run(model)


@pytest.mark.parametrize("name", [QUERY, DOWN])
def test_a_layer_that_was_wrapped(model, expected, name):
    """An adapter on a packed layer is refused; taken off, the model runs as before."""
    layer = model.get_submodule(name)
    put(model, name, Adapter(layer))
    assert_refused(model, f"masked layer '{re.escape(name)}' was wrapped in {__name__}.Adapter .*merge_and_unload")
    with pytest.raises(
        ValueError, match=f"cannot detach: the masked layer '{re.escape(name)}' is wrapped in .*Adapter"
    ):
        fm.detach(model)
    assert type(model.get_submodule(name)) is Adapter
    assert type(model.encoder.layer[0].output.dense) is AttachedLinear, "detached in part"
    put(model, name, layer)
    assert_right(model, expected)
    fm.detach(model)
    assert torch.equal(model(**batch(2))[0], tiny("bert")(**batch(2))[0])


def test_an_adapter_that_was_merged_into_the_weight(model):
    """`merge_and_unload` of PEFT changes the weight behind the masks and puts the layer back."""
    added = torch.randn(24, 24).double()
    with torch.no_grad():
        model.get_submodule(QUERY).weight += added
    plain = tiny("bert")
    with torch.no_grad():
        plain.get_submodule(QUERY).weight += added
    assert_right(model, multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS))


@pytest.mark.parametrize("name", [QUERY, DOWN])
def test_a_layer_that_was_replaced(model, name):
    """A replaced layer, as by quantisation or resizing, is noticed; detach leaves the new layer alone."""
    put(model, name, new := nn.Linear(*reversed(model.get_submodule(name).weight.shape)).double())
    assert_refused(
        model, f"masked layer '{re.escape(name)}' was replaced by torch.nn.modules.linear.Linear after attach"
    )
    fm.detach(model)
    assert model.get_submodule(name) is new
    assert not any(isinstance(module, AttachedLinear) for module in model.modules())


def test_a_layer_that_was_removed(model):
    """A missing layer is noticed."""
    del model.encoder.layer[0].attention.self.query
    assert_refused(model, f"masked layer '{QUERY}' was removed after attach")


def test_a_block_that_was_replaced(model):
    """A replaced block is noticed, although its masked layers went with it."""
    model.encoder = tiny("bert").encoder
    assert_refused(model, f"masked layer '{QUERY}' was replaced by torch.nn.modules.linear.Linear")


def test_blocks_that_were_cut_off(model):
    """A model without its last layers runs the masks of those it has."""
    del model.encoder.layer[1]
    plain = tiny("bert")
    subnets = subnetworks(plain)
    del plain.encoder.layer[1]
    subnets = fm.Subnetworks(LANGUAGES, subnets.heads[:, :1], subnets.neurons[:, :1])
    for _ in range(2):
        assert_right(model, multiplied(plain, subnets, batch(len(IDS)), IDS))


@pytest.mark.parametrize("where", ["encoder", "encoder.layer.0", QUERY, DOWN])
def test_wrappers_that_call_a_layer_as_it_was(model, expected, where):
    """A wrapper of torch's own around a block or a layer changes nothing."""
    put(model, where, checkpoint_wrapper(model.get_submodule(where)))
    for _ in range(2):
        assert_right(model, expected)
    copied = copy.deepcopy(model)
    put(copied, "encoder", tiny("bert").encoder)
    assert_refused(copied, "was replaced by")


def test_detach_below_a_wrapped_block(model):
    """Masked layers are taken out wherever they stand, and the wrapper stays."""
    model.encoder = torch.compile(model.encoder, backend="eager")
    wrapper = model.encoder
    fm.detach(model)
    assert model.encoder is wrapper
    assert not any(isinstance(module, AttachedLinear) for module in model.modules())
    assert torch.equal(
        wrapper._orig_mod.layer[0].output.dense.weight, tiny("bert").encoder.layer[0].output.dense.weight
    )


def test_a_compiled_model_is_checked_while_it_is_traced():
    """What was wrapped before or after the first graph was made is found when the next one is."""
    torch._dynamo.reset()
    model = tiny("bert").float()
    fm.attach(model, subnetworks(model))
    compiled = torch.compile(model, backend="eager")
    with fm.language(model, "aa"):
        compiled(**batch(2))
        put(model, QUERY, Adapter(model.get_submodule(QUERY)))
        with pytest.raises(
            Exception, match=f"ValueError: the masked layer '{QUERY}' was wrapped in {__name__}.Adapter"
        ):
            compiled(**batch(2))
    torch._dynamo.reset()


def test_a_weight_of_another_library(model):
    """A weight that was swapped in place (torchao) is noticed."""
    layer = model.get_submodule(DOWN)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert_refused(
        model,
        f"weight of the masked layer '{DOWN}' became {__name__}.Quantised after attach, and quantised",
    )
    fm.detach(model)  # the quantised model, plain
    assert type(model.get_submodule(DOWN)) is nn.Linear
    assert type(model.get_submodule(DOWN).weight.data) is Quantised


@pytest.mark.parametrize("name", [QUERY, DOWN])
def test_a_parametrization_applies_behind_the_mask(model, name):
    """A parametrized weight is what is masked; detach does not throw the parametrization away."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    plain = tiny("bert")
    with torch.no_grad():
        plain.get_submodule(name).weight.mul_(2)
    assert_right(model, multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS))
    with pytest.raises(ValueError, match=f"cannot detach: '{name}' has become .*Parametrized.*Remove parametrizations"):
        fm.detach(model)
    parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    fm.detach(model)
    assert torch.equal(model(**batch(2))[0], plain(**batch(2))[0])


def test_pruning(model):
    """Pruning in hooks is refused; made permanent, it is part of the weight behind the mask."""
    query = model.get_submodule(QUERY)
    prune.l1_unstructured(query, "weight", 0.5)
    assert_refused(model, rf"'{QUERY}' gets its weight from weight_orig in a hook .*prune\.remove")
    prune.remove(query, "weight")
    plain = tiny("bert")
    prune.l1_unstructured(plain.get_submodule(QUERY), "weight", 0.5)
    prune.remove(plain.get_submodule(QUERY), "weight")
    assert_right(model, multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS))


def test_hooks_registered_after_attach(model, expected):
    """They are called with packed widths; detach does not throw them away."""
    handle = model.get_submodule(QUERY).register_forward_hook(lambda module, args, y: None)
    assert_right(model, expected)
    with pytest.raises(ValueError, match=f"lose what hangs on '{QUERY}': it has forward hooks"):
        fm.detach(model)
    handle.remove()
    fm.detach(model)


def test_hooks_of_the_library(model):
    """Those of an optimizer are no obstacle to detach, nor to sending the model to a process."""
    optimizer = fm.LiveAdamW(model.parameters(), model=model)
    run(model).sum().backward()
    optimizer.step()
    assert model.get_submodule(QUERY)._forward_hooks
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), run(model))
    fm.detach(model)


def test_weights_for_one_call(model):
    """`functional_call` and changes of the very tensors reach the masked layers."""
    changed = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    plain = tiny("bert")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    inputs = {**batch(len(IDS)), "language_ids": torch.tensor(IDS)}
    found = functional_call(model, changed, (), inputs)[0]
    torch.testing.assert_close(found, multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_under_a_mask(tied):
    """The output layer has rows without masks now (tied), or is another layer (not tied)."""
    model = tiny("llama", "causal", tie_word_embeddings=tied)
    subnets = fm.Subnetworks(LANGUAGES, weights={"lm_head": torch.rand(3, 50, 24) > 0.5})
    fm.attach(model, subnets)
    model.resize_token_embeddings(61, mean_resizing=False)
    message = (
        r"masks of 'lm_head' are for a weight of shape \(50, 24\), and its weight now has shape \(61, 24\)"
        if tied
        else r"masked layer 'lm_head' was replaced by torch\.nn\.modules\.linear\.Linear"
    )
    assert_refused(model, message)
    fm.detach(model)
    assert (model.lm_head.out_features, model.lm_head.in_features) == (61, 24)
    plain = tiny("llama", "causal", tie_word_embeddings=tied)
    plain.resize_token_embeddings(61, mean_resizing=False)
    found, wanted = (m(**batch(2)).logits[..., :50] for m in (model, plain))
    assert torch.equal(found, wanted)
    keep = torch.rand(3, 61, 24) > 0.5
    fm.attach(model, fm.Subnetworks(LANGUAGES, weights={"lm_head": keep}))
    found = model(**batch(2), language_ids=torch.tensor([0, 2])).logits
    hidden = model.model(**batch(2))[0]
    masked = [hidden[i] @ (model.lm_head.weight * keep[language]).T for i, language in enumerate([0, 2])]
    torch.testing.assert_close(found, torch.stack(masked))


def test_a_weight_that_was_cut_in_place():
    """A vocabulary trimmed by `weight.data = ...` is noticed, although the Parameter is the same object."""
    model = tiny("llama", "causal")
    fm.attach(model, fm.Subnetworks(LANGUAGES, weights={"lm_head": torch.rand(3, 50, 24) > 0.5}))
    model.lm_head.weight.data = model.lm_head.weight.data[:40]
    with pytest.raises(ValueError, match=r"'lm_head' are for .*\(50, 24\), and its weight now has shape \(40, 24\)"):
        model(**batch(2), language_ids=torch.tensor([0, 2]))
