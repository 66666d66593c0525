"""What the loop keeps of a run, by one process for all, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from fastmask.files import FileError, read_json_lines, remove_tree, write_folder
from fastmask.subnetworks import Subnetworks
from fastmask.training import checkpoints, state
from fastmask.training.checkpoints import CheckpointError, Progress
from fastmask.training.finished import MASKS_FILE, check_run, is_finished, load_run, write_finished
from fastmask.training.manifest import MANIFEST, Origin, check_files, write_manifest
from fastmask.training.metrics import METRICS_FILE
from fastmask.training.outcome import TrainingDiverged
from fastmask.training.processes import on_first
from fastmask.training.random_state import random_state
from fastmask.training.run_folder import open_run

if TYPE_CHECKING:
    from fastmask.training.loop import _Run

__all__ = ["go_on", "has_switch", "save", "switch_folder", "write_model", "write_switch"]

Writers = dict[str, Callable[[Path], Any]]


def _origin(run: _Run) -> Origin:
    """What is true of everything that is written now."""
    settings, processes = run.config.identity(), run.accelerator.num_processes
    return Origin(step=run.step, processes=processes, settings=settings, inputs=run.inputs)


def _masks(run: _Run) -> Writers:
    """What writes the subnetworks, and how they came to be if they are dynamic."""
    writers: Writers = {}
    if run.subnetworks is not None:
        writers[checkpoints.MASKS] = run.subnetworks.save
    if run.dynamic is not None:
        writers[checkpoints.DYNAMIC] = run.dynamic.save
    return writers


# ---- writing


def save(run: _Run) -> None:
    """Write a checkpoint, unless the weights are spoilt."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in run.parser.parameters()):
        raise TrainingDiverged("weights are not finite", run.step, run.checkpoint)
    states = gather_object([random_state(run.accelerator.device)])
    writers: Writers = {
        checkpoints.MODEL: partial(state.save_weights, run.parser),
        checkpoints.OPTIMIZER: partial(state.save_optimizer, run.optimizer),
        checkpoints.RANDOM: partial(state.save_random_states, states),
        **_masks(run),
    }
    progress = Progress(
        sampler=run.batches.state_dict(),
        window=run.window.state_dict(),
        history=run.log.history,
        evaluate=run.unscored,
        episodes=None if run.phase is run.batches else run.phase.state_dict(),
    )
    # Other runs can branch off from the shared steps, so their end is kept.
    keep, pinned = run.config.keep_checkpoints, run.config.shared_steps
    write = partial(checkpoints.save, run.folder, _origin(run), writers, progress, keep, pinned)
    run.checkpoint = on_first(run.accelerator, write)


def switch_folder(run: Path) -> Path:
    """Where the subnetworks are kept that were found at the switch: they may have taken long to find."""
    return checkpoints.folder_of(run) / "switch"


def has_switch(run: _Run) -> bool:
    """Whether the subnetworks of this very switch are there."""

    def known() -> bool:
        try:
            return check_files(switch_folder(run.folder)) == _origin(run)
        except FileError:
            return False

    return on_first(run.accelerator, known)


def write_switch(run: _Run, found: Subnetworks) -> None:
    """Keep the subnetworks that were found."""
    target = switch_folder(run.folder)
    manifest = partial(write_manifest, origin=_origin(run), names=[MASKS_FILE])
    writers: Writers = {MASKS_FILE: found.save, MANIFEST: manifest}
    on_first(run.accelerator, lambda: write_folder(target, writers, lambda: remove_tree(target)))


def write_model(run: _Run) -> None:
    """Leave model and masks where they are looked for, unless they are there."""

    def write() -> None:
        if is_finished(run.folder):
            with suppress(FileError):
                if check_run(run.folder) == _origin(run):
                    return
        write_finished(run.folder, run.parser, _origin(run), _masks(run))

    on_first(run.accelerator, write)


# ---- going on


def go_on(run: _Run) -> list[dict[str, Any]]:
    """Bring a run to where its folder says it was; returns the metrics up to there."""
    look = partial(open_run, run.config, run.inputs, run.accelerator.num_processes)
    start = on_first(run.accelerator, look)
    if start is None:
        return []
    try:
        return _to_the_end(run) if start == run.folder else _to_checkpoint(run, start)
    except (FileError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{start} cannot be gone on from: {error}") from error


def _to_checkpoint(run: _Run, path: Path) -> list[dict[str, Any]]:
    progress = checkpoints.read_progress(path)
    run.batches.load_state_dict(progress.sampler)
    if (path / checkpoints.MASKS).is_file():
        run.attach(Subnetworks.load(path / checkpoints.MASKS))
        run.switched = True
    if progress.episodes is not None:
        run.phase = run.episodes()
        run.phase.load_state_dict(progress.episodes)
        run.switched = True
    state.load_weights(run.parser, path / checkpoints.MODEL)
    state.load_optimizer(run.optimizer, path / checkpoints.OPTIMIZER)
    if run.dynamic is not None:
        run.dynamic.load(path / checkpoints.DYNAMIC)
        run.subnetworks = run.dynamic.subnetworks
    run.window.load_state_dict(progress.window)
    run.step, run.unscored, run.checkpoint = checkpoints.step_of(path), progress.evaluate, path
    process, device = run.accelerator.process_index, run.accelerator.device
    state.load_random_state(path / checkpoints.RANDOM, process, device)  # last: what is built draws numbers
    return progress.history


def _to_the_end(run: _Run) -> list[dict[str, Any]]:
    """A run that has finished and lost its checkpoints since: nothing is left but to score it."""
    loaded = load_run(run.folder, attached=False)
    run.parser.load_state_dict(loaded.parser.state_dict())
    if loaded.subnetworks is not None:
        run.attach(loaded.subnetworks)
    run.step = run.config.steps
    history: list[dict[str, Any]] = list(read_json_lines(run.folder / METRICS_FILE))
    run.unscored = bool(run.dev) and not any(r["step"] == run.step and "dev" in r for r in history)
    return history
