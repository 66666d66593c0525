"""An attached model gets another language, or loses one; and what each language has is counted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from every_model import first_of, made, times_masks
from transformers import default_data_collator

import fastmask as fm
from fastmask.models.attach import attached

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class TestEditing:
    def test_a_language_more_and_one_less(self):
        model, subnets, inputs = made()
        first, last = subnets.select(["aa", "bb"]), subnets.select(["cc"])
        fm.attach(model, first)
        fm.add_language(model, "new", last)
        assert attached(model).subnets.languages == ("aa", "bb", "new")
        want = torch.cat(
            [first_of(times_masks(fm.detach(copy.deepcopy(model)), subnets, row)(**inputs)) for row in (2,)]
        )
        with fm.language(model, "new"):
            torch.testing.assert_close(first_of(model(**inputs)), want)
        fm.remove_language(model, "aa")
        assert attached(model).subnets == subnets.select(["bb", "cc"]).rename({"cc": "new"})
        torch.testing.assert_close(first_of(model(**inputs, language_ids=torch.tensor([1, 1, 1]))), want)

    def test_fused_and_weights(self):
        model, subnets, inputs = made(("modernbert", "ModernBertForMaskedLM"))
        fm.attach(model, subnets.select(["aa"]))
        fm.add_language(model, "bb", subnets.select(["bb"]))
        with fm.language(model, "bb"):
            got = first_of(model(**inputs))
        want = first_of(times_masks(fm.detach(model), subnets, 1)(**inputs))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_the_standing_language_stays_the_same(self):
        """The standing language stays the same when one before it is removed."""
        model, subnets, inputs = made()
        fm.attach(model, subnets)
        fm.set_language(model, "bb")
        want = first_of(model(**inputs))
        with pytest.raises(ValueError, match="'bb' is the standing language"):
            fm.remove_language(model, "bb")
        fm.remove_language(model, "aa")
        assert torch.equal(first_of(model(**inputs)), want)
        fm.set_language(model, None)
        want = first_of(model(**inputs))
        fm.remove_language(model, "bb")
        assert torch.equal(first_of(model(**inputs)), want)

    def test_a_collator_from_before(self):
        """Names that a collator was told of by the model go on meaning the same languages."""
        model, subnets, _ = made()
        collator = fm.LanguageCollator(default_data_collator, fm.attach(model, subnets))
        assert collator([{"x": 1, "language": "bb"}])["language_ids"].tolist() == [1]
        fm.remove_language(model, "aa")
        fm.add_language(model, "dd", subnets.select(["aa"]))
        for of in (collator, pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
            made_of = of([{"x": 1, "language": "bb"}, {"x": 1, "language": "dd"}])
            assert made_of["language_ids"].tolist() == [0, 2]
            with pytest.raises(KeyError, match="unknown language 'aa'"):
                of([{"x": 1, "language": "aa"}])
        fm.attach(fm.detach(model), subnets.select(["cc", "bb"]))
        with pytest.raises(KeyError, match="unknown language 'bb'"):
            collator([{"x": 1, "language": "bb"}])

    def test_bad_input(self):
        model, subnets, _ = made()
        fm.attach(model, subnets)
        with pytest.raises(ValueError, match="'aa' has a subnetwork already"):
            fm.add_language(model, "aa", subnets.select(["bb"]))
        with pytest.raises(ValueError, match="of one language"):
            fm.add_language(model, "dd", subnets)
        with pytest.raises(ValueError, match="cannot stack"):
            fm.add_language(model, "dd", fm.Subnetworks(["x"], heads=subnets.heads[:1]))
        with pytest.raises(KeyError, match="unknown language 'x'"):
            fm.remove_language(model, "x")
        with fm.language(model, "bb"), pytest.raises(ValueError, match=r"inside `with fastmask\.language"):
            fm.remove_language(model, "aa")
        fm.remove_language(model, "aa")
        fm.remove_language(model, "bb")
        with pytest.raises(ValueError, match="the only language"):
            fm.remove_language(model, "cc")

    def test_units_that_are_not_there(self):
        """Of layers of different sizes the masks are as wide as the widest."""
        config = transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        )  # fmt: skip
        model = transformers.BartModel(config)
        subnets = fm.Subnetworks.random(model, ["aa"], 0.5, seed=0, units="heads")
        fm.attach(model, subnets)
        with pytest.raises(ValueError, match=r"the masks own heads of layer 1 that do not exist: .* has 2 there"):
            fm.add_language(model, "new", fm.Subnetworks(["x"], heads=torch.ones_like(subnets.heads)))
        assert attached(model).subnets == subnets


class TestSummary:
    def test_numbers(self):
        model, subnets, _ = made()
        total = sum(p.numel() for p in model.parameters())
        plain = times_masks(model, subnets, 1)
        found = fm.summary(fm.attach(model, subnets))
        masked = [plain.get_submodule(name) for name in found.layers]
        live = sum(int((p != 0).sum()) for module in masked for p in (module.weight,))
        assert found.languages["bb"].flops == 2 * live
        assert found.languages["bb"].all_parameters + found.unmasked == total
        assert found.trainable == total
        assert "bb" in str(found)
        assert found.languages["bb"].n_bytes == 8 * found.languages["bb"].parameters

    def test_every_layer_in_every_language_has_a_line(self):
        model, subnets, _ = made()
        found = fm.summary(fm.attach(model, subnets))
        _, *lines = found.by_layer().splitlines()
        assert [line.split()[:2] for line in lines] == [
            [name, own] for name in found.layers for own in subnets.languages
        ]
        live = [int(line.split()[2].replace(",", "")) for line in lines if line.split()[1] == "bb"]
        assert sum(live) == found.languages["bb"].parameters

    def test_names_of_what_is_not_packed(self):
        model, subnets, _ = made(("bloom", "BloomForCausalLM"))
        assert "not packed: heads of transformer.h.*.self_attention" in str(fm.summary(fm.attach(model, subnets)))
