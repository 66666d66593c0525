"""Rows by language and split, from where users have them: folders, files, saved datasets, the Hub, treebanks.

* a folder of JSON (lines), CSV or Parquet files with train, dev (or validation) or test in their names
* a folder with such a folder for each language, whose name is then the language
* one such file: the split that its name says, else train
* what `datasets` saved (`Dataset.save_to_disk`), or a name on the Hub; a configuration of it for each language will do
* a folder of ``UD_*`` treebanks

Without a folder for each language, a column names the language of each row.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas

from fastmask.errors import unknown
from fastmask.files import FileError, StrPath, sha256_of
from fastmask.settings import items_of
from fastmask.tasks.data.conllu import read_sentences
from fastmask.tasks.data.language_codes import same_language
from fastmask.tasks.data.treebanks import SPLITS, load_treebanks, preparing, trained_languages
from fastmask.tasks.predicting import rows_of_lines

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")
_SPLIT_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
_EXPECTED = "a folder, a file or a name on the Hub"

Parts = dict[str, Callable[[], datasets.Dataset]]  # split -> reads it


def languages_of(data: StrPath, language_column: str) -> list[str]:
    """Every language of `data` that has training data, sorted; see `load`.

    Raises:
        ValueError: there is none.
    """
    if _has_treebanks(data):
        found = trained_languages(data)
    else:
        by_language = _by_language(data, language_column, ("train",))
        found = sorted(name for name, parts in by_language.items() if "train" in parts())
    if not found:
        raise ValueError(f"nothing in {os.fspath(data)} is training data (expected train in the name of a file)")
    return found


def load(
    data: StrPath,
    languages: str | Sequence[str],
    language_column: str = "language",
    splits: Sequence[str] = SPLITS,
    optional: Sequence[str] = (),
) -> dict[str, dict[str, datasets.Dataset]]:
    """Return language -> split -> data set, languages in the order asked for. Classes are called by their names.

    Args:
        data: see this module.
        languages: comma-separated or a list, as the data has them or by another name (EN, English for en).
        language_column: names the language of a row, where there is no folder for each language.
        splits: which of train, dev and test to load.
        optional: those of them that a language may lack.

    Raises:
        FileNotFoundError: no such data.
        FileError: a file that is not what its name says.
        FastmaskKeyError: an unknown language, column or split; the nearest are named.
        ValueError: a language without a split that is not optional, or no languages.
    """
    for split in [*splits, *optional]:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
    if _has_treebanks(data):
        return load_treebanks(data, languages, splits, optional)
    asked = items_of(languages if isinstance(languages, str) else ",".join(languages))
    if not asked:
        raise ValueError("no languages given (expected names as the data has them, as in 'en,de')")
    by_language = _by_language(data, language_column, splits)
    loaded: dict[str, Parts] = {}
    for item in asked:  # all complaints before the rows are read
        name = same_language(item, by_language)
        if name is None:  # where a column names languages, these are those of the splits asked for
            by_language = {**_by_language(data, language_column, SPLITS), **by_language}
            name = same_language(item, by_language)
        if name is None:
            raise unknown("language", item, by_language)
        parts = by_language[name]()
        for split in splits:
            if split not in parts and split not in optional:
                there = ", ".join(parts) or "none of those asked for"
                raise ValueError(f"language {name!r} has no {split} split in {os.fspath(data)} (it has {there})")
        loaded[name] = {split: parts[split] for split in splits if split in parts}
    return {name: {split: read() for split, read in parts.items()} for name, parts in loaded.items()}


def read_file(path: StrPath) -> list[Mapping[str, Any]]:
    """The rows of one file: JSON (lines), CSV, Parquet or CoNLL-U, by its ending; ``/dev/stdin`` has JSON lines.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: another ending, or a file that is not what its name says.
        ConlluError: not CoNLL-U.
    """
    if os.fspath(path) == "/dev/stdin":
        return list(rows_of_lines(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {os.fspath(path)}")
    if Path(path).suffix == ".conllu":
        return [vars(sentence) for sentence in read_sentences(path, require_tree=False)]
    return list(_read(Path(path)))


# ---- where the parts are


def _has_treebanks(data: StrPath) -> bool:
    root = Path(data).expanduser()
    if not root.is_dir():
        return False
    return root.resolve().name.startswith("UD_") or any(any(root.glob(p)) for p in ("UD_*/*.conllu", "*/UD_*/*.conllu"))


def _by_language(data: StrPath, column: str, splits: Sequence[str]) -> Mapping[str, Callable[[], Parts]]:
    """Language -> finds its parts; where a column says the language, of the splits asked for."""
    groups = _groups(data)
    if not callable(groups):
        return groups
    found: dict[str, Parts] = {}
    parts = groups()
    for split in (split for split in splits if split in parts):
        rows = parts[split]()
        if column not in rows.column_names:
            error = unknown("column", column, rows.column_names)
            raise type(error)(f"{os.fspath(data)}, {split}: {error} (expected one that names the language of a row)")
        names = np.array([None if name is None else str(name) for name in rows[column]], dtype=object)
        if nameless := int((names == None).sum()):  # noqa: E711 - of each element
            where = f"{os.fspath(data)}, {split}"
            warnings.warn(f"{where}: {nameless} of {len(names)} rows have no {column} and are left out", stacklevel=2)
        for name in dict.fromkeys(name for name in names.tolist() if name is not None):
            found.setdefault(name, {})[split] = partial(rows.select, np.flatnonzero(names == name))
    return {name: partial(dict, of) for name, of in found.items()}


def _groups(data: StrPath) -> Callable[[], Parts] | dict[str, Callable[[], Parts]]:
    """What finds the parts, or for each language what finds its parts."""
    root = Path(data).expanduser()
    if root.is_file():
        if root.suffix.lower() not in KINDS:
            way_out = ": unpack it" if root.suffix.lower() in PACKED else ", or a folder of UD_* treebanks"
            raise FileError(root, f"is of an unknown kind (expected {', '.join(KINDS)}{way_out})")
        return lambda: {_split_of(root) or "train": partial(_read, root)}
    if not root.is_dir():
        return _of_hub(os.fspath(data))
    if _of_folder(root):
        return partial(_of_folder, root)
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if [folder.name for folder in folders] == ["data"]:  # as on the Hub
        return _groups(folders[0])
    groups: dict[str, Callable[[], Parts]] = {f.name: partial(_of_folder, f) for f in folders if _of_folder(f)}
    if not groups:
        raise FileNotFoundError(
            f"no data in {root} (expected {', '.join(KINDS)} files with train, dev or test in their names, in it or in "
            "a folder for each language)"
        )
    return groups


def _of_folder(folder: Path) -> Parts:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise FileError(folder, f"cannot be read as a saved dataset: {_first_line(error)}") from error
        return _of_dataset(saved)
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        split = _split_of(path) if path.suffix.lower() in KINDS and path.is_file() else None
        if split is not None:
            files.setdefault(split, []).append(path)
    return {split: partial(_joined, files[split]) for split in SPLITS if split in files}


def _of_dataset(found: Any) -> Parts:
    if isinstance(found, datasets.Dataset):
        return {_SPLIT_NAMES.get(str(found.split), "train"): partial(_named, found)}
    splits = {_SPLIT_NAMES[name]: rows for name, rows in found.items() if name in _SPLIT_NAMES}
    return {split: partial(_named, rows) for split, rows in splits.items()}


def _of_hub(name: str) -> Callable[[], Parts] | dict[str, Callable[[], Parts]]:
    """Of a dataset with several configurations each is a language; one is loaded only when it is asked for."""
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or Path(name).suffix.lower() in KINDS:
        raise FileNotFoundError(f"no data at {name} (expected {_EXPECTED})")

    def parts(*configuration: str) -> Parts:
        with preparing():
            return _of_dataset(datasets.load_dataset(name, *configuration))

    try:
        with preparing():
            configurations = datasets.get_dataset_config_names(name)
        if len(configurations) > 1:
            return {each: partial(parts, each) for each in configurations}
        return partial(dict, parts())
    except Exception as error:  # of many kinds: no such name, no network, files that are no data
        said = _first_line(error)
        raise FileNotFoundError(
            f"no data at {name} (expected {_EXPECTED}): no such folder or file is here, and the Hub says: {said}"
        ) from None


# ---- reading


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    found = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def _joined(paths: Sequence[Path]) -> datasets.Dataset:
    parts = [_read(path) for path in paths]
    try:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except Exception as error:  # columns of other types
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names} do not fit together: {_first_line(error)}") from None


def _read(path: Path) -> datasets.Dataset:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise FileError(path, f"is of an unknown kind (expected {', '.join(KINDS)} or .conllu)")
    if path.stat().st_size == 0:
        raise FileError(path, "is empty (expected at least one row)")
    try:
        with preparing():
            # As text: numbers would be read in one way here and in another there (1, 1.0 where a cell is empty), and
            # NA, nan, null and None, each of which may be a class or a language, as empty cells.
            options: dict[str, Any] = {}
            if kind == "csv":
                columns = pandas.read_csv(path, nrows=0).columns
                text = datasets.Features({column: datasets.Value("string") for column in columns})
                options = {"features": text, "keep_default_na": False, "na_values": [""]}
            # Named by its content: the cache knows a file by its path and time alone.
            options["name"] = sha256_of(path)[:16]
            return _named(datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options))
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # not about what the file holds
            raise
        raise FileError(path, f"cannot be read as {kind.upper()}: {_first_line(error)}") from error


def _named(rows: datasets.Dataset) -> datasets.Dataset:
    """The same with classes by name instead of by number."""
    for column, kind in rows.features.items():
        inner = getattr(kind, "feature", kind)
        if not isinstance(inner, datasets.ClassLabel):
            continue
        names: list[str | None] = [*inner.names, None]  # -1: not labelled
        text: Any = datasets.Value("string")
        features = rows.features.copy()
        features[column] = text if inner is kind else datasets.List(text)

        def to_names(batch: Any, column: str = column, names: Any = names, single: bool = inner is kind) -> Any:
            if single:
                return {column: [None if value is None else names[value] for value in batch[column]]}
            return {column: [value and [names[each] for each in value] for value in batch[column]]}

        with preparing():
            rows = rows.map(to_names, batched=True, features=features)
    return rows


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
