"""Branching: a run that takes over the first steps of another one ends like one that took them itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_training_loop import Killed, kill_at, random_subnetworks
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_parser, toy_task

import fastmask as fm
from fastmask.files import FileError
from fastmask.settings import ConfigError
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint, subnetworks_of

META = {"meta": "fomaml", "inner_steps": 2, "support_sentences": 2, "query_sentences": 2, "inner_lr": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "random": {"method": "random"},
    "static": {"method": "static", "masks": "given"},
    "full-fomaml": {"method": "full", **META},
    "static-reptile": {"method": "static", "masks": "given", **META, "meta": "reptile", "checkpoint_every": 4},
}


def discover(point: SwitchPoint) -> Any:
    return random_subnetworks(point) if point.config.masks is None else subnetworks_of(point)


def run(folder: Path, hook: Any = None, source: Path | None = None, **changes: Any) -> TrainResult:
    """Train, from where another run stood at its switch if one is given."""
    config = toy_config(folder, **changes)
    origin = None if source is None else run_folder.folder_of(source, config.shared_steps)
    return train(toy_task(), toy_data(), config, discover, hook, progress=False, origin=origin)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of masks, of more languages than are trained."""
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    names = ["qzz", *reversed(LANGUAGES)]
    fm.Subnetworks.random(toy_parser().encoder.config, names, 0.5, seed=3, units="both").save(path)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs to branch off from: a finished one of method full, and one with subnetworks that was stopped later."""
    folder = tmp_path_factory.mktemp("sources")
    run(folder / "full", method="full")
    with pytest.raises(Killed):
        run(folder / "random", kill_at(8), method="random")
    return {name: folder / name for name in ("full", "random")}


@pytest.mark.parametrize("source", ["full", "random"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_branch_ends_like_an_unbroken_run(
    name: str, source: str, sources: dict[str, Path], masks: Path, tmp_path: Path
) -> None:
    """A comparison that shares the first steps makes the runs that `fastmask train` makes."""
    changes = {k: str(masks) if v == "given" else v for k, v in SETTINGS[name].items()}
    unbroken = run(tmp_path / "unbroken", **changes)
    steps: list[int] = []
    branched = run(tmp_path / "branch", steps.append, sources[source], **changes)
    assert steps[0] > 6, "the shared steps were taken again"
    assert_same_weights(branched.task.model, unbroken.task.model)
    assert metrics(branched.run) == metrics(unbroken.run)
    if changes["method"] != "full":
        files = [fm.Subnetworks.load(folder.run / "masks.safetensors") for folder in (branched, unbroken)]
        assert files[0] == files[1]


def test_the_source_stays_as_it_is(sources: dict[str, Path], tmp_path: Path) -> None:
    """A branch that trains on does not change the checkpoint that others start from."""
    start = run_folder.folder_of(sources["full"], 6)
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    run(tmp_path / "b", source=sources["full"], method="random")
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


def test_a_killed_branch(sources: dict[str, Path], tmp_path: Path) -> None:
    """Killed before its own first checkpoint, it starts where it started; after it, from there."""
    for at, first in ((7, 7), (10, 10)):
        with pytest.raises(Killed):
            run(tmp_path / str(at), kill_at(at), sources["full"], method="random")
        steps: list[int] = []
        run(tmp_path / str(at), steps.append, sources["full"], method="random", resume=True)
        assert steps == list(range(first, 13))


def test_a_damaged_start(sources: dict[str, Path], tmp_path: Path) -> None:
    """A branch does not start from a checkpoint that has changed since it was written, or is not there."""
    shutil.copytree(sources["full"], tmp_path / "source")
    weights = run_folder.folder_of(tmp_path / "source", 6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FileError, match=rf"{weights}: has other"):
        run(tmp_path / "b", source=tmp_path / "source", method="random")
    with pytest.raises(FileError, match=r"step-00000005.manifest\.json: is missing"):
        run(tmp_path / "c", source=sources["full"], method="random", discover_at=0.4)
    with pytest.raises(ConfigError, match="holds a run"):
        run(sources["random"], source=sources["full"], method="random")
