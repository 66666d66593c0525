"""The folder of a run: started once, never overwritten, resumed only with its own settings, data and masks.

``RUN/config.yaml`` has the settings and marks the folder as a run. ``RUN/checkpoints/step-00000500/`` holds
``model.safetensors``, ``optimizer.safetensors``, ``progress.json``, once there are subnetworks ``masks.safetensors``,
and if they are dynamic ``dynamic.safetensors``. A finished run holds ``model/`` and its masks. Checkpoints and finished
runs have a manifest; a process killed at any moment leaves the last whole checkpoint, and what it had half written is
never read.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from fastmask import files
from fastmask.files import FileError, StrPath
from fastmask.models import attach
from fastmask.records import Record
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Task
from fastmask.training.config import TrainConfig

CONFIG_FILE, RESULTS_FILE = "config.yaml", "results.json"
MODEL = "model"
WEIGHTS, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.json"
MASKS_FILE, DYNAMIC_FILE = "masks.safetensors", "dynamic.safetensors"
MASKS_INPUT = "masks file"

Writers = Mapping[str, Callable[[Path], Any]]
"""Name of a file or folder -> called with the path to write it to."""


# ---- checkpoints


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be used; the message says which and why."""


class Progress(Record):
    """Where a run stands, beside its tensors; a score may be infinite or NaN."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    inputs: dict[str, str]  # what it was trained on -> SHA-256 of the content
    sampler: dict[str, Any]  # its counters
    window: dict[str, float]  # sums since the last line of the metrics
    history: list[dict[str, Any]]  # the records of the metrics
    evaluate: bool  # whether the dev data is still to be scored at this step
    random: list[dict[str, Any]]  # the random state of each process
    episodes: dict[str, Any] | None = None  # their counters, once there are episodes


def folder_of(run: StrPath, step: int | None = None) -> Path:
    """The folder of all checkpoints of a run, or of the one after `step` steps."""
    return Path(run, "checkpoints", *([] if step is None else [f"step-{step:08d}"]))


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was made, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def complete(run: StrPath) -> list[Path]:
    """Return the checkpoints of a run, oldest first; damaged ones are among them."""
    found = [path for path in folder_of(run).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of)


def latest(run: StrPath) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    return next(reversed(complete(run)), None)


def newest_whole(run: StrPath) -> Path | None:
    """The newest whole checkpoint of a run, with a warning for each damaged newer one; None if there are none."""
    faults: list[str] = []
    for path in reversed(complete(run)):
        try:
            files.check_files(path)
        except FileError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"damaged checkpoint, going back to {path}: {fault}", UserWarning, stacklevel=2)
        return path
    if faults:
        said = "; ".join(faults)
        raise CheckpointError(f"no checkpoint in {folder_of(run)} is whole (expected one to go on from): {said}")
    return None


def save(run: Path, step: int, writers: Writers, progress: Progress, keep: int = 2, pinned: int | None = None) -> Path:
    """Write the checkpoint after `step` steps, and remove all but the last `keep` ones (0: none) and that of `pinned`.

    A whole one of the same step is left as it is: the run is deterministic, and replacing it would open a moment
    without any. If this one cannot be written, an OSError names the file, and those before are still there.
    """
    target = folder_of(run, step)
    if target.is_dir():
        with suppress(FileError):  # damaged, and gone back beyond
            files.check_files(target)
            return target
    all_of_it = {**writers, PROGRESS: lambda path: path.write_text(progress.model_dump_json(), encoding="utf-8")}
    manifest = partial(files.write_manifest, names=all_of_it)
    files.write_folder(target, {**all_of_it, files.MANIFEST: manifest}, replace=True)
    done = [path for path in complete(run) if step_of(path) <= step]
    for old in done[:-keep] if keep else []:
        if old != folder_of(run, pinned):
            files.remove_tree(old)
    return target


def read_progress(path: Path) -> Progress:
    """The progress of a checkpoint; raises FileError if it is damaged."""
    return files.read_json(path / PROGRESS, Progress)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose state is tensors, as AdamW's is; its settings are those of the run."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, of in state.items() for name, tensor in of.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


# ---- starting and resuming


def check_out(config: TrainConfig) -> None:
    """See that `config.out` is free, or holds the run of these settings that is to be resumed; else ConfigError."""
    settings = Path(config.out, CONFIG_FILE)
    if not config.resume and (settings.is_file() or latest(config.out) is not None):
        raise ConfigError(f"out is {config.out!r}, which holds a run (expected another folder, or resume to go on)")
    if settings.is_file():
        differences = TrainConfig.load(settings).differences(config)
        if differences:
            listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differences.items())
            raise ConfigError(f"{settings} has other settings: {listed} (expected the same to resume the run)")


def open_run(config: TrainConfig, inputs: Mapping[str, str], processes: int, origin: Path | None) -> Path | None:
    """Make or reopen the folder `config.out`, which this process holds; returns the checkpoint to go on from, if any.

    Where it has none, that is `origin`, of another run at its switch.

    Raises:
        ConfigError: as `check_out`, or the data or masks differ from the run's (`Progress.inputs`).
        CheckpointError: none is whole, other `processes` made them, or the run has finished and has none.
    """
    check_out(config)
    folder = Path(config.out)
    known = (folder / CONFIG_FILE).is_file()
    files.remove_leftovers(folder)
    files.remove_leftovers(folder_of(folder))
    start = newest_whole(folder)
    if start is None and origin is not None:
        files.check_files(start := origin)
        inputs = {name: digest for name, digest in inputs.items() if name != MASKS_INPUT}  # it has no masks yet
    if start is not None:
        progress = read_progress(start)
        if changed := ", ".join(sorted(dict(progress.inputs.items() ^ inputs.items()))):
            raise ConfigError(
                f"{start} was made with other inputs: {changed} changed since (expected the same to resume)"
            )
        if len(progress.random) != processes:
            raise CheckpointError(f"{start} was made by {len(progress.random)} processes (expected {processes})")
    elif (folder / files.MANIFEST).is_file():
        raise CheckpointError(f"the run in {folder} has finished, and its checkpoints are gone (expected nothing more)")
    elif known:
        warnings.warn(f"the run in {folder} has no checkpoint yet: it starts anew", UserWarning, stacklevel=2)
    if not known:
        files.replace_file(folder / CONFIG_FILE, dataclasses.replace(config, resume=False).save)
    return start


def data_of(config: TrainConfig, run: StrPath) -> tuple[str, list[str], list[str]]:
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


# ---- finished runs


@dataclass(frozen=True)
class FinishedRun:
    """The model of a run in evaluation mode, its settings, and its subnetworks (None for method `full`)."""

    task: Task
    config: TrainConfig
    subnetworks: Subnetworks | None


def write_finished(folder: Path, task: Task, writers: Writers) -> None:
    """Write what a run leaves into its folder: the model, other files, and the manifest."""
    manifest, model = folder / files.MANIFEST, folder / MODEL
    manifest.unlink(missing_ok=True)  # until all is in place the run has not finished
    files.write_folder(model, {".": task.save}, replace=True)
    for name, write in writers.items():
        files.replace_file(folder / name, write)
    names = [*writers, CONFIG_FILE, *(f"{MODEL}/{name}" for name in files.files_in(model))]
    files.replace_file(manifest, lambda path: files.write_manifest(path, names))


def check_finished(run: StrPath) -> Path:
    """Return the folder of a run if it has finished; else FileNotFoundError says what it is instead."""
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}: there is no such folder")
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a run of `fastmask train`: it has no {CONFIG_FILE}")
    if not (folder / files.MANIFEST).is_file():  # it is written last
        last = latest(folder)
        state = f"goes on from {last.name}" if last else "begins it anew, as it has no checkpoint yet"
        raise FileNotFoundError(
            f"the run in {folder} has not finished (it has no {files.MANIFEST}): "
            f"`fastmask train --out {folder} --resume` {state}"
        )
    return folder


def load_run(run: StrPath, attached: bool = True) -> FinishedRun:
    """Load a finished run, with its subnetworks attached unless `attached` is False.

    Raises what `check_finished` does, and FileError for a file that is missing or altered.
    """
    folder = check_finished(run)
    files.check_files(folder)
    config = TrainConfig.load(folder / CONFIG_FILE)
    task = config.task_class.open(folder / MODEL)
    if config.freeze_embeddings:
        task.freeze_embeddings()
    subnetworks = None if config.method == "full" else Subnetworks.load(folder / MASKS_FILE)
    if subnetworks is not None and attached:
        attach(task.encoder, subnetworks)
    return FinishedRun(task, config, subnetworks)
