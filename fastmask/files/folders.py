"""Folders that are whole or not there, and are removed only if this package made them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmask.files.writing import is_leftover, named_errors, partial_name, sync

__all__ = ["remove_leftovers", "remove_tree", "write_folder"]


def write_folder(
    target: Path, writers: Mapping[str, Callable[[Path], Any]], make_room: Callable[[], Any] | None = None
) -> None:
    """Let each writer write a file or a folder, in their order, and put the folder of all of them at `target` at once.

    Args:
        target: not there yet, or an empty folder, or what `make_room` removes.
        writers: name -> called with the path to write to; the name "." is the folder itself.
        make_room: called when everything is written, just before the folder takes its place.

    Raises:
        OSError: the disk is full, or the place cannot be written to; the message names the file. Nothing is left of
            what was written.
    """
    partial = partial_name(target)
    try:
        with named_errors(target):
            partial.mkdir(parents=True)
        for name, write in writers.items():
            with named_errors(target / name):
                write(partial / name)
        with named_errors(target):
            for path in sorted(partial.rglob("*")):
                sync(path)
            sync(partial)
            if make_room is not None:
                make_room()
            os.replace(partial, target)
            sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def remove_tree(folder: Path) -> None:
    """Delete a folder that this package made; one that is half deleted never stands under its own name.

    A link is refused, not followed: whatever it leads to is somebody else's.

    Raises:
        OSError: a link, a file, or something that cannot be deleted.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and only folders are deleted", os.fspath(folder))
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder, and only folders are deleted", os.fspath(folder))
    doomed = partial_name(folder, "old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Delete what killed processes left half written or half deleted in a folder that this process holds the lock of.

    Only names that `partial_name` makes, directly in the folder; nothing is done in or through a link.

    Args:
        folder: of the leftovers.
        of: only those of the file or folder of this name, where that is what the lock is for.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if not is_leftover(path.name, of):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
