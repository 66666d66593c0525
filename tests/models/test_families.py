"""Subnetworks on models of many families: found by structure, proven by a tiny batch, packed where that is right."""

from __future__ import annotations

import copy

import pytest
import torch
from every_model import LANGUAGES, all_types, first_of, multiplied, quiet, times_masks, tiny_model, verdict

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models.editing import set_subnetwork
from fastmask.models.proof import working_inputs
from fastmask.models.structure import structure_of

RIGHT = ("packed", "partly packed", "unpacked")

# What people who work in many languages use, how much of it is packed: all, or the neurons only.
NAMED = {
    ("deberta-v2", "DebertaV2ForMaskedLM"): "neurons",
    ("modernbert", "ModernBertForMaskedLM"): "all",
    ("eurobert", "EuroBertForMaskedLM"): "all",
    ("xlm-roberta-xl", "XLMRobertaXLForMaskedLM"): "all",
    ("mt5", "MT5ForConditionalGeneration"): "neurons",
    ("mbart", "MBartForConditionalGeneration"): "all",
    ("m2m_100", "M2M100ForConditionalGeneration"): "all",
    ("marian", "MarianMTModel"): "all",
    ("whisper", "WhisperForConditionalGeneration"): "neurons",
    ("wav2vec2", "Wav2Vec2ForCTC"): "all",
    ("bloom", "BloomForCausalLM"): "neurons",
    ("gpt2", "GPT2LMHeadModel"): "neurons",
    ("gemma3_text", "Gemma3ForCausalLM"): "all",
    ("cohere", "CohereForCausalLM"): "all",
    ("smollm3", "SmolLM3ForCausalLM"): "all",
    ("granite", "GraniteForCausalLM"): "all",
    ("gpt_oss", "GptOssForCausalLM"): "neurons",
    ("mixtral", "MixtralForCausalLM"): "all",
    ("qwen3_moe", "Qwen3MoeForCausalLM"): "all",
    ("phi3", "Phi3ForCausalLM"): "neurons",
    ("falcon", "FalconForCausalLM"): "all",
    ("gpt_neox", "GPTNeoXForCausalLM"): "all",
    ("deepseek_v3", "DeepseekV3ForCausalLM"): "all",
    ("glm4", "Glm4ForCausalLM"): "all",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("names", "packed"), NAMED.items(), ids=[name for name, _ in NAMED])
def test_named_families(names, packed):
    """Every named family is right, forward and backward, and packs what it did before."""
    found = verdict(*names)
    assert found.word in RIGHT, found
    if packed == "all":
        assert found.word == "packed", found
    else:
        assert found.word == "partly packed", found
        assert "neurons of" not in found.detail.split("not packed")[1], found


# What published checkpoints say in their config where the class's own defaults say something else.
PUBLISHED = {
    "mdeberta-v3-base": (
        ("deberta-v2", "DebertaV2ForTokenClassification"),
        {
            "relative_attention": True,
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": -1,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "sew-d": (("sew-d", "SEWDForCTC"), {}),
    "mt5-base": (("mt5", "MT5ForConditionalGeneration"), {"feed_forward_proj": "gated-gelu", "is_gated_act": True}),
    "wav2vec2-xls-r-300m": (("wav2vec2", "Wav2Vec2ForCTC"), {"do_stable_layer_norm": True}),
    "falcon-40b": (("falcon", "FalconForCausalLM"), {"new_decoder_architecture": True, "parallel_attn": True}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("names", "settings"), PUBLISHED.values(), ids=PUBLISHED)
def test_settings_of_published_checkpoints(names, settings):
    found = verdict(*names, **settings)
    assert found.word in RIGHT, found
    assert "heads" in found.detail, found


def test_positions_that_a_whole_batch_shares():
    """A batch shares the projections of its relative positions, which have no language."""
    names, settings = PUBLISHED["mdeberta-v3-base"]
    model = tiny_model(*names, **settings)
    subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1)
    inputs, _ = working_inputs(model)
    want = torch.cat(multiplied(model, subnets, inputs, [1, 0, 2]))
    quiet(fm.attach, model, subnets)
    torch.testing.assert_close(first_of(model(**inputs, languages=[LANGUAGES[i] for i in (1, 0, 2)])), want)
    alone = {name: value[1:2] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    torch.testing.assert_close(first_of(model(**alone, languages=[LANGUAGES[0]])), want[1:2])
    torch.testing.assert_close(first_of(model(**alone, language=LANGUAGES[0])), want[1:2])
    with pytest.raises(ValueError, match="also run on something that all examples of a batch share"):
        fm.attach(fm.detach(copy.deepcopy(model)), subnets, "full")
    of_tokens = torch.zeros_like(inputs["input_ids"])
    of_tokens[:, 0] = 1
    with pytest.raises(ValueError, match="what all tokens share"):
        model(**inputs, language_ids=of_tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_type():
    """Every model type of the installed transformers computes weights times masks."""
    found = {names: verdict(*names[::2]) for names in all_types()}
    wrong = {names: of for names, of in found.items() if of.word not in (*RIGHT, "refused", "not built", "not run")}
    assert not wrong
    assert sum(of.word in RIGHT for of in found.values()) >= 240


class TestFused:
    @pytest.mark.parametrize(
        "names", [("modernbert", "ModernBertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("phi3", "Phi3ForCausalLM")]
    )
    def test_another_subnetwork(self, names):
        """All parts get the new masks."""
        model = tiny_model(*names)
        first, second = (fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=s, units="both") for s in (1, 2))
        inputs, _ = working_inputs(model)
        want = torch.cat(multiplied(model, second, inputs, [1, 1, 1]))
        quiet(fm.attach, model, first)
        set_subnetwork(model, "bb", heads=second.heads[1], neurons=second.neurons[1])
        torch.testing.assert_close(first_of(model(**inputs, language_ids=torch.tensor([1, 1, 1]))), want)

    def test_conv1d_comes_back(self):
        model = tiny_model("gpt2", "GPT2LMHeadModel")
        plain, names = copy.deepcopy(model), list(model.state_dict())
        inputs, _ = working_inputs(model)
        quiet(fm.attach, model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both"))
        assert list(model.state_dict()) == names
        optimizer = fm.LiveAdamW(model.parameters(), model=model)
        first_of(model(**inputs, language_ids=torch.tensor([0, 1, 2]))).sum().backward()
        optimizer.step()
        fm.detach(model)
        assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, plain.transformer.h[0].mlp.c_fc.weight)

    def test_compiles(self):
        model = tiny_model("modernbert", "ModernBertForMaskedLM", num_hidden_layers=1)
        inputs, _ = working_inputs(model)
        fm.attach(model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both"))
        ids = torch.tensor([2, 0, 1])
        want = first_of(model(**inputs, language_ids=ids))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(first_of(compiled(**inputs, language_ids=ids)), want)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "names",
    [
        ("mbart", "MBartForConditionalGeneration"),
        ("mt5", "MT5ForConditionalGeneration"),
        ("m2m_100", "M2M100ForConditionalGeneration"),
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_encoder_decoders(names, beams):
    """Caches of both kinds of attention, reordered by beams, hold every head in its slot."""
    model = tiny_model(*names)
    subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=4, units="both")
    inputs, _ = working_inputs(model)
    words = inputs["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    want = [times_masks(model, subnets, language).generate(words, **options) for language in (0, 2)]
    fm.attach(model, subnets)
    for language, tokens in zip((0, 2), want, strict=True):
        with fm.language(model, LANGUAGES[language]):
            assert torch.equal(model.generate(words, **options), tokens)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names", [("mt5", "MT5ForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel")])
def test_discovery(names):
    """Scores of units that are not packed are those of the right units, whatever order layers run in."""
    model = tiny_model(*names)
    inputs, _ = working_inputs(model)
    subnets = fm.Subnetworks.random(model, ["aa"], 0.5, seed=4, units="both")
    plain, gates = times_masks(model, subnets, 0), {}

    def gate(kind, index, group):
        def hook(module, args):
            own = torch.ones(3, group.units, dtype=torch.float64, requires_grad=True)
            gates[kind, index] = own
            return ((args[0].unflatten(-1, (group.units, -1)) * own[:, None, :, None]).flatten(-2),)

        return hook

    structure = structure_of(plain)
    for kind in ("heads", "neurons"):
        for index, group in enumerate(structure.groups(kind)):
            plain.get_submodule(group.columns[0]).register_forward_pre_hook(gate(kind, index, group))

    def loss(model):
        return lambda batch: first_of(model(**batch)).square().flatten(1).sum(1)

    grads = torch.autograd.grad(loss(plain)(inputs).sum(), list(gates.values()))
    fm.attach(model, subnets)
    found = importance(model, [inputs], loss(model), "aa")
    for (kind, index), grad in zip(gates, grads, strict=True):
        live = getattr(subnets, kind)[0, index, : grad.shape[1]]
        want = torch.where(live, grad.abs().mean(0), 0)
        got = found[kind][index, : grad.shape[1]]
        torch.testing.assert_close(got, (want / want.norm()).float(), rtol=1e-4, atol=1e-6)
