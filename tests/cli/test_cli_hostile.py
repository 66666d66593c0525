"""Files made to do harm: nothing in them runs."""

from __future__ import annotations

import json
import os
import pty
import shutil
import struct

import pytest
from finished_run import LANGUAGES
from hang import no_hang
from processes import exit_code, start_command
from typed_command import failure_of

from fastmask.cli import main

TINY = ["--languages", LANGUAGES, "--steps", "2", "--density", "0.5", "--batch-size", "4", "--score-sentences", "4"]
TINY += ["--dev-sentences", "2", "--eval-every", "0", "--threads", "1"]


@pytest.fixture
def outside(tmp_path):
    """A file and an empty folder that nothing may be done to."""
    (tmp_path / "precious").write_text("old")
    (tmp_path / "empty").mkdir()
    yield tmp_path
    assert (tmp_path / "precious").read_text() == "old"
    assert os.listdir(tmp_path / "empty") == []


CONFIGS = {
    "code": "out: !!python/object/apply:os.system ['touch ran']",
    "module": "!!python/module:antigravity",
    "nested list": "out: " + "[" * 60_000,
    "nested map": "out: " + "{a: " * 15_000,
    "nested block": "- " * 30_000,
    "digits": "steps: " + "9" * 60_000,
    "bytes": "steps: \x00",
    "documents": "steps: 3\n---\nsteps: 4",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings(outside, name, capsys, monkeypatch):
    """A file of settings with code, or nested beyond reason, is refused in one line that names it."""
    monkeypatch.chdir(outside)
    (outside / "config.yaml").write_text(CONFIGS[name])
    with no_hang():
        said = failure_of(capsys, "train", "--config", "config.yaml", "--out", "run")
    assert "config.yaml" in said
    assert len(said) < 700
    assert sorted(os.listdir(outside)) == ["config.yaml", "empty", "precious"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "documents"])
def test_settings_of_a_run(outside, small_run, name, capsys, monkeypatch):
    """So is the file of settings in a run that somebody else made."""
    shutil.copytree(small_run, outside / "run")
    monkeypatch.chdir(outside)
    (outside / "run" / "config.yaml").write_text(CONFIGS[name])
    with no_hang():
        assert "config.yaml" in failure_of(capsys, "evaluate", "run")
    assert sorted(os.listdir(outside)) == ["empty", "precious", "run"]


BOMBS = {
    "long header": struct.pack("<Q", 2**63),
    "header of terabytes": struct.pack("<Q", 2**40) + b"{}",
    "nested header": struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
    "huge tensor": b'{"heads":{"dtype":"U8","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
    "many tensors": json.dumps(
        {f"weights.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(80_000)}
    ).encode(),
    "pickle": b"\x80\x04\x95" + b"cposix\nsystem\n(S'touch ran'\ntR.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_masks_files(outside, name, capsys, monkeypatch):
    """A masks file that promises more than it has is refused before memory is taken, in one line that names it."""
    monkeypatch.chdir(outside)
    content = BOMBS[name]
    if content.startswith(b"{"):
        content = struct.pack("<Q", len(content)) + content + b"\0\0\0\0"
    (outside / "m.safetensors").write_bytes(content)
    with no_hang():
        assert "m.safetensors: " in failure_of(capsys, "masks", "m.safetensors")
    assert sorted(os.listdir(outside)) == ["empty", "m.safetensors", "precious"]


JSON_BOMBS = {
    "nested": '{"adaptations": ' + "[" * 200_000,
    "digits": '{"adaptations": ' + "9" * 1_000_000 + "}",
    "other": '{"adaptations": [3]}',
}


@pytest.mark.parametrize("name", JSON_BOMBS)
@pytest.mark.parametrize("file", ["results.json", "model/parser.json"])
def test_json_of_a_run(outside, small_run, small_data, name, file, capsys, monkeypatch):
    """JSON that is nested or long beyond reason, or of other types, is refused in one line that names the file."""
    shutil.copytree(small_run, outside / "run")
    monkeypatch.chdir(outside)
    (outside / "run" / file).write_text(JSON_BOMBS[name])
    support = next(small_data.glob("UD_*/qaf_toy-ud-train.conllu"))
    options = ["--language", "qaf", "--support", support, "--sentences", "2", "--steps", "1", "--choose", "union"]
    with no_hang():
        assert os.path.basename(file) in failure_of(capsys, "adapt", "run", *options, "--out", "new")
    assert sorted(os.listdir(outside)) == ["empty", "precious", "run"]


EVIL = "import pathlib\npathlib.Path({!r}).touch()\nclass Evil: pass\n"


@pytest.fixture(params=["AutoConfig", "AutoModel", "AutoTokenizer"])
def model(request, outside):
    """A model folder of a kind that transformers does not know, with code of its own."""
    folder = outside / "model"
    folder.mkdir()
    mapped = {name: "evil.Evil" for name in {"AutoConfig", request.param}}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": mapped}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(EVIL.format(str(outside / "ran")))
    return folder


def test_code_in_a_model(model, outside, small_data, capsys):
    """``model:`` in a file of settings may name a folder with code: it does not run, and the message says why."""
    (outside / "config.yaml").write_text(f"model: {model}\ndata: {small_data}\nlanguages: {LANGUAGES}\n")
    with no_hang(wait=30):
        assert main(["train", "--config", str(outside / "config.yaml"), "--out", str(outside / "run")]) == 1
    assert "this is a bug" not in capsys.readouterr().err
    assert not (outside / "ran").exists()


def test_nobody_is_asked_whether_code_may_run(outside, small_data):
    """At a terminal, where a library could ask and somebody could type y, nothing is asked and nothing runs."""
    folder = outside / "model"
    folder.mkdir()
    mapped = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": mapped}))
    (folder / "evil.py").write_text(EVIL.format(str(outside / "ran")))
    arguments = ["train", "--model", folder, "--data", small_data, "--languages", LANGUAGES, "--out", outside / "run"]
    master, slave = pty.openpty()
    os.write(master, b"y\ny\ny\n")
    with (outside / "said").open("wb") as said:
        process = start_command(*arguments, stdin=slave, stdout=slave, stderr=said)
    assert exit_code(process) == 1
    os.close(master)
    os.close(slave)
    assert not (outside / "ran").exists()
    said = (outside / "said").read_text()
    assert "error: " in said
    assert "[y/N]" not in said
