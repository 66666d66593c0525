"""The folder of a run: one process at a time, nothing of others is deleted, a full disk loses nothing."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from processes import start_process
from test_training_loop import Killed, kill_at, random_subnetworks
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_task

import fastmask as fm
from fastmask.files import HeldError, check_files
from fastmask.tasks.parsing.task import Parsing
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.run_folder import load_run


def run(folder: Path, hook: Any = None, **changes: Any) -> TrainResult:
    config = toy_config(folder, **{"method": "static", **changes})
    return train(toy_task(), toy_data(), config, random_subnetworks, hook, progress=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(tmp_path_factory.mktemp("unbroken") / "run")


# ---- two processes


def train_slowly(folder: str) -> None:
    run(Path(folder), lambda step: time.sleep(0.1))


def wait_for(path: Path, process: Any) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < limit, f"{path} never came"
        assert process.is_alive()
        time.sleep(0.01)


def test_a_second_process_is_told_who_is_training_there(unbroken: TrainResult, tmp_path: Path) -> None:
    """The second one changes nothing, and names the first, which ends as if there had been no other."""
    folder = tmp_path / "run"
    process = start_process(train_slowly, str(folder))
    wait_for(run_folder.folder_of(folder, 3), process)
    with pytest.raises(HeldError, match=rf"{folder} is in use by process {process.pid} on .*, since 20"):
        run(folder, resume=True)
    process.join()
    assert process.exitcode == 0
    assert metrics(folder) == metrics(unbroken.run)
    assert_same_weights(load_run(folder).task.model, load_run(unbroken.run).task.model)
    run(folder, resume=True)  # the folder is free again


# ---- what is deleted, and where is written


def test_only_our_own_leftovers_are_deleted(tmp_path: Path) -> None:
    """Starting a run deletes what killed ones left half done, and no other hidden file or folder."""
    folder = tmp_path / "run"
    theirs = [folder / ".git" / "HEAD", folder / "checkpoints" / ".git" / "HEAD", folder / "checkpoints" / ".notes"]
    theirs += [folder / ".partial-of-mine", folder / "checkpoints" / ".old-letters" / "a"]
    ours = [
        folder / ".partial-0123456789ab-config.yaml",
        folder / "checkpoints" / ".old-0123456789ab-step-00000003" / "x",
    ]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    run(folder)
    assert all(path.read_text() == "x" for path in theirs)
    assert not any(path.exists() for path in ours)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 800 KB, which holds a few checkpoints; call it to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_nothing_half_done(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.startswith((".partial-", ".old-"))]
    newest = run_folder.latest(folder)
    assert newest is not None
    check_files(newest)


def test_a_full_disk(small_disk: Path, unbroken: TrainResult) -> None:
    """The error names the file that did not fit, earlier checkpoints are whole, and with more room the run resumes."""
    folder = small_disk / "run"
    with pytest.raises(OSError, match=rf"cannot write: No space left on device.*{folder}") as full:
        run(folder, keep_checkpoints=0)
    assert Path(full.value.filename).is_relative_to(folder)
    assert_nothing_half_done(folder)
    with pytest.raises(OSError, match=rf"No space left on device.*{folder}"):
        run(folder, keep_checkpoints=0, resume=True)  # still as full
    assert_nothing_half_done(folder)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    resumed = run(folder, keep_checkpoints=0, resume=True)
    assert_same_weights(resumed.task.model, unbroken.task.model)
    assert metrics(folder) == metrics(unbroken.run)


def train_with_small_files(folder: str, limit: int, said: str) -> None:
    toy_data()  # writes files, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(Path(folder))
    except OSError as error:
        Path(said).write_text(f"{type(error).__name__}: {error}")


def test_a_file_that_becomes_too_large(unbroken: TrainResult, tmp_path: Path) -> None:
    """Whichever file cannot be written whole, it is named, and what was there before is left."""
    sizes = {path.stat().st_size for path in run_folder.folder_of(unbroken.run, 12).iterdir()}
    said = tmp_path / "said.txt"
    for number, limit in enumerate(sorted(sizes)[2:]):
        folder = tmp_path / str(number)
        process = start_process(train_with_small_files, str(folder), limit - 1, str(said))
        process.join()
        message = said.read_text()
        assert re.match(rf"OSError: \[Errno 27\] cannot write: File too large.*: '{folder}/", message), message
        assert not list(folder.rglob(".partial-*"))
        assert_same_weights(run(folder, resume=True).task.model, unbroken.task.model)


# ---- what was trained is on disk before it is scored


def no_score(*_: Any) -> Any:
    raise ArithmeticError("no score today")


@pytest.mark.parametrize("steps", [12, 5])
def test_a_failing_score_loses_nothing(
    steps: int, unbroken: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores fail at the end, or at step 5 of 12: all that was trained is kept, and resuming only scores again."""
    folder, every = tmp_path / "run", {12: {"eval_every": 0}, 5: {"checkpoint_every": 5}}[steps]
    expected = run(tmp_path / "unbroken", **every)
    for resume in (False, True):
        done: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Parsing, "score", no_score)
            with pytest.raises(ArithmeticError, match="no score today"):
                run(folder, done.append, resume=resume, **every)
        newest = run_folder.latest(folder)
        assert newest is not None
        assert run_folder.step_of(newest) == steps
        assert not resume or not done
    if steps == 12:
        assert_same_weights(load_run(folder).task.model, load_run(expected.run).task.model)
    done = []
    resumed = run(folder, done.append, resume=True, **every)
    assert done == list(range(steps + 1, 13))
    assert_same_weights(resumed.task.model, expected.task.model)
    assert metrics(folder) == metrics(expected.run)


def test_a_finished_run_is_only_scored(unbroken: TrainResult, tmp_path: Path) -> None:
    """Resuming a run that has finished trains nothing and leaves the same, also where its model was damaged."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.run, folder)
    (folder / "model" / "parser.safetensors").write_bytes(b"")
    steps: list[int] = []
    resumed = run(folder, steps.append, resume=True)
    assert not steps
    assert_same_weights(resumed.task.model, unbroken.task.model)
    assert_same_weights(load_run(folder).task.model, load_run(unbroken.run).task.model)
    assert metrics(folder) == metrics(unbroken.run)
    assert resumed.subnetworks.languages == unbroken.subnetworks.languages


def test_a_finished_run_without_checkpoints(unbroken: TrainResult, tmp_path: Path) -> None:
    """It is not trained anew over what is left."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(run_folder.CheckpointError, match=r"has finished, and its checkpoints are gone"):
        run(folder, resume=True)
    assert_same_weights(load_run(folder).task.model, unbroken.task.model)


def test_the_start_is_said(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint begins anew, and says so."""
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at(2))
    with pytest.warns(UserWarning, match="has no checkpoint yet: it starts anew"):
        run(tmp_path / "run", resume=True)
    assert fm.Subnetworks.load(tmp_path / "run" / "masks.safetensors").languages == tuple(LANGUAGES)
