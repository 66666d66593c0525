"""The folder of a run: started once, never overwritten, resumed only with its own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastmask.files import replace_file
from fastmask.training import checkpoints
from fastmask.training.config import ConfigError, TrainConfig

__all__ = ["CONFIG_FILE", "check_out", "open_run"]

CONFIG_FILE = "config.yaml"


def check_out(config: TrainConfig) -> None:
    """See that `config.out` is free, or holds the run that is to be resumed; writes nothing.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or its settings differ from `config`.
    """
    folder = Path(config.out)
    settings = folder / CONFIG_FILE
    held = settings.is_file() or checkpoints.latest(folder) is not None
    if held and not config.resume:
        raise ConfigError(
            f"out is {str(folder)!r}, which holds a run (expected a new folder, or resume to go on with it)"
        )
    if settings.is_file():
        differences = TrainConfig.load(settings).differences(config)
        if differences:
            listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differences.items())
            raise ConfigError(f"the run in {folder} has other settings: {listed} (expected the same to resume it)")


def open_run(config: TrainConfig, accelerator: Any) -> Path | None:
    """Make or reopen the folder `config.out`; return the checkpoint to go on from, or None at the start.

    ``config.yaml`` is what marks a folder as a run. Resuming a folder without one starts a new run there.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or its settings differ from `config`.
    """
    check_out(config)
    folder = Path(config.out)
    settings = folder / CONFIG_FILE
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clean(folder)
        if not settings.is_file():
            started = dataclasses.replace(config, resume=False)
            replace_file(settings, started.save)
    accelerator.wait_for_everyone()
    return checkpoints.latest(folder)
