"""Subnetworks travel with their model: folders, the Trainer's checkpoints, the Hub."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from every_model import LANGUAGES, MODELS, assert_same, first_of, made
from safetensors.torch import load_file
from tiny_models import batch, tiny

import fastmask as fm
from fastmask.models.attach import attached, is_attached
from fastmask.models.calls import UNLOADED
from fastmask.models.editing import set_subnetworks

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
        saved = model.state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
        assert_same(first_of(again.eval()(**inputs, language_ids=ids)), want)
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "license: mit" in card
        assert "| aa | 50% | 50% |" in card or "| aa | " in card
        assert "- found: by chance" in card

    def test_the_method_of_the_model(self, tmp_path):
        """`model.save_pretrained` saves masks, too."""
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
        assert_same(first_of(again(**inputs, language_ids=ids)), first_of(model.eval()(**inputs, language_ids=ids)))

    def test_weights_of_the_base_that_were_trained_since(self, tmp_path):
        """Masks alone are loaded with a warning where the base has other weights than they were saved with."""
        from transformers import BertForMaskedLM

        model, subnets, _ = made()
        model.save_pretrained(tmp_path / "base")
        model = fm.attach(BertForMaskedLM.from_pretrained(tmp_path / "base"), subnets)
        fm.save_pretrained(model, tmp_path / "unchanged", weights=False)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias += 1
        fm.save_pretrained(model, tmp_path / "trained", weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fm.from_pretrained(tmp_path / "unchanged")
            fm.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)  # which nobody can compare
        with pytest.warns(
            UserWarning, match=r"trained: the weights of .*base are not those .*fastmask\.save_pretrained"
        ):
            fm.from_pretrained(tmp_path / "trained")

    def test_another_class(self, tmp_path):
        from transformers import AutoModel, AutoModelForTokenClassification

        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        bare = fm.from_pretrained(tmp_path, model_class=AutoModel)
        assert type(bare).__name__ == "BertModel"
        assert is_attached(fm.from_pretrained(tmp_path, model_class=AutoModelForTokenClassification, num_labels=5))

    def test_saved_again(self, tmp_path):
        """What was said of a model when it was first saved is still said of it; of other masks, it is not."""
        model, subnets, _ = made()
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
        fm.save_pretrained(fm.attach(model, subnets), tmp_path / "a", licence="mit", metadata={"found": "by LAPE"})
        fm.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        again = fm.from_pretrained(tmp_path / "b")
        fm.save_pretrained(again, tmp_path / "b", metadata={"trained": "here"})  # where it was loaded from
        card, about = (
            (tmp_path / "b" / "README.md").read_text(),
            json.loads((tmp_path / "b" / "fastmask.json").read_text()),
        )
        assert about["base"] == str(tmp_path / "base")
        assert all(text in card for text in ("license: mit", "found: by LAPE", "trained: here"))
        again = fm.from_pretrained(tmp_path / "b")
        fm.save_pretrained(again, tmp_path / "masks", weights=False)  # which are for these weights
        assert json.loads((tmp_path / "masks" / "fastmask.json").read_text())["base"] == str(tmp_path / "b")
        fm.attach(fm.detach(again), subnets).save_pretrained(tmp_path / "c")
        about = json.loads((tmp_path / "c" / "fastmask.json").read_text())
        assert about["base"] == str(tmp_path / "b")
        assert not about["metadata"]
        small = fm.from_pretrained(tmp_path / "b")
        fm.save_pretrained(fm.extract(small, LANGUAGES[0]), tmp_path / "small")
        fm.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "small")

    def test_somebody_elses_card(self, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_somebody_elses_files(self, tmp_path):
        """What lies beside the weights stays as it is."""
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
        """Masks are never put on a plain model that was saved over theirs: loading it is an error."""
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        fm.detach(model)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is not the file that was saved with the subnetworks"):
            fm.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"metadata": {"version": "1"}}, "metadata has 'version'"), ({"push_to_hub": True}, "use model.push_to_hub")],
    )
    def test_what_is_refused_leaves_the_folder_as_it_was(self, options, message, tmp_path):
        model, subnets, inputs = made()
        expected = first_of(fm.attach(model, subnets)(**inputs, language="aa"))
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with pytest.raises(ValueError, match=message):
            fm.save_pretrained(model, tmp_path, **options)
        assert torch.equal(first_of(fm.from_pretrained(tmp_path)(**inputs, language="aa")), expected)

    def test_a_model_inside_of_another(self, tmp_path):
        """Its masks have the names and layers of the whole model, without which they would not fit."""
        model, subnets, _ = made()
        inner = fm.attach(model, subnets).bert
        for save in (inner.save_pretrained, lambda folder: fm.save_pretrained(inner, folder)):
            with pytest.raises(ValueError, match="this BertModel is a part of a model with subnetworks attached"):
                save(tmp_path / "inner")
        assert not (tmp_path / "inner").exists()
        fm.detach(model)
        inner.save_pretrained(tmp_path / "inner")

    @pytest.mark.parametrize("change", [torch.zeros_like, lambda saved: saved * 0.5, lambda _: torch.zeros(1)])
    def test_masks_among_weights_that_cannot_be_read(self, change, tmp_path):
        """Of weights that were averaged or cast, say: they are loaded, and the masks stay."""
        model, subnets, _ = made()
        fm.attach(model, subnets).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights[UNLOADED] = change(weights[UNLOADED])
        first = next(name for name in weights if name != UNLOADED)
        weights[first] = weights[first] + 1
        with pytest.warns(UserWarning, match="no masks that can be read: those attached stay"):
            model.load_state_dict(weights, strict=False)
        assert attached(model).subnets == subnets
        assert torch.equal(model.state_dict()[first], weights[first])

    def test_bad_input(self, tmp_path):
        model, subnets, _ = made()
        with pytest.raises(ValueError, match="BertForMaskedLM has no subnetworks attached"):
            fm.save_pretrained(model, tmp_path)
        run = tmp_path / "run"
        (run / "model").mkdir(parents=True)
        fm.Subnetworks(["a"], heads=torch.ones(1, 1, 2, dtype=torch.bool)).save(run / "masks.safetensors")
        for folder in (run, run / "model"):
            with pytest.raises(FileNotFoundError, match=r"attach fastmask\.Subnetworks\.load\('.*run'\) to the plain"):
                fm.from_pretrained(folder)
        with pytest.raises(FileNotFoundError, match="was not saved by fastmask"):
            fm.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="weights=False keeps only masks"):
            fm.save_pretrained(fm.attach(model, subnets), tmp_path, weights=False)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="output_loading_info=True is not supported"):
            fm.from_pretrained(tmp_path, output_loading_info=True)
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
    """A run's checkpoints, and the best model it ends with, have masks."""
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


def test_masks_that_change_during_training(tmp_path):
    """Resumed, and with the best checkpoint loaded at the end, weights have the masks that they were saved with."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = tiny("bert", "tokens", num_labels=50).float()
    first, second = (fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=s, units="both") for s in (0, 1))
    fm.attach(model, first)

    class Changes(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                set_subnetworks(model, second)

    def trainer(model, steps, **options):
        scores = iter([1.0, 0.0, 0.0])  # the first checkpoint is the best one
        options |= {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 3, "use_cpu": True}
        return Trainer(
            model,
            TrainingArguments(tmp_path, report_to=[], disable_tqdm=True, **options),
            train_dataset=Sentences(),
            eval_dataset=Sentences(),
            callbacks=[Changes()],
            compute_metrics=lambda _: {"score": next(scores)},
        )

    best_one = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    best = trainer(model, 4, eval_strategy="steps", eval_steps=2, **best_one)
    with pytest.warns(UserWarning, match="bring those along"):
        best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    assert attached(model).subnets == first
    fresh = fm.attach(tiny("bert", "tokens", num_labels=50).float(), first)
    with pytest.warns(UserWarning, match="bring those along"):
        trainer(fresh, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert attached(fresh).subnets == second
    neurons = fm.attach(tiny("bert", "tokens", num_labels=50).float(), fm.Subnetworks(LANGUAGES, neurons=first.neurons))
    with pytest.warns(UserWarning, match=r"stay as they are .*mask \{'neurons'"):
        neurons.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))


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
        loaded = fm.from_pretrained("someone/finnish")
        assert attached(loaded).subnets == subnets
        fm.add_language(loaded, "new", subnets.select(["aa"]))
        fm.save_pretrained(loaded, tmp_path / "masks", weights=False)  # names what anybody can load
        about = json.loads((tmp_path / "masks" / "fastmask.json").read_text())
        assert (about["base"], about["revision"]) == ("someone/finnish", "a" * 40)
        with pytest.raises(FileNotFoundError, match=r"someone/swedish: no such folder, and not on the Hub"):
            fm.from_pretrained("someone/swedish")

    def test_push(self, tmp_path, monkeypatch):
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
        # What huggingface_hub reads of the environment as it is imported.
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("ENDPOINT", url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        fm.from_pretrained(tmp_path / "saved").push_to_hub("someone/finnish", token="hf_" + "x" * 30)
        server.shutdown()
        assert {"fastmask.json", "subnetworks.safetensors", "model.safetensors", "config.json"} <= received.keys()


def test_nothing_is_left_of_a_folder_that_is_gone(tmp_path):
    """Once loaded, a model needs none of its files."""
    model, subnets, inputs = made()
    fm.attach(model, subnets).save_pretrained(tmp_path / "saved")
    again = fm.from_pretrained(tmp_path / "saved").eval()
    shutil.rmtree(tmp_path / "saved")
    assert first_of(again(**inputs, language_ids=torch.tensor([0, 1, 2]))).isfinite().all()
