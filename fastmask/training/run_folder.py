"""The folder of a run: started once, never overwritten, resumed only with its own settings, data and masks."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from fastmask.files import FileError, remove_leftovers, replace_file
from fastmask.training import checkpoints
from fastmask.training.checkpoints import CheckpointError
from fastmask.training.config import ConfigError, TrainConfig
from fastmask.training.finished import CONFIG_FILE, check_run, is_finished
from fastmask.training.manifest import Origin

__all__ = ["CONFIG_FILE", "check_out", "open_run"]


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
        newest = checkpoints.newest_whole(folder, config)
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
