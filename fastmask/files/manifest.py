"""What a folder holds: ``manifest.json`` has the SHA-256 of every file.

It is written last. A folder whose manifest is missing, or not that of its files, is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fastmask.files.reading import FileError, check, read_json, sha256_of

__all__ = ["MANIFEST", "check_files", "files_in", "write_manifest"]

MANIFEST = "manifest.json"


def write_manifest(path: Path, names: Iterable[str]) -> None:
    """Write the manifest of the files `names` beside it."""
    files = {name: sha256_of(path.parent / name) for name in sorted(names)}
    path.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def check_files(folder: Path) -> None:
    """See that the files of a folder are, byte for byte, those that were written.

    Raises:
        FileError: one is missing or altered, or the manifest is; the message names the file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileError(path, "is missing (expected the list of the folder's files)")
    files: dict[str, str] = check(path, read_json(path).get("files"), dict[str, str])
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise FileError(file, f"is missing (expected, as {MANIFEST} has it)")
        if sha256_of(file) != digest:
            raise FileError(file, f"has other content than when it was written (expected that of {MANIFEST})")


def files_in(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all files in it and in its folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
