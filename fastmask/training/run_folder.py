"""The folder of a run: started once, never overwritten, resumed only with its own settings, data and masks.

A finished run holds ``config.yaml``, ``model/``, its masks and a manifest of these, and is loaded to evaluate, predict
or look at.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmask.files import FileError, remove_leftovers, remove_tree, replace_file, write_folder
from fastmask.files.manifest import MANIFEST, Origin, check_files, files_in, write_manifest
from fastmask.models import attach
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Task
from fastmask.training import checkpoints
from fastmask.training.checkpoints import CheckpointError
from fastmask.training.config import TrainConfig

__all__ = [
    "CONFIG_FILE",
    "MASKS_FILE",
    "MODEL",
    "FinishedRun",
    "check_finished",
    "check_out",
    "check_run",
    "data_of",
    "is_finished",
    "load_run",
    "open_run",
    "write_finished",
]

CONFIG_FILE = "config.yaml"
MODEL = "model"
MASKS_FILE, DYNAMIC_FILE = checkpoints.MASKS, checkpoints.DYNAMIC


@dataclass(frozen=True)
class FinishedRun:
    """The model of a run in evaluation mode, its settings, its subnetworks (None for method `full`), its origin."""

    task: Task
    config: TrainConfig
    subnetworks: Subnetworks | None
    origin: Origin


def is_finished(run: str | os.PathLike[str]) -> bool:
    """Whether a run has left its model; the manifest is written last."""
    return Path(run, MANIFEST).is_file()


def check_finished(run: str | os.PathLike[str]) -> Path:
    """Return the folder of a run if it has finished.

    Raises:
        FileNotFoundError: no such folder, not a run, or a run that has not finished; the message says which.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}: there is no such folder")
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a run of `fastmask train`: it has no {CONFIG_FILE}")
    if not is_finished(folder):
        last = checkpoints.latest(folder)
        state = f"goes on from {last.name}" if last else "begins it anew, as it has no checkpoint yet"
        raise FileNotFoundError(
            f"the run in {folder} has not finished (it has no {MANIFEST}): "
            f"`fastmask train --out {folder} --resume` {state}"
        )
    return folder


def check_run(folder: Path) -> Origin:
    """Return the origin of a finished run whose model, masks and settings are as they were written.

    Raises:
        FileError: something is missing, superfluous or altered; the message names the file.
    """
    return check_files(folder, (CONFIG_FILE, MODEL, MASKS_FILE, DYNAMIC_FILE))


def write_finished(folder: Path, task: Task, origin: Origin, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write what a run leaves into its folder, which holds its settings: the model, other files, and the manifest.

    Args:
        folder: of the run.
        task: its model goes into ``model/``.
        origin: goes into the manifest.
        writers: name of a file -> called with the path to write it to.
    """
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)  # until all is in place the run has not finished
    model = folder / MODEL
    write_folder(model, {".": task.save}, make_room=lambda: remove_tree(model))
    for name, write in writers.items():
        replace_file(folder / name, write)
    names = [*writers, CONFIG_FILE, *files_in(folder, [MODEL])]
    replace_file(manifest, lambda path: write_manifest(path, origin, names))


def load_run(run: str | os.PathLike[str], attached: bool = True) -> FinishedRun:
    """Load a finished run, with its subnetworks attached unless `attached` is False.

    Raises:
        FileNotFoundError: no such folder, not a run, or a run that has not finished; the message says which.
        FileError: a file of it is missing, superfluous or altered; the message names it.
    """
    folder = check_finished(run)
    origin = check_run(folder)
    config = TrainConfig.load(folder / CONFIG_FILE)
    task = config.task_class.open(folder / MODEL)
    if config.freeze_embeddings:
        task.freeze_embeddings()
    masks = folder / MASKS_FILE
    subnetworks = Subnetworks.load(masks) if masks.is_file() else None
    if subnetworks is not None and attached:
        attach(task.encoder, subnetworks)
    return FinishedRun(task, config, subnetworks, origin)


def data_of(config: TrainConfig, run: str | os.PathLike[str]) -> tuple[str, list[str], list[str]]:
    """Where the data of a run in folder `run` is, its training languages, and others that a demonstration has.

    Raises:
        ConfigError: the run has no data and its task none to show.
    """
    if config.data is not None:
        return config.data, config.language_list or config.task_class.languages(config.data, config.task_settings), []
    demo = config.task_class.demo(run)
    if demo is None:
        raise ConfigError(f"task {config.task} needs data (expected a folder, a file or a name on the Hub)")
    where, train, others = demo
    train = config.language_list or train
    return where, train, [name for name in others if name not in train]


def check_out(config: TrainConfig) -> None:
    """See that `config.out` is free, or holds the run that is to be resumed; writes nothing.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or its settings differ from `config`, or there is a
            link in it: what is written to a link lands somewhere else.
    """
    folder = Path(config.out)
    settings = folder / CONFIG_FILE
    for place in (folder, checkpoints.folder_of(folder)):
        for entry in os.scandir(place) if place.is_dir() else ():
            if entry.is_symlink():
                raise ConfigError(f"{entry.path} is a link (expected the folder of a run, all of it its own)")
    held = settings.is_file() or checkpoints.latest(folder) is not None
    if held and not config.resume:
        raise ConfigError(
            f"out is {str(folder)!r}, which holds a run (expected a new folder, or resume to go on with it)"
        )
    if settings.is_file():
        differences = TrainConfig.load(settings).differences(config)
        if differences:
            listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differences.items())
            raise ConfigError(f"{settings} has other settings: {listed} (expected the same to resume the run)")


def open_run(config: TrainConfig, inputs: Mapping[str, str], processes: int) -> Path | None:
    """Make or reopen the folder `config.out`, which this process holds; return what to go on from.

    ``config.yaml`` is what marks a folder as a run. Resuming a folder without one starts a new run there.

    Args:
        config: settings of the run.
        inputs: see `inputs_of`.
        processes: how many there are.

    Returns:
        The newest checkpoint that is whole; the folder itself if the run has finished and has none of its last step;
        None at the start.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or settings, data or masks differ from the run's.
        CheckpointError: checkpoints or a finished run are there and none is whole, or another number of processes made
            them.
    """
    check_out(config)
    folder = Path(config.out)
    settings = folder / CONFIG_FILE
    known = settings.is_file()
    remove_leftovers(folder)
    remove_leftovers(checkpoints.folder_of(folder))
    start = _start(config)
    if start is not None:
        path, origin = start
        _check_origin(path, origin, config, inputs)
        if origin.processes != processes:
            raise CheckpointError(f"{path} was made by {origin.processes} processes (expected {processes})")
    elif known:
        warnings.warn(f"the run in {folder} has no checkpoint yet: it starts anew", UserWarning, stacklevel=2)
    if not known:
        replace_file(settings, dataclasses.replace(config, resume=False).save)
    return None if start is None else start[0]


def _start(config: TrainConfig) -> tuple[Path, Origin] | None:
    """What is whole and furthest, with its origin: a checkpoint, or the run if it has finished."""
    folder = Path(config.out)
    newest, failure = None, None
    try:
        newest = checkpoints.newest_whole(folder)
    except CheckpointError as error:
        failure = error
    if newest is not None and newest[1].step == config.steps:
        return newest
    if is_finished(folder):
        try:
            return folder, check_run(folder)
        except FileError as error:
            failure = failure or CheckpointError(f"the finished run in {folder} is damaged: {error}")
    if newest is None and failure is not None:
        raise failure
    return newest


def _check_origin(path: Path, origin: Origin, config: TrainConfig, inputs: Mapping[str, str]) -> None:
    """Raise `ConfigError` if a run goes on from what another run has left, or sees other data."""
    mine = config.identity()
    other = [name for name in mine if name not in origin.settings or origin.settings[name] != mine[name]]
    if other:
        listed = ", ".join(f"{name} was {origin.settings.get(name)!r} and is {mine[name]!r}" for name in other)
        raise ConfigError(f"{path} was made with other settings: {listed} (expected the same to resume the run)")
    names = sorted({name for name in {*origin.inputs, *inputs} if origin.inputs.get(name) != inputs.get(name)})
    if names:
        raise ConfigError(
            f"{path} was made with other inputs: {', '.join(names)} changed since (expected the same to resume the run)"
        )
