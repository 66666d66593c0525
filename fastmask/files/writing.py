"""Files that are whole or not there, and folders that are removed only if this package made them.

What is being written has a name that starts with ``.partial-`` until it is complete and on disk; what is being deleted
one that starts with ``.old-``. Both are never read.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "is_leftover",
    "named_errors",
    "partial_name",
    "remove_leftovers",
    "remove_tree",
    "replace_file",
    "sync",
    "write_folder",
    "write_text",
]

_LEFTOVER = re.compile(r"\.(partial|old)-[0-9a-f]{12}-(.+)", re.DOTALL)
_SAID, _KEPT = "cannot write: ", "; what was there before is still there"


def partial_name(target: Path, kind: str = "partial") -> Path:
    """A new name beside `target` for what is half written ("partial") or half deleted ("old").

    It is drawn at random: process numbers repeat between containers that share a folder.
    """
    return target.with_name(f".{kind}-{secrets.token_hex(6)}-{_stem(target.name)}")


def _stem(name: str) -> str:
    """What stays of a name in a temporary one: names may have 255 bytes, so a long one is cut."""
    return name.encode()[:200].decode(errors="ignore")


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, replacing the file that is there.

    Links are followed: the file that a link names is replaced, not the link. What is not a regular file
    (``/dev/stdout``, a FIFO) is never replaced: `write` is given it itself.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: the disk is full, or the place cannot be written to; the message names the file, and what was there
            is still there.
    """
    target = Path(os.path.realpath(path))
    with named_errors(path):
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)")
        if not stat.S_ISREG(mode):
            write(Path(path))
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(target)
        try:
            write(partial)
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()))


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


@contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file could not be written: the system names the temporary one, or none at all."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _named(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors and others wrap the system's error in one of their own.
        found = re.search(r"os error (\d+)", str(error))
        if found:
            raise _named(path, int(found[1]), os.strerror(int(found[1]))) from error
        raise


def _named(path: str | os.PathLike[str], number: int | None, what: str) -> OSError:
    kept = _KEPT if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    what = what.removeprefix(_SAID).removesuffix(_KEPT)  # it may have been named by the writer
    # Built from number and text, so that Python chooses the class (PermissionError, IsADirectoryError, ...).
    return OSError(number or errno.EIO, f"{_SAID}{what}{kept}", os.fspath(path))


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file or a folder on disk before its new name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Path) -> None:
    """Delete a folder that this package made; one that is half deleted never stands under its own name.

    A link is refused, not followed: whatever it leads to is somebody else's.

    Raises:
        OSError: a link, or something that cannot be deleted.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and only folders are deleted", os.fspath(folder))
    if not folder.exists():
        return
    doomed = partial_name(folder, "old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def is_leftover(name: str) -> bool:
    """Whether a name is one of `partial_name`: what a killed process left, or another one is writing."""
    return _LEFTOVER.fullmatch(name) is not None


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
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover is None or (of is not None and leftover[2] != _stem(of)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
