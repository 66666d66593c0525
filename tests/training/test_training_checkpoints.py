"""Checkpoints: whole or not there, whenever the process is killed, and damaged ones are noticed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_process
from toy_run import toy_config

from fastmask.files import FileError, remove_leftovers, replace_file
from fastmask.files.manifest import MANIFEST, Origin
from fastmask.training import checkpoints
from fastmask.training.checkpoints import CheckpointError, Progress
from fastmask.training.engine import random_state

CONFIG = toy_config("out")


def origin(step: int) -> Origin:
    return Origin(step=step, processes=1, settings=CONFIG.identity(), inputs={})


def write(run: Path, step: int, model: torch.nn.Module | None = None, **options: Any) -> Path:
    """Write a checkpoint of method full."""
    model = torch.nn.Linear(40, 40) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters())
    device = torch.device("cpu")
    writers = {
        checkpoints.MODEL: lambda path: checkpoints.save_weights(model, path),
        checkpoints.OPTIMIZER: lambda path: checkpoints.save_optimizer(optimizer, path),
        checkpoints.RANDOM: lambda path: checkpoints.save_random_states([random_state(device)], path),
    }
    progress = Progress(sampler={}, window={}, history=[{"step": step}], evaluate=False)
    return checkpoints.save(run, origin(step), writers, progress, **options)


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
    remove_leftovers(checkpoints.folder_of(run))
    newest = checkpoints.newest_whole(run)
    step = newest[1].step if newest else 0
    while True:
        step += 1
        write(Path(run), step, filled(step))


def test_killed_while_writing(tmp_path: Path) -> None:
    """A process killed at a bad moment leaves a run whose newest checkpoint is whole."""
    reached, chance = 0, random.Random(0)
    for _ in range(5):
        process = start_process(write_for_ever, str(tmp_path))
        limit = time.monotonic() + 120
        while (path := checkpoints.latest(tmp_path)) is None or path.name == f"step-{reached:08d}":
            assert time.monotonic() < limit, "nothing was written"
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        path = checkpoints.latest(tmp_path)
        assert path is not None
        step = checkpoints.check(path).step
        assert step > reached
        model = torch.nn.Linear(40, 40)
        checkpoints.load_weights(model, path / checkpoints.MODEL)
        assert all(bool((parameter == step).all()) for parameter in model.parameters())
        assert checkpoints.read_progress(path).history == [{"step": step}]
        reached = step
    remove_leftovers(checkpoints.folder_of(tmp_path))
    assert all(path.name.startswith("step-") for path in checkpoints.folder_of(tmp_path).iterdir())


def test_the_last_two_stay(tmp_path: Path) -> None:
    """Old checkpoints go, and half-written ones are not taken for any."""
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.newest_whole(tmp_path) is None
    for step in (5, 50, 500, 123456789):
        write(tmp_path, step)
    folder = checkpoints.folder_of(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000500", "step-123456789"]
    (folder / ".partial-0123456789ab-step-999999999").mkdir()
    assert checkpoints.latest(tmp_path) == folder / "step-123456789"


def test_so_many_stay_as_are_asked_for(tmp_path: Path) -> None:
    """An analysis along training finds the checkpoints that were asked for."""
    for name, keep, wanted in (("all", 0, [1, 2, 3, 4]), ("three", 3, [2, 3, 4]), ("pinned", 1, [1, 4])):
        for step in (1, 2, 3, 4):
            write(tmp_path / name, step, keep=keep, pinned=1 if name == "pinned" else None)
        found = checkpoints.complete(tmp_path / name)
        assert [checkpoints.step_of(path) for path in found] == wanted
        assert checkpoints.latest(tmp_path / name) == found[-1]


def test_a_whole_one_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    """Writing the same step again leaves no moment without a checkpoint, and heals a damaged one."""
    path = write(tmp_path, 1, filled(1))
    before = (path / checkpoints.MODEL).stat().st_ino
    write(tmp_path, 1, filled(1))
    assert (path / checkpoints.MODEL).stat().st_ino == before
    (path / checkpoints.PROGRESS).write_text("{}")
    write(tmp_path, 1, filled(1))
    assert checkpoints.check(path).step == 1
    assert [path.name for path in checkpoints.folder_of(tmp_path).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("wrong", ["missing", "truncated", "flipped", "a link", "a FIFO", "superfluous"])
def test_every_damaged_file_is_named(wrong: str, tmp_path: Path) -> None:
    """Whatever happened to a file of a checkpoint, it is named, and nothing of the checkpoint is used."""
    for name in [checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.RANDOM, checkpoints.PROGRESS, MANIFEST]:
        path = write(tmp_path / name, 1)
        file = path / name
        content = file.read_bytes()
        if wrong == "superfluous":
            file = path / "masks.safetensors"
            file.write_bytes(content)
        elif wrong == "flipped":
            at = len(content) // 2
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        else:
            file.unlink()
            if wrong == "truncated":
                file.write_bytes(content[:-1])
            elif wrong == "a link":
                (tmp_path / "elsewhere").write_bytes(content)
                file.symlink_to(tmp_path / "elsewhere")
            elif wrong == "a FIFO":
                os.mkfifo(file)
        with pytest.raises(FileError, match=rf"^{file}: "):
            checkpoints.check(path)
        with pytest.raises(CheckpointError, match=rf"no checkpoint in .* is whole .*: {file}: "):
            checkpoints.newest_whole(tmp_path / name)


def test_a_newer_one_that_is_damaged_is_gone_back_beyond(tmp_path: Path) -> None:
    """The newest whole checkpoint is taken, with a warning that says what is wrong with later ones."""
    paths = [write(tmp_path, step, keep=0) for step in (1, 2, 3)]
    (paths[2] / checkpoints.MODEL).unlink()
    (paths[1] / checkpoints.RANDOM).write_bytes(b"short")
    with pytest.warns(UserWarning, match="going back to") as warned:
        newest = checkpoints.newest_whole(tmp_path)
    assert newest is not None
    assert newest[0] == paths[0]
    said = [str(warning.message) for warning in warned]
    assert [str(path / name) in said[at] for at, (path, name) in enumerate(
        [(paths[2], checkpoints.MODEL), (paths[1], checkpoints.RANDOM)]
    )] == [True, True]  # fmt: skip


def test_a_checkpoint_of_another_step(tmp_path: Path) -> None:
    """A renamed checkpoint is damaged although its files are whole."""
    path = write(tmp_path, 7)
    moved = path.with_name("step-00000009")
    path.rename(moved)
    with pytest.raises(FileError, match=r"step-00000009: was written after 7 steps"):
        checkpoints.check(moved)


def test_a_newer_version_is_said(tmp_path: Path) -> None:
    """A manifest written by a later version of fastmask is refused."""
    path = write(tmp_path, 1)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(FileError, match=r"manifest.json: has version 2 \(expected at most 1"):
        checkpoints.check(path)


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
