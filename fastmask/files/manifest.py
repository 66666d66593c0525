"""What a folder of a run holds and what it belongs to: ``manifest.json`` has the SHA-256 of every file.

It is written last. A folder whose manifest is missing, altered, or not that of its files is damaged.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmask.files import FileError, Record, read_json, sha256_of

__all__ = ["MANIFEST", "Origin", "check_files", "files_in", "read_origin", "write_manifest"]

MANIFEST = "manifest.json"
VERSION = 1


class Origin(Record):
    """The moment of a run that a folder holds.

    Attributes:
        step: steps done.
        processes: that took part.
        settings: name -> value, of those that make it this run and no other.
        inputs: what it was trained on -> SHA-256 of the content.
    """

    step: int
    processes: int
    settings: dict[str, Any]
    inputs: dict[str, str]


class _Manifest(Record):
    version: int
    origin: Origin
    files: dict[str, str]
    sha256: str = ""  # of all the others, as this class writes them

    def own_sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


def write_manifest(path: Path, origin: Origin, names: Iterable[str]) -> None:
    """Write the manifest of the files `names` beside it."""
    files = {name: sha256_of(path.parent / name) for name in sorted(names)}
    manifest = _Manifest(version=VERSION, origin=origin, files=files)
    whole = manifest.model_copy(update={"sha256": manifest.own_sha256()})
    path.write_text(whole.model_dump_json(indent=1), encoding="utf-8")


def read_origin(folder: Path) -> Origin:
    """The origin of a folder, of whose other files nothing is looked at; see `check_files`."""
    return _read(folder).origin


def check_files(folder: Path, owned: Iterable[str] | None = None) -> Origin:
    """Return the origin of a folder whose files are, byte for byte, those that were written.

    Args:
        folder: with a manifest.
        owned: names of files and folders in it that must be in the manifest if they are there; None: all.

    Raises:
        FileError: something is missing, superfluous or altered; the message names the file.
    """
    manifest = _read(folder)
    if owned is not None:
        owned = {*owned, *(name.partition("/")[0] for name in manifest.files)}
    there = files_in(folder, owned) - {MANIFEST}
    for name in sorted(manifest.files.keys() | there):
        if name not in there:
            raise FileError(folder / name, f"is missing (expected, as {MANIFEST} has it)")
        if name not in manifest.files:
            raise FileError(folder / name, f"does not belong there (expected only what {MANIFEST} has)")
        if sha256_of(folder / name) != manifest.files[name]:
            raise FileError(folder / name, f"has other content than when it was written (expected that of {MANIFEST})")
    return manifest.origin


def files_in(folder: Path, only: Iterable[str] | None = None) -> set[str]:
    """Names, relative to `folder`, of all files in it and in its folders, or in those of its entries named in `only`.

    Raises:
        FileError: a link, which may lead anywhere, or what is neither a file nor a folder (a FIFO hangs who reads it).
    """
    if folder.is_symlink():
        raise FileError(folder, "is a link (expected a folder)")
    found: set[str] = set()
    for name in os.listdir(folder) if only is None else only:
        path = folder / name
        if not os.path.lexists(path):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found |= {f"{name}/{inner}" for inner in files_in(path)}
        elif stat.S_ISREG(mode):
            found.add(name)
        else:
            raise FileError(path, "is a link or a device (expected a file or a folder)")
    return found


def _read(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise FileError(path, "is not a regular file (expected the manifest)")
        manifest: _Manifest = read_json(path, _Manifest)
    except FileNotFoundError:
        raise FileError(path, "is missing (expected the list of the folder's files)") from None
    if any(part in ("", ".", "..") for name in manifest.files for part in name.split("/")):
        raise FileError(path, "names a file outside of its folder")
    if manifest.version > VERSION:
        raise FileError(path, f"has version {manifest.version} (expected at most {VERSION}: update fastmask)")
    if manifest.sha256 != manifest.own_sha256():
        raise FileError(path, "has other content than when it was written")
    return manifest
