"""The treebanks of a run: a folder on disk, or the embedded artificial languages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastmask.files import write_folder
from fastmask.tasks.data import synthetic
from fastmask.tasks.data.treebanks import find_treebanks, load_treebanks
from fastmask.training.config import TrainConfig

__all__ = ["data_of_run", "embedded_treebanks", "load_training_data", "training_languages"]


def embedded_treebanks(run: str | os.PathLike[str]) -> Path:
    """Write the artificial languages to ``RUN/data`` (once) and return that folder."""
    target = Path(run, "data")
    if not target.is_dir():
        try:
            write_folder(target, {".": synthetic.write_treebanks})
        except OSError:
            if not target.is_dir():  # another process was faster: its files are the same
                raise
    return target


def data_of_run(config: TrainConfig, run: str | os.PathLike[str]) -> tuple[str | Path, str]:
    """The folder of treebanks and the `languages` that a run in folder `run` trains on; makes the embedded ones."""
    if config.data is None:
        return embedded_treebanks(run), config.languages or ",".join(synthetic.SEEN)
    return config.data, config.languages or training_languages(config.data)


def training_languages(data: str | os.PathLike[str]) -> str:
    """Every language of a folder that has training data, as a `languages` setting."""
    codes = sorted({bank.code for bank in find_treebanks(data).values() if "train" in bank.files})
    if not codes:
        raise ValueError(f"no treebank in {os.fspath(data)} has training data (*train.conllu)")
    return ",".join(codes)


def load_training_data(data: str | os.PathLike[str], languages: str) -> dict[str, dict[str, Any]]:
    """Language -> split -> rows: train for every language, dev and test where there are any."""
    return load_treebanks(data, languages, optional=("dev", "test"))
