"""A finished run: its files under one manifest, and loaded to evaluate, predict or look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmask.files import remove_tree, replace_file, write_folder
from fastmask.models import attach
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.parsing.parser import Parser
from fastmask.training import checkpoints
from fastmask.training.config import TrainConfig
from fastmask.training.manifest import MANIFEST, Origin, check_files, files_in, write_manifest

__all__ = [
    "CONFIG_FILE",
    "MASKS_FILE",
    "MODEL",
    "FinishedRun",
    "check_finished",
    "check_run",
    "is_finished",
    "load_run",
    "write_finished",
]

CONFIG_FILE = "config.yaml"
MODEL = "model"
MASKS_FILE, DYNAMIC_FILE = checkpoints.MASKS, checkpoints.DYNAMIC


@dataclass(frozen=True)
class FinishedRun:
    """The parser of a run in evaluation mode, its settings, its subnetworks (None for method `full`), its origin."""

    parser: Parser
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
        state = f"its last checkpoint is {last.name}" if last else "it has no checkpoint yet"
        raise FileNotFoundError(
            f"the run in {folder} has not finished (it has no {MANIFEST}); {state}: go on with "
            f"`fastmask train --out {folder} --resume`"
        )
    return folder


def check_run(folder: Path) -> Origin:
    """Return the origin of a finished run whose model, masks and settings are as they were written.

    Raises:
        FileError: something is missing, superfluous or altered; the message names the file.
    """
    return check_files(folder, (CONFIG_FILE, MODEL, MASKS_FILE, DYNAMIC_FILE))


def write_finished(folder: Path, parser: Parser, origin: Origin, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write what a run leaves into its folder, which holds its settings: the model, other files, and the manifest.

    Args:
        folder: of the run.
        parser: goes into ``model/``.
        origin: goes into the manifest.
        writers: name of a file -> called with the path to write it to.
    """
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)  # until all is in place the run has not finished
    model = folder / MODEL
    write_folder(model, {".": parser.save}, make_room=lambda: remove_tree(model))
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
    parser = Parser.load(folder / MODEL)
    masks = folder / MASKS_FILE
    subnetworks = Subnetworks.load(masks) if masks.is_file() else None
    if subnetworks is not None and attached:
        attach(parser.encoder, subnetworks)
    return FinishedRun(parser, config, subnetworks, origin)
