"""A run that is killed before any rename, fsync or delete, or at any other moment, and resumed, ends as if it had not.

The long form (``-m slow``) kills at every one of these calls; the short one at a few.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import calls_of, die_after, die_before
from processes import start_process
from safetensors.torch import load_file
from test_training_loop import halves, random_subnetworks
from toy_run import assert_same_weights, metrics, toy_config, toy_data, toy_task

from fastmask.files.manifest import check_files
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.run_folder import load_run
from fastmask.unseen import Choice
from fastmask.unseen.adapted_run import save_adapted

META = {"meta": "fomaml", "inner_steps": 1, "support_sentences": 2, "query_sentences": 2, "inner_lr": 0.05}
KINDS: dict[str, dict[str, Any]] = {
    "static": {"method": "static"},
    "dynamic": {"method": "dynamic", "update_every": 2, "update_sentences": 2, "units": "both"},
    "fomaml": {"method": "static", **META},
}
RANDOM_KILLS = 50


def run(folder: Path, kind: str) -> TrainResult:
    """A run from its beginning, or from where it was killed."""
    config = toy_config(folder, resume=True, keep_checkpoints=1, **KINDS[kind])
    discover = halves if kind == "dynamic" else random_subnetworks
    return train(toy_task(), toy_data(), config, discover, progress=False)


def killed_at_a_call(folder: str, kind: str, number: int | None, marker: str) -> None:
    toy_data()
    seen = die_before(number)
    run(Path(folder), kind)
    Path(marker).write_text("\n".join(seen))


def killed_after(folder: str, kind: str, seconds: float) -> None:
    toy_data()
    die_after(seconds)
    run(Path(folder), kind)
    time.sleep(60)  # until the kill comes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    folder = tmp_path_factory.mktemp("unbroken")
    return {kind: run(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The calls of each kind of run, in their order."""
    folder = tmp_path_factory.mktemp("calls")
    for kind in KINDS:
        process = start_process(killed_at_a_call, str(folder / kind), kind, None, str(folder / f"{kind}.txt"))
        process.join()
        assert process.exitcode == 0
    return {kind: calls_of(folder / f"{kind}.txt") for kind in KINDS}


def assert_resumes(folder: Path, kind: str, unbroken: TrainResult) -> None:
    """The run ends with the weights, masks and metrics of one that was not killed, and leaves no rubbish."""
    resumed = run(folder, kind)
    assert_same_weights(resumed.task.model, unbroken.task.model)
    assert_same_weights(load_run(folder, attached=False).task.model, load_run(unbroken.run, attached=False).task.model)
    assert metrics(folder) == metrics(unbroken.run)
    for path in unbroken.run.glob("*.safetensors"):
        ours, theirs = load_file(folder / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert names_in(folder) == names_in(unbroken.run)
    # Killed after its last checkpoint was there and before an older one was removed, it keeps that one.
    kept, expected = ({path.name for path in (run / "checkpoints").iterdir()} for run in (folder, unbroken.run))
    assert expected <= kept <= {*expected, "step-00000009", "step-00000010"}
    for path in run_folder.complete(folder):
        check_files(path)


def names_in(folder: Path) -> set[Path]:
    """All files and folders but the checkpoints."""
    return {path.relative_to(folder) for path in folder.rglob("*") if "checkpoints" not in path.parts}


def kill_at_call(folder: Path, kind: str, number: int) -> None:
    process = start_process(killed_at_a_call, str(folder), kind, number, str(folder.with_suffix(".txt")))
    process.join()
    assert process.exitcode == -9, "it should have been killed"


def test_calls_are_seen(calls: dict[str, list[str]]) -> None:
    """What is killed at are all kinds of calls, of every checkpoint and of the end."""
    for kind, names in calls.items():
        assert {"replace", "fsync", "unlink", "rmdir"} <= set(names), kind
        assert names.count("fsync") > 5 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_some_calls(kind: str, calls: Any, unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """A run killed between two steps of putting a file in place resumes to the same end."""
    chance = random.Random(f"{kind} calls")
    for number in sorted(chance.sample(range(1, len(calls[kind]) + 1), 3)):
        kill_at_call(tmp_path / str(number), kind, number)
        assert_resumes(tmp_path / str(number), kind, unbroken[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_call(kind: str, calls: Any, unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """The same, at every rename, fsync and delete of a run."""
    print(f"{kind}: {len(calls[kind])} calls")
    for number in range(1, len(calls[kind]) + 1):
        kill_at_call(tmp_path / str(number), kind, number)
        assert_resumes(tmp_path / str(number), kind, unbroken[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind: str, unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """The same at any moment, and again while it is being resumed."""
    chance = random.Random(f"{kind} moments")
    began = time.perf_counter()
    run(tmp_path / "timed", kind)
    whole = time.perf_counter() - began
    for number in range(RANDOM_KILLS):
        folder = tmp_path / str(number)
        for _ in range(chance.randint(1, 3)):
            process = start_process(killed_after, str(folder), kind, chance.uniform(0.0, 1.2 * whole))
            process.join()
            assert process.exitcode == -9
        assert_resumes(folder, kind, unbroken[kind])


# ---- an adapted run


def save_adaptation(source: str, folder: str, number: int | None, marker: str) -> None:
    """What `fastmask adapt` does once it has adapted."""
    loaded = load_run(source)
    seen = die_before(number)
    choice = Choice(0, loaded.subnetworks.languages[0])
    save_adapted(Path(folder), loaded, choice, {"language": "qzz"}, [], {})
    Path(marker).write_text("\n".join(seen))


def kill_an_adaptation(number: int, source: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / str(number) / "run", str(tmp_path / f"{number}.txt")
    process = start_process(save_adaptation, str(source), str(folder), number, marker)
    process.join()
    assert process.exitcode == -9
    if not (folder / "manifest.json").exists():  # else it was killed when all was done
        process = start_process(save_adaptation, str(source), str(folder), None, marker)
        process.join()
        assert process.exitcode == 0
    assert load_run(folder).subnetworks == load_run(tmp_path / "whole").subnetworks
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_an_adaptation_killed_at_some_calls(unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """An adapted run is there whole or not at all, and what a killed process left does not stop the next one."""
    calls = _counted(unbroken["static"].run, tmp_path)
    for number in sorted(random.Random("adapt").sample(range(1, calls + 1), 3)):
        kill_an_adaptation(number, unbroken["static"].run, tmp_path)


@pytest.mark.slow
def test_an_adaptation_killed_at_every_call(unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """The same, at every rename, fsync and delete."""
    for number in range(1, _counted(unbroken["static"].run, tmp_path) + 1):
        kill_an_adaptation(number, unbroken["static"].run, tmp_path)


def _counted(source: Path, tmp_path: Path) -> int:
    """Adapt without a kill; how many calls that takes."""
    process = start_process(save_adaptation, str(source), str(tmp_path / "whole"), None, str(tmp_path / "calls.txt"))
    process.join()
    assert process.exitcode == 0
    return len(calls_of(tmp_path / "calls.txt"))
