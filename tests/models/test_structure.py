"""Where heads and neurons are in a model, found by names and shapes, or said by its owner."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from every_model import LANGUAGES, quiet, tiny_model
from tiny_models import batch, tiny
from torch import Tensor, nn

import fastmask as fm
from fastmask.models import families
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork
from fastmask.models.structure import structure_of


class TestStructure:
    def test_order_and_sizes_of_an_encoder_decoder(self):
        structure = structure_of(tiny_model("mbart", "MBartForConditionalGeneration"))
        names = [group.name.split("layers.")[1] for group in structure.attentions]
        assert names == ["0.self_attn", "1.self_attn", *(f"{i}.{a}_attn" for i in (0, 1) for a in ("self", "encoder"))]
        assert len(structure.ffns) == 4

    def test_query_heads_of_one_key_are_one_unit(self):
        assert structure_of(tiny("llama")).sizes("heads") == (3, 3)
        assert structure_of(tiny("llama").config) == structure_of(tiny("llama"))

    def test_a_projection_of_everything(self):
        """Fused weights, in both orders."""
        (modern, _), (neox, _) = (
            structure_of(tiny_model(*names)).attentions
            for names in (("modernbert", "ModernBertForMaskedLM"), ("gpt_neox", "GPTNeoXForCausalLM"))
        )
        assert list(modern.rows.values()) == [(8, 8, 8)]
        assert list(neox.rows.values()) == [(24,)]

    def test_layers_of_several_sizes(self):
        """Units that do not exist are neither owned nor counted."""
        model = tiny_model("deepseek_v3", "DeepseekV3ForCausalLM")
        assert structure_of(model).sizes("neurons") == (
            24,
            16,
            16,
        )  # of an FFN, of experts, and of the shared one beside them
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0, units="neurons")
        assert subnets.neurons.sum(2).tolist() == [[12, 8, 8]] * 3
        assert not subnets.neurons[:, 1, 16:].any()
        wrong = subnets.neurons.clone()
        wrong[0, 1, 20] = True
        with pytest.raises(ValueError, match=r"neurons of layer 1 that do not exist: .* has 16 there"):
            fm.attach(model, fm.Subnetworks(LANGUAGES, neurons=wrong))
        attached_model = quiet(fm.attach, model, subnets)
        with pytest.raises(ValueError, match="layer 1 has 16 neurons"):
            set_subnetwork(attached_model, "aa", neurons=wrong[0])

    def test_linear_attention_is_none(self):
        """A layer with a state is not taken for attention, although its projections have the same names."""
        structure = structure_of(tiny_model("olmo_hybrid", "OlmoHybridForCausalLM"))
        assert all("linear_attn" not in group.name for group in structure.attentions)

    def test_no_kind_of_unit(self):
        """Masks over heads are refused for a model without heads that are known."""
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

    @pytest.mark.parametrize("model_type", ["llama", "qwen3"])
    def test_single_query_heads(self, monkeypatch, model_type):
        """Query heads that share a key can be units of their own: queries and the output projection are masked."""
        monkeypatch.setattr(families, "_registered", {})
        fm.register_family(model_type, fm.Family(attention=fm.Projections(("q_proj",), "o_proj")))
        model, inputs, languages = tiny(model_type), batch(4), [1, 0, 1, 1]
        found = structure_of(model.config)
        assert (found.sizes("heads"), found.sizes("neurons")) == ((6, 6), (20, 20))
        heads = torch.tensor([[[1, 1, 0, 0, 1, 0]] * 2, [[0, 1, 0, 1, 1, 1]] * 2]).bool()
        subnets = fm.Subnetworks(["a", "b"], heads=heads)
        want = []
        for row, language in enumerate(languages):
            own = copy.deepcopy(model)
            for layer, keep in zip(own.layers, heads[language], strict=True):
                live = keep.repeat_interleave(8).double()
                layer.self_attn.q_proj.weight.data *= live[:, None]
                if layer.self_attn.q_proj.bias is not None:
                    layer.self_attn.q_proj.bias.data *= live
                layer.self_attn.o_proj.weight.data *= live
            want.append(own(**{name: value[row : row + 1] for name, value in inputs.items()})[0])
        with pytest.warns(UserWarning, match="heads of layers[.][*][.]self_attn are not packed .* Results are right"):
            fm.attach(model, subnets)
        output = model(**inputs, language_ids=torch.tensor(languages))[0]
        torch.testing.assert_close(output, torch.cat(want), rtol=1e-9, atol=1e-9)
        output.sum().backward()
        grad = model.layers[0].self_attn.o_proj.weight.grad.unflatten(1, (6, 8)).abs().amax((0, 2))
        assert (grad > 0).tolist() == heads[:, 0].any(0).tolist()
        small = fm.extract(model, "a")  # what cannot be packed is zeros in it
        of_a = small(**{name: value[1:2] for name, value in inputs.items()})[0]
        torch.testing.assert_close(of_a, want[1], rtol=1e-9, atol=1e-9)
        assert small.config.num_attention_heads == 6

    def test_a_derived_class(self):
        """A config or a model derived from a known one is treated like it."""
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
