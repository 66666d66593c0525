"""Checkpoints that are whole or not there: written beside their place, renamed into it, and looked at before use.

``RUN/checkpoints/step-00000500/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``random.safetensors`` (the
states of every process), ``progress.json`` (sampler, metrics so far), once there are subnetworks
``masks.safetensors``, if they are dynamic ``dynamic.safetensors``, and the manifest of all of these. A process killed
at any moment leaves the last whole one; what it had half written has a name of `fastmask.files.partial_name`, is never
read, and is removed at the next start.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmask.files import FileError, Record, read_json, read_tensors, remove_tree, write_folder
from fastmask.files.manifest import MANIFEST, Origin, check_files, write_manifest
from fastmask.optim import LiveAdamW
from fastmask.optim.compact import HELD
from fastmask.training.engine import RandomState, set_random_state

__all__ = [
    "CheckpointError",
    "Progress",
    "check",
    "complete",
    "folder_of",
    "latest",
    "load_optimizer",
    "load_random_state",
    "load_weights",
    "newest_whole",
    "read_progress",
    "save",
    "save_optimizer",
    "save_random_states",
    "save_weights",
    "step_of",
]

KEEP = 2
MODEL, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
PROGRESS = "progress.json"
MASKS = "masks.safetensors"
DYNAMIC = "dynamic.safetensors"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be used; the message says which and why."""


class Progress(Record):
    """Where a run stands, beside its tensors.

    Attributes:
        sampler: its counters.
        window: sums since the last line of the metrics.
        history: the records of the metrics.
        evaluate: whether the dev data is still to be scored at this step.
        episodes: their counters, once there are episodes.
    """

    sampler: dict[str, Any]
    window: dict[str, float]
    history: list[dict[str, Any]]
    evaluate: bool
    episodes: dict[str, Any] | None = None


def folder_of(run: str | os.PathLike[str], step: int | None = None) -> Path:
    """Return the folder of all checkpoints of a run, or of the one after `step` steps."""
    folder = Path(run, "checkpoints")
    return folder if step is None else folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was made, from its folder's name."""
    return int(path.name.removeprefix("step-"))


def complete(run: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a run, oldest first; damaged ones are among them, see `check`."""
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def latest(run: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    found = complete(run)
    return found[-1] if found else None


def check(path: Path) -> Origin:
    """Return the origin of a checkpoint that is as it was written.

    Raises:
        FileError: it is damaged; the message names the file.
    """
    origin = check_files(path)
    if _STEP.fullmatch(path.name) and step_of(path) != origin.step:
        raise FileError(path, f"was written after {origin.step} steps (expected the number in its name)")
    return origin


def newest_whole(run: str | os.PathLike[str]) -> tuple[Path, Origin] | None:
    """The newest checkpoint of a run that is whole.

    Newer ones that are damaged are named in a warning; None if there are no checkpoints at all.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    faults: list[str] = []
    for path in reversed(complete(run)):
        try:
            origin = check(path)
        except FileError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"damaged checkpoint, going back to {path}: {fault}", UserWarning, stacklevel=2)
        return path, origin
    if faults:
        raise CheckpointError(
            f"no checkpoint in {folder_of(run)} is whole (expected one to go on from): {'; '.join(faults)}"
        )
    return None


def save(
    run: str | os.PathLike[str],
    origin: Origin,
    writers: Mapping[str, Callable[[Path], Any]],
    progress: Progress,
    keep: int = KEEP,
    pinned: int | None = None,
) -> Path:
    """Write the checkpoint after `origin.step` steps, and remove all but the last `keep` ones; by one process.

    A whole checkpoint of the same step that is already there is left as it is: the run is deterministic, and replacing
    it would open a moment without any.

    Args:
        run: folder of the run.
        origin: goes into the manifest.
        writers: name of a file -> called with the path to write it to.
        progress: goes into ``progress.json``.
        keep: number of checkpoints that stay; 0: all.
        pinned: the checkpoint after so many steps stays, too.

    Raises:
        OSError: it could not be written; the message names the file. The checkpoints before are still there.
    """
    target = folder_of(run, origin.step)
    if target.is_dir():
        with suppress(FileError):  # damaged, and gone back beyond
            check(target)
            return target
    files = {**writers, PROGRESS: lambda path: path.write_text(progress.model_dump_json(), encoding="utf-8")}
    manifest = partial(write_manifest, origin=origin, names=files)
    write_folder(target, {**files, MANIFEST: manifest}, make_room=lambda: remove_tree(target))
    done = [path for path in complete(run) if step_of(path) <= origin.step]
    for old in done[:-keep] if keep else []:
        if old != folder_of(run, pinned):
            remove_tree(old)
    return target


def read_progress(path: Path) -> Progress:
    """The progress of a checkpoint.

    Raises:
        FileError: missing, not JSON, or without what belongs there.
    """
    try:
        progress: Progress = read_json(path / PROGRESS, Progress)
    except FileNotFoundError:
        raise FileError(path / PROGRESS, "is missing") from None
    return progress


# ---- the tensors of a checkpoint: safetensors and JSON, never pickle


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the `state_dict` of a module; tied weights are written under each of their names."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in module.state_dict().items():
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    save_file(tensors, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Put back what `save_weights` wrote.

    Raises:
        FileError: the file is damaged, or of another module.
    """
    try:
        module.load_state_dict(read_tensors(path)[0])
    except RuntimeError as error:
        raise FileError(path, f"does not fit the model: {' '.join(str(error).split())}") from None


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write the state of an optimiser whose state is tensors, as AdamW's is, and the settings of its groups."""
    content = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, state in content["state"].items()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"groups": json.dumps(content["param_groups"])})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put back what `save_optimizer` wrote into an optimiser over the same parameters.

    Raises:
        FileError: the file is damaged, or of an optimiser over other parameters.
    """
    tensors, header = read_tensors(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            shape = parameters[int(number)].shape
            # torch takes any: a moment of the wrong shape would be noticed in the next step, or not at all.
            compact = f"{number}.{HELD}" in tensors and isinstance(
                getattr(optimizer, "optimizer", optimizer), LiveAdamW
            )  # which sees for itself what fits
            if tensor.numel() != 1 and tensor.shape != shape and not compact:
                raise ValueError(f"{key} has the shape {tuple(tensor.shape)} (expected {tuple(shape)})")
            state.setdefault(int(number), {})[name] = tensor
        groups = [
            # JSON has no tuples, which the betas are.
            {name: tuple(value) if isinstance(own.get(name), tuple) else value for name, value in given.items()}
            for given, own in zip(json.loads(header["groups"]), optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FileError(path, f"does not fit the optimiser: {error}") from None


def save_random_states(states: Sequence[RandomState], path: Path) -> None:
    """Write the random state of each process."""
    tensors = {f"{number}.{name}": tensor for number, state in enumerate(states) for name, tensor in state[0].items()}
    save_file(tensors, path, metadata={str(number): json.dumps(state[1]) for number, state in enumerate(states)})


def load_random_state(path: Path, process: int, device: torch.device) -> None:
    """Set the random state of this process to what `save_random_states` wrote for it.

    Raises:
        FileError: the file is damaged, or has none for this process.
    """
    tensors, header = read_tensors(path)
    prefix = f"{process}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        set_random_state((mine, json.loads(header[str(process)])), device)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise FileError(path, f"holds no random state of process {process}: {error}") from None
