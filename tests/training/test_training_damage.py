"""What has changed since a run was killed: a damaged checkpoint is gone back beyond, other data are refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_training_loop import Killed, halves, kill_at, random_subnetworks
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_parser, toy_task

import fastmask as fm
from fastmask.settings import ConfigError
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import subnetworks_of
from fastmask.training.run_folder import load_run
from fastmask.unseen import Choice
from fastmask.unseen.adapted_run import save_adapted

SETTINGS: dict[str, Any] = {
    "method": "dynamic", "update_every": 2, "update_sentences": 2, "units": "both", "meta": "fomaml", "inner_steps": 1,
    "support_sentences": 1, "query_sentences": 1, "inner_lr": 0.05,
}  # fmt: skip


def run(folder: Path, hook: Any = None, data: Any = None, **changes: Any) -> TrainResult:
    """A run with everything that there is to keep: dynamic subnetworks, in episodes."""
    config = toy_config(folder, **{**SETTINGS, **changes})
    discover = subnetworks_of if config.masks else halves if config.method == "dynamic" else random_subnetworks
    return train(toy_task(), data or toy_data(), config, discover, hook, progress=False)


def begin(folder: Path) -> None:
    """Go on with a run, for one step: all that it reads of its folder it has read by then."""

    def stop(step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(folder, stop, resume=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 10, with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        run(folder, kill_at(10))
    assert [run_folder.step_of(path) for path in run_folder.complete(folder)] == [6, 9]
    return folder


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_the_episodes(checkpoint: Path) -> None:
    text = (checkpoint / "progress.json").read_text()
    assert '"episodes"' in text
    (checkpoint / "progress.json").write_text(text.replace('"episodes"', '"episode"'))


def names_of(killed: Path) -> list[str]:
    return sorted(os.listdir(run_folder.folder_of(killed, 9)))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
}


def damage(how: str, name: str, killed: Path, folder: Path) -> str:
    """A copy of the run whose newest checkpoint has one damaged file; the pattern of the warning that names it."""
    shutil.copytree(killed, folder)
    damaged = run_folder.folder_of(folder, 9) / name
    DAMAGES[how](damaged)
    # A flipped bit of a manifest can be in the name or the checksum of another file, which is then named.
    named = damaged.parent if (how, name) == ("flipped", "manifest.json") else f"{damaged}: "
    return rf"going back to .*step-00000006: {named}"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_gone_back_beyond(how: str, killed: Path, tmp_path: Path) -> None:
    """Whichever file of the newest checkpoint is damaged, it is named, and the run resumes from the one before."""
    for name in names_of(killed):
        folder = tmp_path / name
        with pytest.warns(UserWarning, match=damage(how, name, killed, folder)):
            newest = run_folder.newest_whole(folder)
        assert newest is not None
        assert newest == run_folder.folder_of(folder, 6)


@pytest.mark.parametrize("which", ["one", pytest.param("every", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_run_with_a_damaged_checkpoint_ends_like_the_unbroken_one(
    how: str, which: str, killed: Path, unbroken: TrainResult, tmp_path: Path
) -> None:
    """What is left of the damaged checkpoint changes nothing; each damage befalls another file, or every one."""
    names = names_of(killed)
    for name in names if which == "every" else [names[list(DAMAGES).index(how)]]:
        folder = tmp_path / name
        steps: list[int] = []
        with pytest.warns(UserWarning, match=damage(how, name, killed, folder)):
            resumed = run(folder, steps.append, resume=True)
        assert steps[0] > 6
        assert_same_weights(resumed.task.model, unbroken.task.model)
        assert metrics(resumed.run) == metrics(unbroken.run)
        for file in ("masks.safetensors", "dynamic.safetensors"):
            ours, theirs = load_file(folder / file), load_file(unbroken.run / file)
            assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_a_checkpoint_without_its_episodes(killed: Path, tmp_path: Path) -> None:
    """What would be resumed as plain training is damaged."""
    shutil.copytree(killed, tmp_path / "less")
    lose_the_episodes(run_folder.folder_of(tmp_path / "less", 9))
    with pytest.warns(UserWarning, match=r"going back to .*step-00000006: .*progress.json"):
        begin(tmp_path / "less")


def test_never_from_the_start_if_there_was_a_checkpoint(killed: Path, tmp_path: Path) -> None:
    """With every checkpoint damaged the run is not begun anew, and everything stays as it is."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for path in run_folder.complete(folder):
        (path / "progress.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.name.startswith(".")}
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* is whole .*: .*09/progress.json: .*06/progress.json"):
        run(folder, resume=True)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.name.startswith(".")}
    assert {path: when for path, when in after.items() if path.is_file()} == {
        path: when for path, when in before.items() if path.is_file()
    }


def test_masks_that_the_run_has_come_to_later_are_not_those_of_the_switch(
    unbroken: TrainResult, tmp_path: Path
) -> None:
    """A finished dynamic run that goes back beyond the switch starts from the masks found there, not the final ones."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.run, folder)
    (run_folder.folder_of(folder, 12) / "progress.json").unlink()
    for name in ("model/parser.json", "manifest.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="going back to"):
        resumed = run(folder, resume=True)
    assert_same_weights(resumed.task.model, unbroken.task.model)
    assert metrics(folder) == metrics(unbroken.run)


# ---- inputs


def changed(split: str, column: str) -> Any:
    """The toy data with one word, head or label of one sentence changed; all counts stay."""
    language = LANGUAGES[1]
    splits = toy_data()[language]

    def change(row: dict[str, Any], at: int) -> dict[str, Any]:
        value = list(row[column])
        if at == 4:
            value[-1] = next(other for other in value if other != value[-1])
        return {column: value}

    other = {**splits, split: splits[split].map(change, with_indices=True, load_from_cache_file=False)}
    assert list(other[split][column]) != list(splits[split][column])
    return {**toy_data(), language: other}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("column", ["words", "heads", "deprels"])
def test_changed_data_are_refused(split: str, column: str, killed: Path, tmp_path: Path) -> None:
    """A run is not resumed on sentences that changed, even if there are as many, of as many words."""
    shutil.copytree(killed, tmp_path / "run")
    name = {"train": "training", "dev": "dev"}[split]
    with pytest.raises(ConfigError, match=f"other inputs: {name} data of {LANGUAGES[1]} changed since"):
        run(tmp_path / "run", data=changed(split, column), resume=True)


@pytest.mark.parametrize("killed_at", [4, 10])
def test_a_changed_masks_file_is_refused(killed_at: int, tmp_path: Path) -> None:
    """A run is not resumed, before or after the switch, if the file of masks it was given has changed."""
    config, masks = toy_parser().encoder.config, tmp_path / "masks.safetensors"
    changes = {"method": "static", "masks": str(masks)}
    fm.Subnetworks.random(config, LANGUAGES, 0.5, seed=0).save(masks)
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at(killed_at), **changes)
    fm.Subnetworks.random(config, LANGUAGES, 0.5, seed=1).save(masks)
    with pytest.raises(ConfigError, match="other inputs: masks file changed since"):
        run(tmp_path / "run", resume=True, **changes)
    moved = tmp_path / "elsewhere.safetensors"  # the same content under another name is the same masks
    fm.Subnetworks.random(config, LANGUAGES, 0.5, seed=0).save(moved)
    run(tmp_path / "run", resume=True, method="static", masks=str(moved))


# ---- finished runs


@pytest.fixture(scope="module")
def adapted(unbroken: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    loaded = load_run(unbroken.run)
    save_adapted(folder, loaded, Choice(0, LANGUAGES[0]), {"language": "qzz"}, [], {})
    return folder


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("which", ["trained", "adapted"])
def test_a_damaged_run_is_not_loaded(
    which: str, how: str, unbroken: TrainResult, adapted: Path, tmp_path: Path
) -> None:
    """Whichever file of a finished run is damaged, it is named, and nothing is scored or parsed with the rest."""
    source = {"trained": unbroken.run, "adapted": adapted}[which]
    files = ["config.yaml", "masks.safetensors", *(f"model/{path.name}" for path in (source / "model").glob("*.*"))]
    files += ["model/encoder/config.json", "model/encoder/model.safetensors"]
    files += ["dynamic.safetensors" if which == "trained" else "results.json"]
    for name in files:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(source, folder)
        DAMAGES[how](folder / name)
        with pytest.raises((ValueError, FileNotFoundError), match=name.split("/")[-1]):
            load_run(folder)


def test_an_encoder_that_lacks_a_tensor(unbroken: TrainResult, tmp_path: Path) -> None:
    """Weights that are missing are not drawn at random."""
    shutil.copytree(unbroken.run, tmp_path / "run")
    file = tmp_path / "run" / "model" / "encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder/model.safetensors: has other content"):
        load_run(tmp_path / "run")


def test_masks_that_do_not_belong_to_a_run(unbroken: TrainResult, tmp_path: Path) -> None:
    """A run of the full network has none, whatever lies in its folder; and a run may be moved."""
    full = run(tmp_path / "run", method="full", meta="none").run
    shutil.copyfile(unbroken.run / "masks.safetensors", full / "masks.safetensors")
    shutil.move(full, tmp_path / "elsewhere")
    assert load_run(tmp_path / "elsewhere").subnetworks is None
