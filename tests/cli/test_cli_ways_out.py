"""What people type is understood, or one line says what to type instead."""

from __future__ import annotations

import gzip
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from processes import exit_code, start_command
from typed_command import failure_of, output_of

from fastmask.cli import main
from fastmask.cli import train as train_command
from fastmask.tasks.data.treebanks import find_treebanks, select_treebanks
from fastmask.training import loop

TRAIN = ["--steps", "4", "--batch-size", "4", "--method", "full", "--dev-sentences", "2", "--threads", "1"]


@pytest.mark.parametrize("name", ["en", "EN", "English", "english", "UD_English-EWT"])
def test_names_of_languages(name: str, tmp_path: Path) -> None:
    """A code in capitals and a language's name stand for its code."""
    for bank in ("UD_English-EWT/en_ewt-ud-train.conllu", "UD_Old_French-X/fro_x-ud-train.conllu"):
        (tmp_path / bank).parent.mkdir()
        (tmp_path / bank).touch()
    banks = find_treebanks(tmp_path)
    assert list(select_treebanks(banks, name)) == ["en"]
    assert list(select_treebanks(banks, f"old french,{name}")) == ["fro", "en"]
    with pytest.raises(KeyError, match="unknown language or treebank 'Englisch'; did you mean"):
        select_treebanks(banks, "Englisch")


def test_languages_with_spaces_between(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--languages qaa qac`` is ``--languages qaa,qac``; treebanks, sizes, device and threads are named first."""
    output_of(capsys, "train", "--data", small_data, "--languages", "qaa", "qac", "--out", tmp_path / "run", *TRAIN)
    assert (tmp_path / "run" / "config.yaml").read_text().count("languages: qaa,qac\n") == 1


def test_what_is_done_is_said_without_a_terminal(small_data: Path, tmp_path: Path) -> None:
    """Under nohup the log says what is trained, on which data, how far it is, and what happens after the last step."""
    options = ["--data", small_data, "--languages", "qaa,qac", "--out", tmp_path / "run", *TRAIN]
    with (tmp_path / "nohup.out").open("wb") as log:
        assert exit_code(start_command("train", *options, stdout=log, stderr=log)) == 0
    said = (tmp_path / "nohup.out").read_text()
    assert "parsing, method full, model small" in said
    assert "on cpu, 1 threads;" in said
    assert "  qaa (UD_Avaran-Toy): 12 train, 3 dev, 3 test sentences" in said
    assert "full network" in said.splitlines()
    assert "step 4/4 (full network)" in said
    assert "scoring the test sets" in said
    assert "Loading weights" not in said
    assert "Saving the dataset" not in said


def test_a_compressed_file(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says that it is compressed, not that some byte is not UTF-8."""
    packed = tmp_path / "a.conllu.gz"
    packed.write_bytes(gzip.compress(b"1\ta\n" * 99))
    said = failure_of(capsys, "predict", small_run, packed, tmp_path / "out")
    assert "the file is compressed (expected text: unpack it)" in said


def test_a_file_for_a_folder(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--data`` of one treebank's file names the folder that was meant."""
    file = next(small_data.glob("UD_*/*-train.conllu"))
    said = failure_of(capsys, "train", "--data", file, "--out", tmp_path / "run")
    assert f"is a file (expected a folder of UD_* treebanks, such as {small_data.resolve()})" in said


def test_a_run_for_a_masks_file(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The masks of a run are shown, and trained, by its folder's name."""
    assert output_of(capsys, "masks", small_run) == output_of(capsys, "masks", small_run / "masks.safetensors")
    expected = f"{small_run.parent} has no masks.safetensors (expected a file of subnetworks, or a run with one)"
    assert expected in failure_of(capsys, "masks", small_run.parent)


def test_a_task_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is done, the nearest task is named, or the module that is missing."""
    for name, expected in (("tager", "did you mean 'tagging'"), ("no_such:Task", "there is no module 'no_such'")):
        assert main(["train", "--task", name, "--out", str(tmp_path / "run")]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_task_of_ones_own_lacks_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that somebody's own task imports in vain is no part of the extra `train`."""
    (tmp_path / "lacking_task.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = output_of(capsys, "train", "--task", "lacking_task:T", "--out", tmp_path / "run", code=2)
    assert "No module named 'nothing_of_that_name'" in said
    assert "extra" not in said


def test_interrupted(small_data: Path, tmp_path: Path) -> None:
    """Ctrl-C names the step it stopped after, and the command that resumes the run."""
    run = tmp_path / "a run"
    options = ["--data", small_data, "--languages", "qaa,qac", "--out", run, *TRAIN, "--checkpoint-every", "3"]
    with (tmp_path / "said").open("wb") as said_to:
        process = start_command("train", *options, "--steps", "100000", stderr=said_to)
    limit = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < limit
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert exit_code(process) == 130
    said = (tmp_path / "said").read_text()
    line = said.splitlines()[-1]
    assert line.startswith("interrupted: after step ")
    assert "Traceback" not in said
    again = shlex.split(line.rpartition(": ")[2])
    assert again == ["fastmask", "train", "--out", str(run), "--resume"]


@pytest.mark.parametrize("when", ["prepared", "resumed", "scoring"])
def test_interrupted_beside_the_steps(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Ctrl-C before the first step, and after the last one, says where it was all the same."""
    run = ["--data", small_data, "--languages", "qaa,qac", "--out", tmp_path / "run"]
    output_of(capsys, "train", *run, *TRAIN)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    places = {"prepared": (loop._Run, "__init__"), "resumed": (loop._Run, "_finish_step")}
    monkeypatch.setattr(*places.get(when, (train_command, "scored")), interrupt)
    said = output_of(capsys, "train", "--out", tmp_path / "run", "--resume", code=130)
    where = "before training began" if when == "prepared" else "after step 4"
    assert f"interrupted: {where}; to resume from the last checkpoint: fastmask train --out" in said
