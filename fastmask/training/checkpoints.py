"""Checkpoints that are whole or not there: written beside their place, then renamed into it.

``RUN/checkpoints/step-00000500/`` holds what `accelerate` saves (weights as safetensors, optimiser, random states),
``progress.json`` (step, sampler, metrics so far) and, once there are subnetworks, ``masks.safetensors``. A process
killed at any moment leaves the last complete one; what it had half written has a name that starts with a dot, is never
read, and is removed at the next start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmask.files import sync
from fastmask.training.random_state import random_digest

__all__ = [
    "CheckpointError",
    "clean",
    "complete",
    "folder_of",
    "is_complete",
    "latest",
    "load",
    "read_progress",
    "save",
    "step_of",
]

KEEP = 2
FORMAT_VERSION = 1
PROGRESS = "progress.json"
MASKS = "masks.safetensors"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which and why."""


def folder_of(run: str | os.PathLike[str], step: int | None = None) -> Path:
    """Return the folder of all checkpoints of a run, or of the one after `step` steps."""
    folder = Path(run, "checkpoints")
    return folder if step is None else folder / f"step-{step:08d}"


def complete(run: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = folder_of(run)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def latest(run: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    found = complete(run)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was made, from its folder's name."""
    return int(path.name.removeprefix("step-"))


def is_complete(path: Path) -> bool:
    """Whether there is a checkpoint in this folder."""
    return (path / PROGRESS).is_file()


def clean(run: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half written or half deleted; call at the start of a run, on one process."""
    folder = folder_of(run)
    for path in folder.glob(".*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def save(
    accelerator: Any,
    run: str | os.PathLike[str],
    step: int,
    progress: dict[str, Any],
    write_masks: Callable[[Path], Any] | None = None,
    keep: int = KEEP,
    pinned: int | None = None,
) -> Path:
    """Save the state after `step` steps and remove all but the last `keep` checkpoints; called by every process.

    A checkpoint of the same step that is already there is left as it is: the run is deterministic, and replacing it
    would open a moment without any.

    Args:
        accelerator: an `accelerate.Accelerator` that has prepared the model and the optimiser.
        run: folder of the run.
        step: steps done so far.
        progress: what else is needed to go on; JSON.
        write_masks: called with the path to write ``masks.safetensors`` to, or None where there are no subnetworks.
        keep: number of checkpoints that stay; 0: all.
        pinned: the checkpoint after so many steps stays, too.
    """
    target = folder_of(run, step)
    accelerator.wait_for_everyone()
    if target.is_dir():
        return target
    partial = target.with_name(f".partial-{target.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    _write_json(partial / f"random-{accelerator.process_index}.json", {"digest": random_digest()})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if write_masks is not None:
            write_masks(partial / MASKS)
        content = {"version": FORMAT_VERSION, "step": step, "processes": accelerator.num_processes, **progress}
        _write_json(partial / PROGRESS, content)
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
        for old in complete(run)[:-keep] if keep else []:
            if old == folder_of(run, pinned):
                continue
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            doomed = old.with_name(f".old-{old.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def read_progress(path: Path) -> dict[str, Any]:
    """Return the `progress` of a checkpoint, with "step", before anything is loaded.

    Raises:
        CheckpointError: the file is missing, not JSON, or of a newer version.
    """
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if content.get("version", 0) > FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {path} has version {content['version']} (expected at most {FORMAT_VERSION})")
    return content


def load(accelerator: Any, path: Path) -> None:
    """Restore model, optimiser and random states (python, numpy, torch) from a checkpoint.

    Raises:
        CheckpointError: it was made by another number of processes, does not fit the model, or the random states did
            not come back (`accelerate` says nothing when that fails).
    """
    content = read_progress(path)
    if content["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"checkpoint {path} was made by {content['processes']} processes (expected {accelerator.num_processes})"
        )
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # torch, safetensors and pickle each raise their own
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from error
    wanted = json.loads((path / f"random-{accelerator.process_index}.json").read_text(encoding="utf-8"))["digest"]
    if random_digest() != wanted:
        raise CheckpointError(f"checkpoint {path}: the random states did not come back; a resumed run would differ")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
