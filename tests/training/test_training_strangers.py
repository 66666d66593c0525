"""A run's folder made by somebody else: nothing in it runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_loop import Killed, halves, kill_at
from toy_run import LANGUAGES, toy_config, toy_data, toy_parser, toy_task

from fastmask.cli import main
from fastmask.tasks.data.synthetic import write_treebanks
from fastmask.tasks.parsing.parser import Parser
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.run_folder import load_run
from tests.compare.tiny_encoder import tiny_encoder

SETTINGS = {"method": "dynamic", "update_every": 2, "update_sentences": 2}
PICKLES = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin", "scaler.pt")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def pickles(mark: Path) -> list[bytes]:
    """The same bomb as plain pickle, and in torch's format."""
    archive = io.BytesIO()
    torch.save(Bomb(mark), archive)
    return [pickle.dumps(Bomb(mark)), archive.getvalue()]


def run(folder: Path, hook: Any = None, **changes: Any) -> TrainResult:
    config = toy_config(folder, **{**SETTINGS, **changes})
    return train(toy_task(), toy_data(), config, halves, hook, progress=False)


def stop(step: int) -> None:
    """A hook that ends a run after a step: all that it reads of its folder it has read by then."""
    raise Killed


def seal(folder: Path) -> None:
    """Make the manifest that of the files in the folder, as somebody who means harm can."""
    from fastmask.files import MANIFEST, files_in, write_manifest

    names = [
        name for name in files_in(folder) if "manifest" not in name and not name.startswith(("check", "metr", "."))
    ]
    write_manifest(folder / MANIFEST, names)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        run(folder, kill_at(10))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("finished") / "run", method="static").run


def attempt(work: Any) -> None:
    """Do it, whatever comes of it: what counts is what has run meanwhile."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("form", [0, 1])
def test_pickles_in_a_checkpoint(form: int, sealed: bool, killed: Path, tmp_path: Path) -> None:
    """No file of a checkpoint is unpickled, whatever its name, and though its manifest says that it is right."""
    there = sorted(os.listdir(run_folder.folder_of(killed, 9)))
    for name in sorted({*there, *PICKLES}):
        folder, mark = tmp_path / name, tmp_path / f"{name}.mark"
        shutil.copytree(killed, folder)
        checkpoint = run_folder.folder_of(folder, 9)
        (checkpoint / name).write_bytes(pickles(mark)[form])
        if sealed and name != "manifest.json":
            seal(checkpoint)
        attempt(lambda folder=folder: run(folder, stop, resume=True))
        assert not mark.exists(), f"{name} was run"


def test_pickled_weights_in_a_model(finished: Path, tmp_path: Path) -> None:
    """An encoder's weights are read as safetensors or not at all, also those of a model to start from."""
    encoder = tmp_path / "run" / "model" / "encoder"
    shutil.copytree(finished, tmp_path / "run")
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickles(tmp_path / "mark")[1])
    seal(tmp_path / "run")
    with pytest.raises(OSError, match="safetensors"):
        load_run(tmp_path / "run")
    with pytest.raises(OSError, match="safetensors"):
        Parser.pretrained(encoder, toy_parser().vocabulary)
    assert not (tmp_path / "mark").exists()


EVIL = """
import os
os.mkdir({mark!r})
from transformers import BertConfig, BertModel
class EvilConfig(BertConfig):
    model_type = {kind!r}
class EvilModel(BertModel):
    config_class = EvilConfig
class EvilTokenizer:
    pass
"""


@pytest.mark.parametrize("kind", ["bert", "evil"])
def test_code_of_the_model(kind: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that a model's ``auto_map`` names do not run, even if somebody answers yes to whoever asks."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(finished, folder)
    encoder, tokenizer = folder / "model" / "encoder", folder / "model" / "tokenizer"
    tokenizer.mkdir()
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    config = json.loads((encoder / "config.json").read_text())
    for where in (encoder, tokenizer):
        (where / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": auto_map}))
        (where / "evil.py").write_text(EVIL.format(mark=str(mark), kind=kind))
        settings = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
        (where / "tokenizer_config.json").write_text(json.dumps(settings))
    attempt(lambda: load_run(folder))
    assert not mark.exists()
    seal(folder)
    attempt(lambda: load_run(folder))
    attempt(lambda: Parser.pretrained(encoder, toy_parser().vocabulary))
    description = folder / "model" / "parser.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), "buckets": None}))
    seal(folder)
    attempt(lambda: load_run(folder))
    assert not mark.exists()


def test_settings_that_point_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is resumed in its own folder, not where its settings say, with a warning about a damaged checkpoint."""
    write_treebanks(tmp_path / "ud", sentences={"train": 40, "dev": 4, "test": 4})
    monkeypatch.chdir(tmp_path)
    options = ["--languages", ",".join(LANGUAGES[:2]), "--method", "full", "--batch-size", "8", "--threads", "1"]
    options += ["--steps", "4", "--checkpoint-every", "1", "--eval-every", "0", "--model", "encoder"]
    tiny_encoder(tmp_path / "encoder", "".join(path.read_text() for path in tmp_path.glob("ud/UD_*/*.conllu")))
    assert main(["train", "--data", "ud", *options]) == 0
    settings = tmp_path / "runs" / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("out: runs/run", f"out: {tmp_path / 'home'}"))
    (run_folder.folder_of("runs/run", 4) / "progress.json").unlink()
    (tmp_path / "runs" / "run" / "manifest.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert main(["train", "--resume"]) == 0
    assert not (tmp_path / "home").exists()
    said = capsys.readouterr().err
    assert "fastmask train: warning: damaged checkpoint, going back to runs/run/checkpoints/step-00000003: " in said
    assert "runs/run/checkpoints/step-00000004/progress.json: is missing" in said
