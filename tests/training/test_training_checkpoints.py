"""Checkpoints: whole or not there, whenever the process is killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from toy_run import start_process

from fastmask.files import replace_file
from fastmask.training import checkpoints
from fastmask.training.checkpoints import CheckpointError


def prepared() -> tuple[Accelerator, torch.nn.Module, torch.optim.Optimizer]:
    """Return an accelerator with a small model."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(40, 40)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator, model, optimizer


def fill(model: torch.nn.Module, value: float) -> None:
    """Set all weights to a number that names the step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def write_for_ever(run: str) -> None:
    """Go on from the latest checkpoint and write one after the other until killed."""
    torch.set_num_threads(1)
    accelerator, model, optimizer = prepared()
    checkpoints.clean(run)
    path = checkpoints.latest(run)
    step = checkpoints.read_progress(path)["step"] if path else 0
    while True:
        step += 1
        model(torch.randn(2, 40)).sum().backward()
        optimizer.step()
        fill(model, step)
        masks = f"{step}"
        checkpoints.save(accelerator, run, step, {}, lambda path, masks=masks: path.write_text(masks))


def test_killed_while_writing(tmp_path: Path) -> None:
    """If this fails, a process killed at a bad moment leaves a run that cannot be resumed."""
    accelerator, model, _ = prepared()
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
        step = checkpoints.read_progress(path)["step"]
        assert step > reached
        checkpoints.load(accelerator, path)
        assert all(bool((parameter == step).all()) for parameter in model.parameters())
        assert (path / checkpoints.MASKS).read_text() == str(step)
        reached = step
    checkpoints.clean(tmp_path)
    assert all(path.name.startswith("step-") for path in checkpoints.folder_of(tmp_path).iterdir())


def test_the_last_two_stay_and_half_written_ones_are_ignored(tmp_path: Path) -> None:
    """If this fails, the disk fills up, or a half-written folder is taken for a checkpoint."""
    accelerator, _, _ = prepared()
    assert checkpoints.latest(tmp_path) is None
    for step in (5, 50, 500, 123456789):
        checkpoints.save(accelerator, tmp_path, step, {})
    folder = checkpoints.folder_of(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000500", "step-123456789"]
    (folder / ".partial-step-999999999").mkdir()
    (folder / "step-999999999").mkdir()  # no progress.json: not one of ours
    assert checkpoints.latest(tmp_path) == folder / "step-123456789"
    checkpoints.clean(tmp_path)
    assert not (folder / ".partial-step-999999999").exists()


def test_so_many_stay_as_are_asked_for(tmp_path: Path) -> None:
    """If this fails, an analysis along training finds no checkpoints although they were asked for."""
    accelerator, _, _ = prepared()
    for name, keep, wanted in (("all", 0, [1, 2, 3, 4]), ("three", 3, [2, 3, 4]), ("pinned", 1, [1, 4])):
        for step in (1, 2, 3, 4):
            checkpoints.save(accelerator, tmp_path / name, step, {}, keep=keep, pinned=1 if name == "pinned" else None)
        found = checkpoints.complete(tmp_path / name)
        assert [checkpoints.step_of(path) for path in found] == wanted
        assert checkpoints.latest(tmp_path / name) == found[-1]


def test_random_states_come_back(tmp_path: Path) -> None:
    """If this fails, dropout differs after a resume."""
    accelerator, _, _ = prepared()
    path = checkpoints.save(accelerator, tmp_path, 1, {})
    wanted = random.random(), torch.rand(3).tolist()
    checkpoints.load(accelerator, path)
    assert (random.random(), torch.rand(3).tolist()) == wanted


def test_a_spoilt_checkpoint_is_named(tmp_path: Path) -> None:
    """If this fails, a truncated or foreign file shows as somebody else's traceback, or not at all."""
    accelerator, _, _ = prepared()
    path = checkpoints.save(accelerator, tmp_path, 1, {})
    states = path / "random_states_0.pkl"
    content = states.read_bytes()
    states.write_bytes(b"nothing")
    torch.rand(1)
    with pytest.raises(CheckpointError, match="random states did not come back"):
        checkpoints.load(accelerator, path)
    states.write_bytes(content)
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="step-00000001 cannot be loaded"):
        checkpoints.load(accelerator, path)
    (path / "progress.json").write_text('{"version": 9, "step": 1}')
    with pytest.raises(CheckpointError, match="version 9"):
        checkpoints.read_progress(path)


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    """If this fails, a failed write leaves a damaged masks file or a stray one."""
    target = tmp_path / "masks"
    replace_file(target, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]
    assert target.read_text() == "old"
