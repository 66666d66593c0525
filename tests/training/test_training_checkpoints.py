"""Checkpoints: whole or not there, whenever the process is killed, and damaged ones are noticed."""

import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_process

from fastmask.files import (
    MANIFEST,
    FileError,
    check_files,
    read_tensors,
    remove_leftovers,
    replace_file,
    write_tensors,
)
from fastmask.training import run_folder
from fastmask.training.engine import random_state
from fastmask.training.run_folder import CheckpointError, Progress


def write(run: Path, step: int, model: torch.nn.Module | None = None, **options: Any) -> Path:
    """Write a checkpoint of method full."""
    model = torch.nn.Linear(40, 40) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters())
    moments = run_folder.optimizer_tensors(optimizer)
    writers = {
        run_folder.WEIGHTS: lambda path: write_tensors(path, model.state_dict()),
        run_folder.OPTIMIZER: lambda path: write_tensors(path, moments),
    }
    state = random_state(torch.device("cpu"))
    progress = Progress(inputs={}, sampler={}, window={}, history=[{"step": step}], evaluate=False, random=[state])
    return run_folder.save(run, step, writers, progress, **options)


def filled(value: float) -> torch.nn.Module:
    """A model all of whose weights name the step."""
    model = torch.nn.Linear(40, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def write_for_ever(run: str) -> None:
    """Go on from the newest checkpoint and write one after the other until killed."""
    torch.set_num_threads(1)
    remove_leftovers(run_folder.folder_of(run))
    newest = run_folder.newest_whole(run)
    step = run_folder.step_of(newest) if newest else 0
    while True:
        step += 1
        write(Path(run), step, filled(step))


def test_killed_while_writing(tmp_path: Path) -> None:
    """A process killed at a bad moment leaves a run whose newest checkpoint is whole."""
    reached, chance = 0, random.Random(0)
    for _ in range(5):
        process = start_process(write_for_ever, str(tmp_path))
        limit = time.monotonic() + 120
        while (path := run_folder.latest(tmp_path)) is None or path.name == f"step-{reached:08d}":
            assert time.monotonic() < limit, "nothing was written"
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = run_folder.latest(tmp_path)
        assert path is not None
        check_files(path)
        step = run_folder.step_of(path)
        assert step > reached
        model = torch.nn.Linear(40, 40)
        model.load_state_dict(read_tensors(path / run_folder.WEIGHTS)[0])
        assert all(bool((parameter == step).all()) for parameter in model.parameters())
        assert run_folder.read_progress(path).history == [{"step": step}]
        reached = step
    remove_leftovers(run_folder.folder_of(tmp_path))
    assert all(path.name.startswith("step-") for path in run_folder.folder_of(tmp_path).iterdir())


def test_the_last_two_stay(tmp_path: Path) -> None:
    """Old checkpoints go, and half-written ones are not taken for any."""
    assert run_folder.latest(tmp_path) is None
    assert run_folder.newest_whole(tmp_path) is None
    for step in (5, 50, 500, 123456789):
        write(tmp_path, step)
    folder = run_folder.folder_of(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000500", "step-123456789"]
    (folder / ".partial-0123456789ab-step-999999999").mkdir()
    assert run_folder.latest(tmp_path) == folder / "step-123456789"


def test_so_many_stay_as_are_asked_for(tmp_path: Path) -> None:
    """An analysis along training finds the checkpoints that were asked for."""
    for name, keep, wanted in (("all", 0, [1, 2, 3, 4]), ("three", 3, [2, 3, 4]), ("pinned", 1, [1, 4])):
        for step in (1, 2, 3, 4):
            write(tmp_path / name, step, keep=keep, pinned=1 if name == "pinned" else None)
        found = run_folder.complete(tmp_path / name)
        assert [run_folder.step_of(path) for path in found] == wanted
        assert run_folder.latest(tmp_path / name) == found[-1]


def test_a_whole_one_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    """Writing the same step again leaves no moment without a checkpoint, and heals a damaged one."""
    path = write(tmp_path, 1, filled(1))
    before = (path / run_folder.WEIGHTS).stat().st_ino
    write(tmp_path, 1, filled(1))
    assert (path / run_folder.WEIGHTS).stat().st_ino == before
    (path / run_folder.PROGRESS).write_text("{}")
    write(tmp_path, 1, filled(1))
    check_files(path)
    assert [path.name for path in run_folder.folder_of(tmp_path).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("wrong", ["missing", "truncated", "flipped"])
def test_every_damaged_file_is_named(wrong: str, tmp_path: Path) -> None:
    """Whatever happened to a file of a checkpoint, it is named, and nothing of the checkpoint is used."""
    for name in [run_folder.WEIGHTS, run_folder.OPTIMIZER, run_folder.PROGRESS, MANIFEST]:
        path = write(tmp_path / name, 1)
        file = path / name
        content = file.read_bytes()
        if wrong == "flipped":
            at = len(content) // 2
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        else:
            file.unlink()
            if wrong == "truncated":
                file.write_bytes(content[:-1])
        # A flipped bit of a manifest can be in a name or in a checksum: then that file is named.
        named = path if (name, wrong) == (MANIFEST, "flipped") else file
        with pytest.raises(FileError, match=rf"^{named}"):
            check_files(path)
        with pytest.raises(CheckpointError, match=rf"no checkpoint in .* is whole .*: {named}"):
            run_folder.newest_whole(tmp_path / name)


def test_scores_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    """A resumed run has the history of an unbroken one, also where a score was infinite or NaN."""
    history = [{"step": 1, "dev_score": math.inf, "dev": {"en": {"perplexity": math.inf, "f1": math.nan}}}]
    state = random_state(torch.device("cpu"))
    progress = Progress(
        inputs={}, sampler={}, window={"loss": math.nan}, history=history, evaluate=False, random=[state]
    )
    again = run_folder.read_progress(run_folder.save(tmp_path, 1, {}, progress))
    assert repr((again.history, again.window)) == repr((history, {"loss": math.nan}))


def test_a_newer_one_that_is_damaged_is_gone_back_beyond(tmp_path: Path) -> None:
    """The newest whole checkpoint is taken, with a warning that says what is wrong with later ones."""
    paths = [write(tmp_path, step, keep=0) for step in (1, 2, 3)]
    (paths[2] / run_folder.WEIGHTS).unlink()
    (paths[1] / run_folder.PROGRESS).write_bytes(b"short")
    with pytest.warns(UserWarning, match="going back to") as warned:
        newest = run_folder.newest_whole(tmp_path)
    assert newest is not None
    assert newest == paths[0]
    said = [str(warning.message) for warning in warned]
    assert [str(path / name) in said[at] for at, (path, name) in enumerate(
        [(paths[2], run_folder.WEIGHTS), (paths[1], run_folder.PROGRESS)]
    )] == [True, True]  # fmt: skip


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """A failed write leaves the file that was there, and no other."""
    target = tmp_path / "masks"
    replace_file(target, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
    assert target.read_text() == "old"
