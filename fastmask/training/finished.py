"""A finished run, loaded to evaluate, predict or look at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastmask.models import attach
from fastmask.parsing.parser import Parser
from fastmask.subnetworks import Subnetworks
from fastmask.training import checkpoints
from fastmask.training.config import TrainConfig
from fastmask.training.loop import MASKS_FILE
from fastmask.training.run_folder import CONFIG_FILE

__all__ = ["FinishedRun", "check_finished", "load_run"]


@dataclass(frozen=True)
class FinishedRun:
    """The parser of a run in evaluation mode, its settings, and its subnetworks (None for method `full`)."""

    parser: Parser
    config: TrainConfig
    subnetworks: Subnetworks | None


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
    if not (folder / "model" / "parser.json").is_file():
        last = checkpoints.latest(folder)
        state = f"its last checkpoint is {last.name}" if last else "it has no checkpoint yet"
        raise FileNotFoundError(
            f"the run in {folder} has not finished; {state}: go on with `fastmask train --out {folder} --resume`"
        )
    return folder


def load_run(run: str | os.PathLike[str], attached: bool = True) -> FinishedRun:
    """Load a finished run, with its subnetworks attached unless `attached` is False.

    Raises:
        FileNotFoundError: no such folder, not a run, or a run that has not finished; the message says which.
    """
    folder = check_finished(run)
    config = TrainConfig.load(folder / CONFIG_FILE)
    parser = Parser.load(folder / "model")
    masks = folder / MASKS_FILE
    subnetworks = Subnetworks.load(masks) if masks.is_file() else None
    if subnetworks is not None and attached:
        attach(parser.encoder, subnetworks)
    return FinishedRun(parser, config, subnetworks)
