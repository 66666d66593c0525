"""Subnetworks travel with their model: folders, the Trainer's checkpoints, the Hub; merged and cut out."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from every_model import LANGUAGES, first_of, tiny_model
from test_families import times_masks
from tiny_models import batch, tiny

import fastmask as fm
from fastmask.models.attach import attached, is_attached
from fastmask.models.structure import structure_of
from fastmask.models.tiny_batch import working_inputs

MODELS = [
    ("bert", "BertForMaskedLM"),
    ("llama", "LlamaForCausalLM"),
    ("modernbert", "ModernBertForMaskedLM"),
    ("mbart", "MBartForConditionalGeneration"),
    ("mt5", "MT5ForConditionalGeneration"),
    ("gpt2", "GPT2LMHeadModel"),
    ("phi3", "Phi3ForCausalLM"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"),
]


def made(names=MODELS[0], units="both", density=0.5, seed=3):
    model = tiny_model(*names)
    inputs, _ = working_inputs(model)
    subnets = fm.Subnetworks.random(model, LANGUAGES, density, seed=seed, units=units)
    return model, subnets, inputs


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class TestFolder:
    @pytest.mark.parametrize("names", MODELS, ids=lambda names: names[0])
    def test_round_trip(self, names, tmp_path):
        model, subnets, inputs = made(names)
        ids = torch.tensor([2, 0, -1])
        want = first_of(fm.attach(model, subnets)(**inputs, language_ids=ids))
        fm.save_pretrained(model, tmp_path / "saved", licence="mit", metadata={"found": "by chance"})
        again = fm.from_pretrained(tmp_path / "saved", experts_implementation="eager")  # grouped ones take no float64
        assert attached(again).subnets == subnets
        assert torch.equal(first_of(again.eval()(**inputs, language_ids=ids)), want)
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "license: mit" in card
        assert "| aa | 50% | 50% |" in card or "| aa | " in card
        assert "- found: by chance" in card

    def test_the_method_of_the_model(self, tmp_path):
        """Masks are dropped without a word by whoever calls model.save_pretrained."""
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        assert attached(fm.from_pretrained(tmp_path)).subnets == subnets
        fm.detach(model).save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain" / "fastmask.json").exists()

    def test_plain_loading_warns(self, tmp_path, caplog):
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        from transformers import BertForMaskedLM
        from transformers.utils import logging

        logging.enable_propagation()
        try:
            BertForMaskedLM.from_pretrained(tmp_path)
        finally:
            logging.disable_propagation()
        assert "masks_were_not_loaded.use_fastmask_from_pretrained" in caplog.text
        caplog.clear()
        fm.from_pretrained(tmp_path)
        assert "UNEXPECTED" not in caplog.text

    def test_weights_of_the_base(self, tmp_path):
        """Only masks: some kilobytes, and the name of the model that they are for."""
        model, subnets, inputs = made()
        model.save_pretrained(tmp_path / "base")
        from transformers import BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(tmp_path / "base")
        fm.save_pretrained(fm.attach(model, subnets), tmp_path / "masks", weights=False)
        assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
            "README.md",
            "fastmask.json",
            "subnetworks.safetensors",
        ]
        again = fm.from_pretrained(tmp_path / "masks").eval()
        ids = torch.tensor([0, 1, 2])
        assert torch.equal(
            first_of(again(**inputs, language_ids=ids)), first_of(model.eval()(**inputs, language_ids=ids))
        )

    def test_another_class(self, tmp_path):
        from transformers import AutoModel, AutoModelForTokenClassification

        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        bare = fm.from_pretrained(tmp_path, model_class=AutoModel)
        assert type(bare).__name__ == "BertModel"
        assert is_attached(fm.from_pretrained(tmp_path, model_class=AutoModelForTokenClassification, num_labels=5))

    def test_somebody_elses_card(self, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_somebody_elses_files(self, tmp_path):
        """What lies beside the weights would have to stay as it is."""
        (tmp_path / "fi.safetensors").write_bytes(b"before")
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        (tmp_path / "fi.safetensors").write_bytes(b"after")
        assert is_attached(fm.from_pretrained(tmp_path))

    @pytest.mark.parametrize("file", ["subnetworks.safetensors", "model.safetensors"])
    def test_a_damaged_file(self, file, tmp_path):
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        content = bytearray((tmp_path / file).read_bytes())
        content[-1] ^= 1
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file}: is not the file that was saved"):
            fm.from_pretrained(tmp_path)

    def test_weights_of_a_later_model(self, tmp_path):
        """A plain model saved over it would get the masks of the one before."""
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        fm.detach(model)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is not the file that was saved with the subnetworks"):
            fm.from_pretrained(tmp_path)

    def test_bad_input(self, tmp_path):
        model, subnets, _ = made()
        with pytest.raises(ValueError, match="BertForMaskedLM has no subnetworks attached"):
            fm.save_pretrained(model, tmp_path)
        with pytest.raises(FileNotFoundError, match="was not saved by fastmask"):
            fm.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="weights=False keeps only masks"):
            fm.save_pretrained(fm.attach(model, subnets), tmp_path, weights=False)
        model.save_pretrained(tmp_path)
        about = json.loads((tmp_path / "fastmask.json").read_text())
        for change, message in (
            ({"version": 2}, "version"),
            ({"model_class": "NoSuchModel"}, "no model of this transformers"),
            ({"files": {"../x": "0" * 64}}, "is not the file that was saved"),
            ({"kind": "other"}, "kind"),
        ):
            (tmp_path / "fastmask.json").write_text(json.dumps({**about, **change}))
            with pytest.raises(ValueError, match=message):
                fm.from_pretrained(tmp_path)


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, row):
        ids = batch(6)["input_ids"][row]
        return {"input_ids": ids, "labels": ids, "language_ids": row % 3}


def test_the_trainers_checkpoints(tmp_path):
    """A run's checkpoints, and the best model it ends with, have no masks."""
    from transformers import Trainer, TrainingArguments

    model = tiny("bert", "tokens", num_labels=50).float()
    subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0, units="both")
    fm.attach(model, subnets)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=3,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    trainer.save_model(tmp_path / "end")
    for folder in ("checkpoint-2", "checkpoint-4", "end"):
        assert attached(fm.from_pretrained(tmp_path / folder)).subnets == subnets
    end = fm.from_pretrained(tmp_path / "end").eval()
    ids = torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        end(**batch(3), language_ids=ids)[0], trainer.model.eval()(**batch(3), language_ids=ids)[0]
    )


class TestHub:
    def test_from_its_cache(self, tmp_path, monkeypatch):
        """A repository that was downloaded once is loaded without a network."""
        from huggingface_hub import constants

        model, subnets, _ = made()
        snapshot = tmp_path / "models--someone--finnish" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        refs = tmp_path / "models--someone--finnish" / "refs"
        refs.mkdir()
        (refs / "main").write_text("a" * 40)
        fm.attach(model, subnets).save_pretrained(snapshot)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert attached(fm.from_pretrained("someone/finnish")).subnets == subnets
        with pytest.raises(FileNotFoundError, match=r"someone/swedish: no such folder, and not on the Hub"):
            fm.from_pretrained("someone/swedish")

    def test_push(self, tmp_path):
        """What `model.push_to_hub` uploads, to a server that keeps what it is sent."""
        received = {}

        class Handler(BaseHTTPRequestHandler):
            def answer(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                url = f"http://127.0.0.1:{self.server.server_port}/someone/finnish"
                if self.path.endswith("/preupload/main"):
                    files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                    self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            received[line["value"]["path"]] = line["value"]["content"]
                    self.answer({"commitUrl": f"{url}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True})
                else:
                    self.answer({"url": url, "warnings": [], "errors": []})

            def do_GET(self):
                self.answer({"id": "someone/finnish", "sha": "a" * 40, "siblings": []})

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path / "saved")
        code = (
            "import sys, fastmask as fm\n"
            "fm.from_pretrained(sys.argv[1]).push_to_hub('someone/finnish', token='hf_' + 'x' * 30)\n"
        )
        port = server.server_port
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        import os

        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "saved")],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
        assert run.returncode == 0, run.stderr[-2000:]
        assert {"fastmask.json", "subnetworks.safetensors", "model.safetensors", "config.json"} <= received.keys()


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

    def test_tied_weights(self):
        """The embeddings would be multiplied, too."""
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
        """Reading such a config raises an error of its own."""
        model, subnets, inputs = made(("gemma4_unified_text", "Gemma4UnifiedForCausalLM"))
        small = fm.extract(fm.attach(model, subnets), "aa")
        torch.testing.assert_close(first_of(small(**inputs)), first_of(model(**inputs, language="aa")))

    def test_an_ordinary_model_generates_as_before(self):
        """How a model generates is in no config of sizes; and random numbers go on as if nothing was."""
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
        """They would not be saved, or the sizes that its layers have would not."""
        model, subnets, inputs = made()
        small = fm.extract(fm.attach(model, subnets), "aa")
        assert hasattr(small, "_fastmask_sizes")
        others = fm.Subnetworks.random(small, ["u", "v"], 0.5, seed=0, units="neurons")
        fm.attach(small, others, forward)
        fm.save_pretrained(small, tmp_path / "attached")
        again = fm.from_pretrained(tmp_path / "attached").eval()
        assert attached(again).subnets == others
        ids = torch.tensor([0, 1, -1])
        assert torch.equal(first_of(again(**inputs, language_ids=ids)), first_of(small(**inputs, language_ids=ids)))
        if forward == "masked":
            fm.save_pretrained(smaller := fm.extract(again, "v"), tmp_path / "smaller")
            found = fm.from_pretrained(tmp_path / "smaller").eval()
            assert torch.equal(first_of(found(**inputs)), first_of(smaller(**inputs)))
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
        """Its number is another language's once one before it is gone."""
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

    def test_names_of_what_is_not_packed(self):
        model, subnets, _ = made(("bloom", "BloomForCausalLM"))
        assert "not packed: heads of transformer.h.*.self_attention" in str(fm.summary(fm.attach(model, subnets)))


def test_sparse_fine_tuning(tmp_path):
    """The full network runs: plain loading is right, and there is nothing to merge."""
    model, subnets, inputs = made()
    want = first_of(model(**inputs))
    fm.attach(model, subnets, forward="full").save_pretrained(tmp_path)
    with torch.no_grad():
        again = fm.from_pretrained(tmp_path).eval()
        assert torch.equal(first_of(again(**inputs)), want)
    assert attached(again).router.full_forward
    for call in (fm.merge, fm.extract):
        with pytest.raises(ValueError, match='attached with forward="full"'):
            call(model, "aa")


def test_rename():
    subnets = fm.Subnetworks(["a", "b"], heads=torch.ones(2, 1, 2, dtype=torch.bool))
    assert subnets.rename({"b": "c"}).languages == ("a", "c")
    with pytest.raises(KeyError, match="unknown language 'x'"):
        subnets.rename({"x": "y"})
    with pytest.raises(ValueError, match="more than once"):
        subnets.rename({"b": "a"})


def test_nothing_is_left_of_a_folder_that_is_gone(tmp_path):
    """Loading keeps files open, or looks for them again."""
    model, subnets, inputs = made()
    fm.attach(model, subnets).save_pretrained(tmp_path / "saved")
    again = fm.from_pretrained(tmp_path / "saved").eval()
    shutil.rmtree(tmp_path / "saved")
    assert first_of(again(**inputs, language_ids=torch.tensor([0, 1, 2]))).isfinite().all()
