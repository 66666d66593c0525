"""Files that are whole or not there.

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

from fastmask.files.reading import FileError, descriptor_of

__all__ = [
    "check_writable",
    "is_leftover",
    "named_errors",
    "partial_name",
    "replace_file",
    "sync",
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
    return os.fsencode(name)[:200].decode(errors="ignore") or "name"


def is_leftover(name: str, of: str | None = None) -> bool:
    """Whether a name is one of `partial_name`: what a killed process left, or another one is writing.

    Args:
        name: of a file or folder.
        of: only of the file or folder of this name.
    """
    found = _LEFTOVER.fullmatch(name)
    return found is not None and (of is None or found[2] == _stem(of))


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any], *, follow: bool = True) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, in place of the file that is there.

    Folders that are not there are made; a file that is there keeps its owner and permissions.

    Args:
        path: where to.
        write: writes a file to the path that it is given, a regular file.
        follow: for names that the user gave. The file that a link names is replaced, not the link; and what is not a
            regular file (a FIFO, a device), or is open already (``/dev/stdout``, ``>> log``), is never replaced: what
            was written is copied into it. Without it, for names of ours in folders that may come from somebody else,
            whatever has the name is replaced, and nothing outside the folder is touched.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: the disk is full, or the place cannot be written to; the message names the file, and what was there
            is still there.
        FileError: the path, or what was to be written, has letters that no file can have.
    """
    with named_errors(path):
        target, before = _place(path, follow)
        stream = _stream(path, before) if follow else None
        if stream is None:
            target.parent.mkdir(parents=True, exist_ok=True)
    if stream is not None:
        _copy_into(stream, path, write)
        return
    partial = partial_name(target)
    try:
        with named_errors(path, partial):
            partial.touch(exist_ok=False)
            _make_like(partial, before)
            wanted = partial.stat()
            write(partial)
            _make_like(partial, wanted)  # some writers put a file of their own there, for its owner's eyes only
            sync(partial)
            os.replace(partial, target)
        with named_errors(path), suppress(PermissionError):  # a folder that may be written to and not read
            sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, follow: bool = True) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()), follow=follow)


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before any work is done, that `replace_file` will be able to put a file at `path`.

    Folders on the way that are missing are not made; a file is made in the nearest one that is there, and removed.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: no file can be made there; the message names the path.
        FileError: the path has letters that no file can have.
    """
    with named_errors(path):
        target, before = _place(path, follow=True)
        if _stream(path, before) is not None:
            return
        if before is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
        # Tried out: permissions do not tell of a file system that is read-only or makes no files, such as /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass


def _place(path: str | os.PathLike[str], follow: bool) -> tuple[Path, os.stat_result | None]:
    """Which name is to be replaced, and what has it now."""
    name = os.fspath(path)
    try:
        before = os.stat(name) if follow else os.lstat(name)
    except FileNotFoundError:  # or a link to nothing, which is a way to name a new file
        before = None
        if name.endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, "names a folder (expected a file)") from None
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)")
    return Path(os.path.realpath(name) if follow else name), before


def _stream(path: str | os.PathLike[str], there: os.stat_result | None) -> str | int | None:
    """What must be written into instead of replaced: the number of an open file, or the path; None: nothing."""
    opened = descriptor_of(path)
    if opened is not None:
        return opened
    if there is None:
        return None
    for number in (1, 2):  # standard output goes to this very file
        with suppress(OSError):
            if os.path.samestat(there, os.fstat(number)):
                return number
    return None if stat.S_ISREG(there.st_mode) else os.fspath(path)


def _make_like(file: Path, other: os.stat_result | None) -> None:
    """Give a file the owner and the permissions of another regular one."""
    if other is None or not stat.S_ISREG(other.st_mode):
        return
    with suppress(OSError):  # not every user can, and not every file system has them
        os.chown(file, other.st_uid, other.st_gid)
    with suppress(OSError):
        os.chmod(file, stat.S_IMODE(other.st_mode))


def _copy_into(stream: str | int, path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write into what cannot be replaced: all of it or, if `write` fails, nothing."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")  # a writer may go back in its file, which a pipe does not allow
        with named_errors(path, whole):
            write(whole)
        with named_errors(path):
            for printed in (sys.stdout, sys.stderr):
                printed.flush()
            # Opened anew, an open file would be written from its beginning.
            handle = os.dup(stream) if isinstance(stream, int) else os.open(stream, os.O_WRONLY | os.O_NOCTTY)
            with open(handle, "wb") as target, open(whole, "rb") as source:
                shutil.copyfileobj(source, target)


@contextmanager
def named_errors(path: str | os.PathLike[str], written: Path | None = None) -> Iterator[None]:
    """Say which file could not be written: the system names the temporary one, or none at all.

    Where `written` is given, an error that names another file is left alone: it is about what is read meanwhile.
    """
    try:
        yield
    except OSError as error:
        if written is not None and error.filename is not None and str(error.filename) != str(written):
            raise
        raise _named(path, error.errno, error.strerror or str(error)) from error
    except FileError:
        raise
    except Exception as error:
        # safetensors and others wrap the system's error in one of their own.
        found = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if found:
            number = int(found[1] or found[2])
            raise _named(path, number, os.strerror(number)) from error
        if isinstance(error, UnicodeEncodeError) or "null byte" in str(error):
            raise FileError(path, f"cannot be written: {error}") from None
        raise


def _named(path: str | os.PathLike[str], number: int | None, what: str) -> OSError:
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    kept = _KEPT if full and os.path.exists(path) and not stat.S_ISCHR(os.stat(path).st_mode) else ""
    what = what.removeprefix(_SAID).removesuffix(_KEPT)  # it may have been named by the writer
    # Built from number and text, so that Python chooses the class (PermissionError, IsADirectoryError, ...).
    return OSError(number or errno.EIO, f"{_SAID}{what}{kept}", os.fspath(path))


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
