"""`attach` tries its layers before it puts them in: what would be wrong is not packed, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from every_model import LANGUAGES, first_of, multiplied, quiet, tiny_model
from tiny_models import tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastmask as fm
from fastmask.models.proof import working_inputs


class TestProof:
    def deberta(self):
        """Its attention reshapes to as many heads as the config says, whatever arrives."""
        return tiny_model("deberta-v2", "DebertaV2ForMaskedLM", relative_attention=False)

    def test_packing_that_would_be_silently_wrong(self):
        model = self.deberta()
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both")
        inputs, _ = working_inputs(model)
        want = torch.cat(multiplied(model, subnets, inputs, [1, 0, 2]))
        with pytest.warns(UserWarning, match=r"the heads of deberta\.encoder\.layer\.\*\.attention are not packed"):
            good = fm.attach(copy.deepcopy(model), subnets)
        ids = torch.tensor([1, 0, 2])
        torch.testing.assert_close(first_of(good(**inputs, language_ids=ids)), want)
        packed = fm.attach(copy.deepcopy(model), subnets, verify=False)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(first_of(packed(**inputs, language_ids=ids)), want)

    def test_weights_that_are_read_directly(self):
        """A model that reads a weight without calling its layer, so that masks have no effect, is noticed."""
        model = tiny_model("wavlm", "WavLMForCTC")
        before = {name: p.clone() for name, p in model.named_parameters()}
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1)
        with pytest.raises(ValueError, match=r"reads the weights of '.*q_proj' without calling that layer"):
            fm.attach(model, subnets)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any(isinstance(module, fm.MaskedLinear) for module in model.modules())

    def test_nothing_is_left_behind(self):
        """The trial leaves mode, random numbers, gradients and hooks as they were."""
        model = self.deberta().train()
        model.deberta.encoder.layer[0].eval()
        modes = [module.training for module in model.modules()]
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1)
        state = torch.get_rng_state()
        quiet(fm.attach, model, subnets)
        assert torch.equal(torch.get_rng_state(), state)
        fm.detach(model)
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_model_without_weights(self):
        """On the meta device nothing can be tried: what is not known to work is not packed."""
        with torch.device("meta"):
            model = type(tiny("bert"))(tiny("bert").config)
        with pytest.warns(UserWarning, match="has no weights yet.*Whether results are right was not tried"):
            fm.attach(model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1))

    def test_inputs_of_cross_attention_are_not_computed_twice(self):
        """In cross attention, queries of the decoder are not computed together with keys and values of the encoder."""
        model = quiet(fm.attach, *self.pair("mbart", "MBartForConditionalGeneration"))
        layer = model.model.decoder.layers[0]
        assert layer.encoder_attn.q_proj.siblings is None
        assert layer.self_attn.q_proj.siblings is not None

    def pair(self, *names):
        model = tiny_model(*names)
        return model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both")


def test_weights_of_zero_prove_nothing():
    """Output projections that begin with zeros do not let wrong heads pass, now or for later models."""
    base = first_gpt2()
    subnets = fm.Subnetworks(["a", "b"], heads=torch.tensor([[[1, 1, 0, 1]], [[0, 1, 0, 1]]]).bool())
    tokens = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(1))
    projection = base.transformer.h[0].attn.c_proj.weight
    own = projection.detach().clone()
    projection.data.zero_()
    with pytest.warns(UserWarning, match=r"heads of transformer\.h\.\*\.attn are not packed"):
        fm.attach(base, subnets)
    assert not projection.any()
    projection.data.copy_(own)
    found = base(tokens, language_ids=torch.tensor([0, 1])).logits
    for row, name in enumerate(subnets.languages):
        torch.testing.assert_close(found[row], fm.merge(base, name)(tokens[row : row + 1]).logits[0])


def first_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_head=4, n_layer=1, n_inner=20, vocab_size=30, n_positions=17)
    return GPT2LMHeadModel(config).double().eval()


def test_a_proof_is_not_for_other_modules():
    """A model with an exchanged module is tried anew, even if its config is the same."""
    plain = tiny("bert", max_position_embeddings=43)
    subnets = fm.Subnetworks.random(plain, LANGUAGES, 0.5, seed=0, units="neurons")
    fm.attach(plain, subnets)
    changed = tiny("bert", max_position_embeddings=43)
    for layer in changed.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Sequential(nn.Tanh(), nn.Softmax(-1))
    with pytest.warns(UserWarning, match="neurons of encoder.layer.* are not packed"):
        fm.attach(changed, subnets)
