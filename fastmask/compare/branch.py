"""Runs that share their first steps: a new run that starts where another one stood at the switch.

All methods train the full network alike until then, so a comparison needs those steps once for each seed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastmask.files import (
    MANIFEST,
    FileError,
    check_files,
    files_in,
    held,
    remove_leftovers,
    replace_file,
    write_folder,
    write_manifest,
)
from fastmask.settings import ConfigError
from fastmask.training import run_folder
from fastmask.training.config import TrainConfig
from fastmask.training.loop import MASKS_INPUT
from fastmask.training.methods import digest_of_masks

__all__ = ["AFTER_THE_SWITCH", "branch"]

AFTER_THE_SWITCH = {"checkpoint_every"} | {
    item.name for item in dataclasses.fields(TrainConfig) if item.metadata["group"] in ("subnetworks", "meta-learning")
}
"""Settings that a branch may change: the shared steps do not depend on them. (The step of the switch itself must be one
at which the source stood before a switch of its own.)"""


def branch(source: str | os.PathLike[str], config: TrainConfig) -> None:
    """Make `config.out` a run that stands at the end of `source`'s plain steps on the full network.

    `train(task, datasets, config, ...)` with `config.resume` then goes on from there, and ends with the weights and
    metrics of a run of `config` that was not branched. `source` may be of any method, finished, stopped or still
    running. Files are linked, not copied, where the file system can: a checkpoint is never changed in place.

    Args:
        source: folder of a run that has come to step `config.shared_steps` or further.
        config: the settings of the new run; all but those in `AFTER_THE_SWITCH` (and where and how it runs: `out`,
            `data`, `device`, `threads`, `tensorboard`) must be those of `source`.

    Raises:
        FileNotFoundError: `source` is no run, or has no checkpoint of that step.
        CheckpointError: that checkpoint is damaged.
        ConfigError: `config.out` holds a run, `source` had switched before that step, or the settings do not fit.
        HeldError: another process is training in `config.out`.
    """
    folder, step = Path(source), config.shared_steps
    if not (folder / run_folder.CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is not a run of `fastmask train`: it has no {run_folder.CONFIG_FILE}")
    theirs = TrainConfig.load(folder / run_folder.CONFIG_FILE)
    differences = {k: v for k, v in theirs.differences(config).items() if k not in AFTER_THE_SWITCH}
    if differences:
        listed = ", ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differences.items())
        raise ConfigError(f"cannot branch off from {folder}: {listed} (expected the same until the switch)")
    if theirs.switch_step is not None and theirs.switch_step < step:
        raise ConfigError(f"the run in {folder} switched at step {theirs.switch_step} (expected not before {step})")
    start = run_folder.folder_of(folder, step)
    if not start.is_dir():
        last = run_folder.latest(folder)
        state = f"its last one is {last.name}" if last else "it has none yet"
        raise FileNotFoundError(f"the run in {folder} has no checkpoint of step {step}; {state}")
    try:
        check_files(start)
        progress = run_folder.read_progress(start)
    except FileError as error:
        raise run_folder.CheckpointError(f"cannot branch off from a damaged checkpoint: {error}") from error
    inputs = {name: digest for name, digest in progress.inputs.items() if name != MASKS_INPUT}
    if masks := digest_of_masks(config):
        inputs[MASKS_INPUT] = masks
    changed = progress.model_copy(update={"inputs": inputs}).model_dump_json()
    alone = dataclasses.replace(config, resume=False)
    run_folder.check_out(alone)
    out = Path(config.out)
    with held(out):
        run_folder.check_out(alone)
        remove_leftovers(run_folder.folder_of(out))
        names = [name for name in files_in(start) if name != MANIFEST]
        files: dict[str, Callable[[Path], Any]] = {name: partial(_link, start / name) for name in names}
        files[run_folder.PROGRESS] = lambda path: path.write_text(changed, encoding="utf-8")
        manifest = partial(write_manifest, names=names)
        write_folder(run_folder.folder_of(out, step), {**files, MANIFEST: manifest})
        # The settings come last: a folder with a checkpoint and no settings can be resumed, and ends the same.
        replace_file(out / run_folder.CONFIG_FILE, alone.save)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
