"""Runs that were made of another run by adapting it to one more language: `fastmask adapt`.

Such a folder is a finished run like any other: ``model/`` with the adapted weights, ``config.yaml`` of the run it was
made of, ``masks.safetensors`` with the new language as its last one, and ``results.json``, which has a record for each
language that was added.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmask.files import MANIFEST, StrPath, check, files_in, read_json, remove_leftovers, write_folder, write_manifest
from fastmask.settings import ConfigError
from fastmask.tasks.data.language_codes import same_language
from fastmask.training.run_folder import CONFIG_FILE, MASKS_FILE, MODEL, RESULTS_FILE, FinishedRun, data_of
from fastmask.unseen.choosing import Choice, with_language

RECORDS = "adaptations"  # in it, oldest first
PROFILE = "profile"  # in a record: what the task knows of the language by its support examples, see `Task.profile`


def check_new_folder(out: StrPath) -> Path:
    """Return the folder of a run that is to be written; raise `ConfigError` if something is there already."""
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"out is {os.fspath(out)!r}, which is there already (expected a new or an empty folder)")
    return folder


def adaptations_of(run: StrPath) -> list[dict[str, Any]]:
    """The records of the languages that were added to a run, oldest first; raises FileError if they are damaged."""
    path = Path(run, RESULTS_FILE)
    if not path.is_file():
        return []
    return check(path, read_json(path).get(RECORDS, []), list[dict[str, Any]])


def check_new(language: str, loaded: FinishedRun, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` if the run was trained on `language`, or adapted to it."""
    config = loaded.config
    trained: Iterable[str] = config.language_list if loaded.subnetworks is None else loaded.subnetworks.languages
    if not trained and config.data and os.path.exists(config.data):
        trained = config.task_class.languages(config.data, config.task_settings)
    banks = [name.removeprefix("UD_").partition("-")[0] for name in trained if name.startswith("UD_")]
    known = list(dict.fromkeys([*trained, *banks, *(record["language"] for record in records)]))
    if (found := same_language(language, known)) is not None:
        also = "" if found == language else f", under the name {found!r}"
        raise ConfigError(
            f"language is {language!r}, which the run was trained on or adapted to already{also} "
            f"(expected another one than {', '.join(known)})"
        )


def profiles_of(loaded: FinishedRun, run: StrPath, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the task knows of each language with a subnetwork (`Task.profile`), in order.

    Of a training language by all of its training examples, of one that was added by its support set.

    Raises:
        FileNotFoundError: the data is not there any more.
        ValueError: the data has no trees, or a language was added without examples.
    """
    assert loaded.subnetworks is not None
    task, otherwise = loaded.task, "choose best, union or full, or nearest by URIEL"
    added = {record["language"]: record[PROFILE] for record in records}
    if silent := [language for language, profile in added.items() if not profile]:
        raise ValueError(f"{', '.join(silent)} was added to the run without {task.example_word}: {otherwise}")
    data, languages, _ = data_of(loaded.config, run)
    if not os.path.exists(data):
        raise FileNotFoundError(f"{otherwise}: the data that the run was trained on is not there ({data})")
    splits = task.load(data, languages, loaded.config.task_settings, splits=("train",))
    profiles = {name: task.profile(of["train"]) for name, of in splits.items()} | added
    if silent := [name for name, profile in profiles.items() if profile is None]:
        raise ValueError(f"the training data of {', '.join(silent)} has no trees to tell what is near: {otherwise}")
    return {language: profiles[language] for language in loaded.subnetworks.languages}


def save_adapted(
    folder: Path,
    loaded: FinishedRun,
    choice: Choice,
    record: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]],
    profile: Mapping[str, Any] | None,
) -> None:
    """Write a run into a new or empty folder, whole or not at all.

    `loaded` is the run it is made of, whose model has the adapted weights by now; the new language, "language" of the
    `record`, gets a copy of the `choice`. `profile` is that of its support set (`Task.profile`).
    """
    config = dataclasses.replace(loaded.config, out=os.fspath(folder))
    records = [*earlier, {**record, PROFILE: None if profile is None else dict(profile)}]
    results = json.dumps({"settings": dataclasses.asdict(config), RECORDS: records}, indent=1)
    writers: dict[str, Callable[[Path], Any]] = {MODEL: loaded.task.save}
    if loaded.subnetworks is not None:
        writers[MASKS_FILE] = with_language(loaded.subnetworks, record["language"], choice, loaded.task.encoder).save
    writers[CONFIG_FILE] = config.save
    writers[RESULTS_FILE] = lambda path: path.write_text(results, encoding="utf-8")
    writers[MANIFEST] = lambda path: write_manifest(path, files_in(path.parent))
    remove_leftovers(folder.parent, of=folder.name)
    write_folder(folder, writers)
