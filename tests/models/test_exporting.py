"""One language's network as a plain model: merged in full size, or cut out."""

from __future__ import annotations

import copy

import pytest
import torch
from every_model import LANGUAGES, MODELS, assert_same, first_of, made, times_masks

import fastmask as fm
from fastmask.models.attach import attached, is_attached
from fastmask.models.structure import structure_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class TestMerge:
    @pytest.mark.parametrize("names", MODELS, ids=lambda names: names[0])
    def test_one_language(self, names):
        model, subnets, inputs = made(names)
        want = {name: parameter.detach() for name, parameter in times_masks(model, subnets, 1).named_parameters()}
        fm.attach(model, subnets)
        before = copy.deepcopy(model.state_dict())
        merged = fm.merge(model, "bb")
        assert not is_attached(merged)
        for name, parameter in merged.named_parameters():
            assert torch.equal(parameter, want[name]), name
        with fm.language(model, "bb"):
            torch.testing.assert_close(first_of(merged(**inputs)), first_of(model(**inputs)), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_single_weights(self):
        model, _, inputs = made()
        name = "bert.encoder.layer.1.output.dense"
        keep = torch.rand(2, *model.get_submodule(name).weight.shape) < 0.3
        fm.attach(model, fm.Subnetworks(["a", "b"], weights={name: keep}))
        with fm.language(model, "b"):
            torch.testing.assert_close(first_of(fm.merge(model, "b")(**inputs)), first_of(model(**inputs)))

    def test_what_dead_weights_hold_is_gone(self):
        """Weights that no language reads may be anything: merged they are zeros, and not NaN."""
        model, subnets, inputs = made()
        fm.attach(model, subnets)
        layer = model.get_submodule("bert.encoder.layer.1.output.dense")
        with fm.language(model, "bb"):
            want = first_of(model(**inputs))
        dead = ~layer.mask.select([subnets.index("bb")]).to_dense()[0]
        with torch.no_grad():
            layer.weight.masked_fill_(dead, torch.inf)
        torch.testing.assert_close(first_of(fm.merge(model, "bb")(**inputs)), want, rtol=1e-5, atol=1e-6)

    def test_tied_weights(self):
        """Merging into a tied weight is refused: the embeddings would be multiplied, too."""
        model, _, _ = made()
        keep = torch.rand(1, *model.cls.predictions.decoder.weight.shape) < 0.5
        fm.attach(model, fm.Subnetworks(["a"], weights={"cls.predictions.decoder": keep}))
        with pytest.raises(ValueError, match=r"the weight of 'cls.predictions.decoder' is tied"):
            fm.merge(model, "a")
        with pytest.raises(KeyError, match="unknown language 'x'"):
            fm.merge(model, "x")


class TestExtract:
    @pytest.mark.parametrize("names", MODELS, ids=lambda names: names[0])
    def test_smaller_and_equal(self, names, tmp_path):
        model, subnets, inputs = made(names)
        fm.attach(model, subnets)
        small = fm.extract(model, "cc")
        with fm.language(model, "cc"):
            want = first_of(model(**inputs))
        torch.testing.assert_close(first_of(small(**inputs)), want, rtol=1e-5, atol=1e-6)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (small, fm.detach(model))]
        assert sizes[0] < sizes[1]
        if hasattr(small, "_fastmask_sizes"):
            fm.save_pretrained(small, tmp_path)
            again = fm.from_pretrained(tmp_path, experts_implementation="eager").eval()
        else:
            small.save_pretrained(tmp_path)
            again = type(small).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(first_of(again(**inputs)), want, rtol=1e-5, atol=1e-6)
        first_of(again(**inputs)).sum().backward()

    def test_an_ordinary_model(self):
        """Llama's config can say all sizes: the extracted model needs nothing of ours."""
        model, subnets, _ = made(("llama", "LlamaForCausalLM"))
        small = fm.extract(fm.attach(model, subnets), "aa")
        assert not hasattr(small, "_fastmask_sizes")
        assert (small.config.num_key_value_heads, small.config.num_attention_heads) == (1, 2)
        assert small.config.intermediate_size == 12

    def test_a_config_with_a_size_for_each_layer(self):
        """A config that has a size for each layer can be read."""
        model, subnets, inputs = made(("gemma4_unified_text", "Gemma4UnifiedForCausalLM"))
        small = fm.extract(fm.attach(model, subnets), "aa")
        torch.testing.assert_close(first_of(small(**inputs)), first_of(model(**inputs, language="aa")))

    def test_an_ordinary_model_generates_as_before(self):
        """The extracted model keeps its settings for generation, and extracting draws no random numbers."""
        model, subnets, _ = made(("llama", "LlamaForCausalLM"))
        model.generation_config.suppress_tokens, model.generation_config.max_new_tokens = [5, 6], 3
        fm.attach(model, subnets)
        state = torch.get_rng_state()
        small = fm.extract(model, "aa")
        assert torch.equal(torch.get_rng_state(), state)
        assert small.generation_config == model.generation_config
        assert small.generation_config is not model.generation_config

    @pytest.mark.parametrize("forward", ["masked", "full"])
    def test_subnetworks_of_an_extracted_model(self, forward, tmp_path):
        """An extracted model can be saved, with the sizes its layers have."""
        model, subnets, inputs = made()
        small = fm.extract(fm.attach(model, subnets), "aa")
        assert hasattr(small, "_fastmask_sizes")
        others = fm.Subnetworks.random(small, ["u", "v"], 0.5, seed=0, units="neurons")
        fm.attach(small, others, forward)
        fm.save_pretrained(small, tmp_path / "attached")
        again = fm.from_pretrained(tmp_path / "attached").eval()
        assert attached(again).subnets == others
        ids = torch.tensor([0, 1, -1])
        assert_same(first_of(again(**inputs, language_ids=ids)), first_of(small(**inputs, language_ids=ids)))
        if forward == "masked":
            fm.save_pretrained(smaller := fm.extract(again, "v"), tmp_path / "smaller")
            found = fm.from_pretrained(tmp_path / "smaller").eval()
            assert_same(first_of(found(**inputs)), first_of(smaller(**inputs)))
            torch.testing.assert_close(first_of(found(**inputs)), first_of(small(**inputs, language="v")))

    def test_layers_of_other_sizes_and_none(self):
        """Layers keep unequally many units, one of them none."""
        model, subnets, inputs = made()
        heads, neurons = subnets.heads.clone(), subnets.neurons.clone()
        heads[0, 0], heads[0, 1, 1:] = True, False
        neurons[0, 1] = False
        fm.attach(model, fm.Subnetworks(LANGUAGES, heads, neurons))
        small = fm.extract(model, "aa")
        with fm.language(model, "aa"):
            torch.testing.assert_close(first_of(small(**inputs)), first_of(model(**inputs)))
        ffns = structure_of(small).ffns
        assert [group.units for group in ffns] == [12, 1]


def test_sparse_fine_tuning(tmp_path):
    """The full network runs: plain loading is right, and there is nothing to merge."""
    model, subnets, inputs = made()
    want = first_of(model(**inputs))
    fm.attach(model, subnets, forward="full").save_pretrained(tmp_path)
    with torch.no_grad():
        again = fm.from_pretrained(tmp_path).eval()
        assert_same(first_of(again(**inputs)), want)
    assert attached(again).router.full_forward
    for call in (fm.merge, fm.extract):
        with pytest.raises(ValueError, match='attached with forward="full"'):
            call(model, "aa")
