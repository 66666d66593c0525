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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastmask.files.reading import FileError

__all__ = ["check_target", "partial_name", "remove_leftovers", "remove_tree", "replace_file", "sync", "write_text"]

_LEFTOVER = re.compile(r"\.(partial|old)-[0-9a-f]{12}-.+", re.DOTALL)


def partial_name(target: Path, kind: str = "partial") -> Path:
    """A new name beside `target` for what is half written ("partial") or half deleted ("old").

    It is drawn at random: process numbers repeat between containers that share a folder.
    """
    # A name may have 255 bytes, so a long one is cut.
    stem = os.fsencode(target.name)[:200].decode(errors="ignore")
    return target.with_name(f".{kind}-{secrets.token_hex(6)}-{stem}")


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any], *, follow: bool = True) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, in place of the file that is there.

    Folders that are not there are made; a file that is there keeps its owner and permissions.

    Args:
        path: where to.
        write: writes a file to the path that it is given, a regular file.
        follow: for names that the user gave. The file that a link names is replaced, not the link; and what is not a
            regular file (``/dev/stdout``, a FIFO), or is a file that standard output goes to, is never replaced: what
            was written is copied into it. Without it, for names of ours in folders that may come from somebody else,
            whatever has the name is replaced, and nothing outside the folder is touched.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: the disk is full, or the place cannot be written to; the message names the file, and what was there
            is still there.
        FileError: the path, or what was to be written, has letters that no file can have.
    """
    with _named_errors(path):
        target, before, stream = _place(path, follow)
        if stream:
            _copy_into(path, before, write)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(target)
        try:
            partial.touch(exist_ok=False)
            _make_like(partial, before)
            wanted = partial.stat()
            write(partial)
            _make_like(partial, wanted)  # some writers put a file of their own there, for its owner's eyes only
            sync(partial)
            os.replace(partial, target)
            with suppress(PermissionError):  # a folder that may be written to and not read
                sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, follow: bool = True) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()), follow=follow)


def check_target(path: str | os.PathLike[str]) -> None:
    """See that `replace_file` can write to `path`, as far as this can be told before there is anything to write.

    Raises:
        OSError: a folder is there, or no folder can be where it should be, or this user may not write there.
    """
    with _named_errors(path):
        target, before, stream = _place(path, follow=True)
        above = target.parent
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        allowed = os.access(above, os.W_OK | os.X_OK) and (before is None or os.access(path, os.W_OK))
        if not stream and not allowed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _place(path: str | os.PathLike[str], follow: bool) -> tuple[Path, os.stat_result | None, bool]:
    """Which name is to be replaced, what has it now, and whether that must be written into instead."""
    name = os.fspath(path)
    try:
        before = os.stat(name) if follow else os.lstat(name)
    except FileNotFoundError:  # or a link to nothing, which is a way to name a new file
        before = None
        if name.endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, "names a folder (expected a file)") from None
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)")
    if not follow:
        return Path(name), before if before and stat.S_ISREG(before.st_mode) else None, False
    target = os.path.realpath(name)
    if before is None:
        return Path(target), None, False
    # A link of /proc can lead to a file that has no name any more.
    unnamed = not os.path.exists(target) or not os.path.samestat(before, os.stat(target))
    return Path(target), before, unnamed or not stat.S_ISREG(before.st_mode) or bool(_descriptors(before))


def _descriptors(file: os.stat_result) -> list[int]:
    """Which of standard output and standard error go to this file."""
    found = []
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(file, os.fstat(number)):
                found.append(number)
    return found


def _make_like(file: Path, other: os.stat_result | None) -> None:
    """Give a file the owner and the permissions of another."""
    if other is None:
        return
    with suppress(OSError):  # not every user can, and not every file system has them
        os.chown(file, other.st_uid, other.st_gid)
    with suppress(OSError):
        os.chmod(file, stat.S_IMODE(other.st_mode))


def _copy_into(path: str | os.PathLike[str], file: os.stat_result | None, write: Callable[[Path], Any]) -> None:
    """Write into what cannot be replaced: all of it or, if `write` fails, nothing."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "file")  # a writer may go back in its file, which a pipe does not allow
        write(whole)
        descriptors = _descriptors(file) if file is not None else []
        if descriptors:
            for printed in (sys.stdout, sys.stderr):
                printed.flush()
            handle = os.dup(descriptors[0])  # opened anew it would be written from its beginning
        else:
            handle = os.open(path, os.O_WRONLY | os.O_NOCTTY)
        with open(handle, "wb") as target, open(whole, "rb") as source:
            shutil.copyfileobj(source, target)


@contextmanager
def _named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file could not be written: the system names the temporary one, or none at all."""
    try:
        yield
    except OSError as error:
        raise _named(path, error.errno, error.strerror or str(error)) from error
    except FileError:
        raise
    except Exception as error:
        # safetensors and others wrap the system's error in one of their own.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _named(path, errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if isinstance(error, UnicodeEncodeError) or "null byte" in str(error):
            raise FileError(path, f"cannot be written: {error}") from None
        raise


def _named(path: str | os.PathLike[str], number: int | None, what: str) -> OSError:
    lost = number not in (errno.ENOSPC, errno.EDQUOT) or not os.path.isfile(path)
    kept = "" if lost else "; what was there before is still there"
    # Built from number and text, so that Python chooses the class (PermissionError, IsADirectoryError, ...).
    return OSError(number or errno.EIO, f"cannot write: {what}{kept}", os.fspath(path))


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file or a folder on disk before its new name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(handle)


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
