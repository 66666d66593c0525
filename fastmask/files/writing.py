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
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmask.files.descriptors import descriptor_of

__all__ = ["check_writable", "partial_name", "remove_leftovers", "remove_tree", "replace_file", "sync", "write_text"]

_LEFTOVER = re.compile(r"\.(partial|old)-[0-9a-f]{12}-.+", re.DOTALL)


def partial_name(target: Path, kind: str = "partial") -> Path:
    """A new name beside `target` for what is half written ("partial") or half deleted ("old").

    It is drawn at random: process numbers repeat between containers that share a folder.
    """
    # A name may have 255 bytes, so a long one is cut.
    stem = target.name.encode()[:200].decode(errors="ignore")
    return target.with_name(f".{kind}-{secrets.token_hex(6)}-{stem}")


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, replacing the file that is there.

    Links are followed: the file that a link names is replaced, not the link, and keeps its permissions. What is not a
    regular file (a FIFO, a device) is never replaced: `write` is given it itself. What is open already
    (``/dev/stdout``) gets the whole file when it has been written.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: the disk is full, or the place cannot be written to; the message names the file, and what was there
            is still there.
    """
    opened = descriptor_of(path)
    target = Path(os.path.realpath(path))
    with _named_errors(path):
        if opened is not None:
            _copy_into(opened, write)
            return
        there = target.exists()
        mode = target.stat().st_mode if there else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)")
        target.parent.mkdir(parents=True, exist_ok=True)
    if not stat.S_ISREG(mode):
        with _named_errors(path, Path(path)):
            write(Path(path))
        return
    partial = partial_name(target)
    try:
        with _named_errors(path, partial):
            write(partial)
            if there and partial.stat().st_mode != mode:
                partial.chmod(stat.S_IMODE(mode))
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _copy_into(opened: int, write: Callable[[Path], Any]) -> None:
    """Let a file be written and append it to one that is open already."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        write(whole)
        sys.stdout.flush()  # what was printed before comes before
        with open(whole, "rb") as source, open(opened, "wb", closefd=False) as file:
            shutil.copyfileobj(source, file)


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before any work is done, that `replace_file` will be able to put a file at `path`.

    Folders on the way that are missing are not made; a file is made in the nearest one that is there, and removed.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: no file can be made there; the message names the path.
    """
    if descriptor_of(path) is not None:
        return
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)")
        if target.exists() and not target.is_file():
            return
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
        # Tried out: permissions do not tell of a file system that is read-only or makes no files, such as /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _named(path, error.errno, error.strerror or str(error)) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()))


@contextmanager
def _named_errors(path: str | os.PathLike[str], written: Path | None = None) -> Iterator[None]:
    """Say which file could not be written: the system names the temporary one, or none at all.

    Where `written` is given, an error that names another file is left alone: it is about what is read meanwhile.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if written is not None and error.filename is not None and Path(str(error.filename)) != written:
            raise
        raise _named(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        # safetensors and others wrap the system's error in one of their own.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _named(path, errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _named(path: str | os.PathLike[str], number: int | None, what: str) -> OSError:
    kept = "; what was there before is still there" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    # Built from number and text, so that Python chooses the class (PermissionError, IsADirectoryError, ...).
    return OSError(number or errno.EIO, f"cannot write: {what}{kept}", os.fspath(path))


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


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted in a folder that this process holds the lock of.

    Only names that `partial_name` makes, directly in the folder; nothing is done in or through a link.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
