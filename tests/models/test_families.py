"""Subnetworks on models of many families: found by structure, proven by a tiny batch, packed where that is right."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from every_model import LANGUAGES, all_types, first_of, multiplied, tiny_model, verdict
from tiny_models import tiny
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models import families
from fastmask.models.attach import attached
from fastmask.models.building import kept_of
from fastmask.models.editing import set_subnetwork
from fastmask.models.structure import Geometry, is_conv1d, structure_of
from fastmask.models.tiny_batch import working_inputs

RIGHT = ("packed", "partly packed", "unpacked")

# What people who work in many languages use, how much of it is packed: all, the neurons only, or nothing.
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
    ("gpt_oss", "GptOssForCausalLM"): "nothing",
    ("mixtral", "MixtralForCausalLM"): "all",
    ("qwen3_moe", "Qwen3MoeForCausalLM"): "all",
    ("phi3", "Phi3ForCausalLM"): "neurons",
    ("falcon", "FalconForCausalLM"): "all",
    ("gpt_neox", "GPTNeoXForCausalLM"): "all",
    ("deepseek_v3", "DeepseekV3ForCausalLM"): "all",
    ("glm4", "Glm4ForCausalLM"): "all",
}


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("names", "packed"), NAMED.items(), ids=[name for name, _ in NAMED])
def test_named_families(names, packed):
    """A family is wrong, forward or backward, or packs less than it did."""
    found = verdict(*names)
    assert found.word in RIGHT, found
    if packed == "all":
        assert found.word == "packed", found
    elif packed == "nothing":
        assert found.word == "unpacked", found
    else:
        assert found.word == "partly packed", found
        assert "neurons of" not in found.detail.split("not packed")[1], found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_type():
    """A model type of the installed transformers computes something else than weights times masks."""
    found = {names: verdict(*names[::2]) for names in all_types()}
    wrong = {names: of for names, of in found.items() if of.word not in (*RIGHT, "refused", "not built", "not run")}
    assert not wrong
    assert sum(of.word in RIGHT for of in found.values()) >= 200


class TestStructure:
    def test_order_and_sizes_of_an_encoder_decoder(self):
        structure = structure_of(tiny_model("mbart", "MBartForConditionalGeneration"))
        names = [group.name.split("layers.")[1] for group in structure.attentions]
        assert names == ["0.self_attn", "1.self_attn", *(f"{i}.{a}_attn" for i in (0, 1) for a in ("self", "encoder"))]
        assert len(structure.ffns) == 4

    def test_query_heads_of_one_key_are_one_unit(self):
        assert Geometry.of(tiny("llama")).heads == (3, 3)
        assert Geometry.of(tiny("llama").config) == Geometry.of(tiny("llama"))

    def test_a_projection_of_everything(self):
        """Fused weights, in both orders."""
        (modern, _), (neox, _) = (
            structure_of(tiny_model(*names)).attentions
            for names in (("modernbert", "ModernBertForMaskedLM"), ("gpt_neox", "GPTNeoXForCausalLM"))
        )
        assert list(modern.rows.values()) == [(8, 8, 8)]
        assert list(neox.rows.values()) == [(24,)]

    def test_layers_of_several_sizes(self):
        """Units that do not exist are owned, or counted in a layer's share."""
        model = tiny_model("deepseek_v3", "DeepseekV3ForCausalLM")
        assert Geometry.of(model).neurons == (24, 16)
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0, units="neurons")
        assert subnets.neurons.sum(2).tolist() == [[12, 8]] * 3
        assert not subnets.neurons[:, 1, 16:].any()
        wrong = subnets.neurons.clone()
        wrong[0, 1, 20] = True
        with pytest.raises(ValueError, match=r"neurons of layer 1 that do not exist: .* has 16 there"):
            fm.attach(model, fm.Subnetworks(LANGUAGES, neurons=wrong))
        attached_model = quiet(fm.attach, model, subnets)
        with pytest.raises(ValueError, match="layer 1 has 16 neurons"):
            set_subnetwork(attached_model, "aa", neurons=wrong[0])

    def test_linear_attention_is_none(self):
        """A layer with a state is taken for attention, as it has projections of the same names."""
        structure = structure_of(tiny_model("olmo_hybrid", "OlmoHybridForCausalLM"))
        assert all("linear_attn" not in group.name for group in structure.attentions)

    def test_no_kind_of_unit(self):
        """A model without heads that are known is asked for some."""
        model = tiny_model("fnet", "FNetForMaskedLM")
        with pytest.raises(ValueError, match="no heads that fastmask knows"):
            fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0)
        with pytest.raises(ValueError, match=r"masks are for heads, and this FNetForMaskedLM has none"):
            fm.attach(model, fm.Subnetworks(["a"], heads=torch.ones(1, 2, 4, dtype=torch.bool)))

    def test_neither_model_nor_config(self):
        with pytest.raises(ValueError, match="expected a model or its Hugging Face config, given dict"):
            fm.Subnetworks.random({}, LANGUAGES, 0.5, seed=0)


class OwnAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(size, size) for _ in range(4))
        self.head_dim = size // heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention, self.inner, self.outer = OwnAttention(size, 4), nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.outer(torch.relu(self.inner(x)))


class OwnModel(nn.Module):
    """A model of somebody's own, without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(60, 32), nn.ModuleList(OwnLayer(32) for _ in range(2))

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return (x,)


OWN = fm.Family(
    attention=fm.Projections(rows=("wq", "wk", "wv"), columns="wo"),
    ffn=fm.Projections(rows=("inner",), columns="outer"),
)


class TestOwnFamily:
    def test_by_argument(self):
        model = OwnModel().double().eval()
        geometry = structure_of(model, OWN)
        assert [len(geometry.attentions), len(geometry.ffns)] == [2, 2]
        keep = torch.tensor([[[1, 0, 0, 1]] * 2, [[0, 1, 1, 1]] * 2]).bool()
        subnets = fm.Subnetworks(
            ["a", "b"], heads=keep, neurons=torch.arange(48).view(1, 2, 24).repeat(2, 1, 1) % 3 > 0
        )
        ids, languages = torch.randint(60, (3, 5)), [1, 0, 1]
        want = []
        for row, language in enumerate(languages):
            plain = copy.deepcopy(model)
            for index, block in enumerate(plain.blocks):
                rows = keep[language, index].repeat_interleave(8).double()
                for name in ("wq", "wk", "wv"):
                    linear = getattr(block.attention, name)
                    linear.weight.data *= rows[:, None]
                    linear.bias.data *= rows
                block.inner.weight.data *= subnets.neurons[language, index].double()[:, None]
                block.inner.bias.data *= subnets.neurons[language, index].double()
            want.append(plain(ids[row : row + 1])[0])
        with pytest.warns(UserWarning, match="no tiny batch could be run.*Whether results are right was not tried"):
            fm.attach(copy.deepcopy(model), subnets, family=OWN, example={"x": ids})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fm.attach(model, subnets, family=OWN, example={"input_ids": ids})
        torch.testing.assert_close(model(ids, language_ids=torch.tensor(languages))[0], torch.cat(want))

    def test_registered(self, monkeypatch):
        monkeypatch.setattr(families, "_registered", {})
        model = tiny("bert")
        for layer in model.encoder.layer:
            layer.attention.extra = nn.Linear(4, 4)
        assert structure_of(model).attentions[0].name.endswith("attention")
        fm.register_family("bert", fm.Family(ffn=fm.Projections(("attention.extra",), "attention.extra")))
        assert structure_of(model).ffns[0].units == 4

    def test_a_derived_class(self):
        """A config or a model derived from a known one is not known by its name."""
        from transformers import BertConfig, BertModel

        class Config(BertConfig):
            model_type = "mine"

        class Model(BertModel):
            config_class = Config

        config = Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=20)
        model = Model(config)
        fm.attach(model, fm.Subnetworks.random(model, ["a"], 0.5, seed=0, units="both"))
        assert not attached(model).unpacked

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: fm.Projections("abc", "d"), "expected rows as a tuple of module names, given 'abc'"),
            (lambda: fm.Projections(("a",), ""), "expected columns as a module name, given ''"),
            (lambda: fm.Projections(("a",), "b", "thirds"), "fused must be 'parts' or 'units'"),
            (lambda: fm.Family(attention=["a"]), "expected attention as fastmask.Projections"),
            (lambda: fm.register_family("", fm.Family()), "expected model_type as a non-empty string"),
            (lambda: fm.register_family("x", {}), "expected a fastmask.Family, given dict"),
        ],
    )
    def test_bad_input(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


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
        """Masks would have no effect, and nobody would know."""
        model = tiny_model("wavlm", "WavLMForCTC")
        before = {name: p.clone() for name, p in model.named_parameters()}
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1)
        with pytest.raises(ValueError, match=r"reads the weights of '.*q_proj' without calling that layer"):
            fm.attach(model, subnets)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any(isinstance(module, fm.MaskedLinear) for module in model.modules())

    def test_nothing_is_left_behind(self):
        """Trying leaves evaluation mode on, uses random numbers, or leaves gradients or hooks."""
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
        """Queries read the decoder, keys and values the encoder."""
        model = quiet(fm.attach, *self.pair("mbart", "MBartForConditionalGeneration"))
        layer = model.model.decoder.layers[0]
        assert layer.encoder_attn.q_proj.siblings is None
        assert layer.self_attn.q_proj.siblings is not None

    def pair(self, *names):
        model = tiny_model(*names)
        return model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both")


class TestFused:
    @pytest.mark.parametrize(
        "names", [("modernbert", "ModernBertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("phi3", "Phi3ForCausalLM")]
    )
    def test_another_subnetwork(self, names):
        """Masks of the parts stay those from before."""
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
        model = tiny_model("modernbert", "ModernBertForMaskedLM")
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
    """Caches of two kinds of attention, reordered by beams, hold heads in the wrong slots."""
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


def times_masks(model, subnets, language):
    """A copy of a model with one language's masks multiplied into its weights."""
    plain = copy.deepcopy(model)
    parameters, structure = dict(plain.named_parameters()), structure_of(plain)
    for kind in ("heads", "neurons"):
        for index, group in enumerate(structure.groups(kind)):
            keep = getattr(subnets, kind)[language, index, : group.units].double()
            for name, unit in group.rows.items():
                rows = kept_of(keep, unit)
                weight = parameters[f"{name}.weight"].data
                weight *= rows if is_conv1d(plain.get_submodule(name)) else rows[:, None]
                if f"{name}.bias" in parameters:
                    parameters[f"{name}.bias"].data *= rows
            name, unit = group.columns
            columns, weight = keep.repeat_interleave(unit), parameters[f"{name}.weight"].data
            weight *= columns[:, None] if is_conv1d(plain.get_submodule(name)) else columns
    return plain


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names", [("mt5", "MT5ForConditionalGeneration"), ("gpt2", "GPT2LMHeadModel")])
def test_discovery(names):
    """Scores of units that are not packed are read at the wrong slots, or in the order of the forward pass."""
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
        got = getattr(found, kind)[index, : grad.shape[1]]
        torch.testing.assert_close(got, (want / want.norm()).float(), rtol=1e-4, atol=1e-6)


def test_weights_of_zero_prove_nothing():
    """Output projections that begin with zeros would let wrong heads pass, for every later model of the config, too."""
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
    """Who exchanges a module of a model has another model, though its config is the same."""
    plain = tiny("bert", max_position_embeddings=43)
    subnets = fm.Subnetworks.random(plain, LANGUAGES, 0.5, seed=0, units="neurons")
    fm.attach(plain, subnets)
    changed = tiny("bert", max_position_embeddings=43)
    for layer in changed.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.Sequential(nn.Tanh(), nn.Softmax(-1))
    with pytest.warns(UserWarning, match="neurons of encoder.layer.* are not packed"):
        fm.attach(changed, subnets)
