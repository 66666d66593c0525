"""Branching: a run that takes over the first steps of another one ends like one that took them itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_training_loop import Killed, kill_at, random_subnetworks
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_parser, toy_task

import fastmask as fm
from fastmask.compare.cells import branch
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


def run(folder: Path, hook: Any = None, **changes: Any) -> TrainResult:
    return train(toy_task(), toy_data(), toy_config(folder, **changes), discover, hook, progress=False)


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
    branch(sources[source], toy_config(tmp_path / "branch", **changes, resume=True))
    steps: list[int] = []
    branched = run(tmp_path / "branch", steps.append, **changes, resume=True)
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
    branch(sources["full"], toy_config(tmp_path / "b", method="random", resume=True))
    run(tmp_path / "b", method="random", resume=True)
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


def test_a_branch_of_which_only_half_was_made(sources: dict[str, Path], tmp_path: Path) -> None:
    """Where a branch was only half made, its folder still trains as a branch: from the step it starts at."""
    config = toy_config(tmp_path / "b", method="random", resume=True)
    branch(sources["full"], config)
    (tmp_path / "b" / "config.yaml").unlink()  # it is written last
    steps: list[int] = []
    run(tmp_path / "b", steps.append, method="random", resume=True)
    assert steps == [7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("name", ["batch_size", "lr", "seed", "eval_every", "steps"])
def test_settings_of_the_shared_steps_must_agree(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """A branch whose settings would have taken other first steps is refused."""
    value = {"batch_size": 9, "lr": 1e-3, "seed": 4, "eval_every": 7, "steps": 24}[name]
    with pytest.raises(ConfigError, match=rf"cannot branch off from .*: {name} is .* there and {value} here"):
        branch(sources["full"], toy_config(tmp_path / "b", method="random", **{name: value}))
    assert not (tmp_path / "b").exists()


def test_a_damaged_start(sources: dict[str, Path], tmp_path: Path) -> None:
    """A branch does not start from a checkpoint that has changed since it was written."""
    shutil.copytree(sources["full"], tmp_path / "source")
    weights = run_folder.folder_of(tmp_path / "source", 6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RuntimeError, match=rf"cannot branch off from a damaged checkpoint: {weights}: has other"):
        branch(tmp_path / "source", toy_config(tmp_path / "b", method="random"))
    assert not (tmp_path / "b").exists()


def test_where_no_branch_can_start(sources: dict[str, Path], tmp_path: Path) -> None:
    """A branch cannot start from a step without a checkpoint, from nowhere, or over another run."""
    late = toy_config(tmp_path / "b", method="static", discover_at=0.75)
    with pytest.raises(RuntimeError, match=r"step-00000005.manifest\.json: is missing"):
        branch(sources["full"], toy_config(tmp_path / "b", method="static", discover_at=0.4))
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        branch(tmp_path, toy_config(tmp_path / "b"))
    with pytest.raises(ConfigError, match="holds a run"):
        branch(sources["full"], toy_config(sources["random"], method="random", resume=True))
    assert not (tmp_path / "b").exists()
    branch(sources["full"], late)  # where there is a checkpoint, a full network may be left later
    assert run_folder.latest(tmp_path / "b") == run_folder.folder_of(tmp_path / "b", 9)
