"""Files and folders that are whole or not there, and folders that one process at a time writes to.

What is being written has a name that starts with ``.partial-`` until it is complete and on disk; what is being deleted
one that starts with ``.old-``. Both are never read.
"""

from __future__ import annotations

import datetime
import errno
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

__all__ = [
    "LOCK_FILES", "STDOUT", "HeldError", "check_writable", "held", "is_leftover", "named_errors", "partial_name",
    "remove_leftovers", "remove_tree", "replace_file", "write_folder", "write_text", "write_yaml",
]  # fmt: skip

STDOUT = "/dev/stdout"
LOCK_FILES = LOCK, HOLDER = ".lock", ".holder"
_LEFTOVER = re.compile(r"\.(partial|old)-[0-9a-f]{12}-(.+)", re.DOTALL)


def partial_name(target: Path, kind: str = "partial") -> Path:
    """A new name beside `target` for what is half written ("partial") or half deleted ("old").

    It is drawn at random: process numbers repeat between containers that share a folder.
    """
    return target.with_name(f".{kind}-{secrets.token_hex(6)}-{target.name}")


def is_leftover(name: str, of: str | None = None) -> bool:
    """Whether a name is one of `partial_name`, of any file or folder or of the one called `of`."""
    found = _LEFTOVER.fullmatch(name)
    return found is not None and of in (None, found[2])


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write(path to write to)` write a file and put it at `path` at once, in place of the file that is there.

    Folders that are not there are made; a file that is there keeps its permissions, and links are followed. What cannot
    be replaced (`STDOUT`, a pipe, a device) is written into once all of it is there.

    Raises:
        OSError: the disk is full, or the place cannot be written to; the message names the file, and what was there
            is still there.
    """
    target = Path(os.path.realpath(path))
    if _is_stream(path):
        _write_into(path, write)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(target)
    try:
        with named_errors(path, partial):
            partial.touch()
            mode = (target if target.exists() else partial).stat().st_mode
            write(partial)
            partial.chmod(mode)  # some writers make a file of their own, for its owner's eyes only
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by a UTF-8 text; see `replace_file`. Line endings are written as they are."""
    replace_file(path, lambda partial: partial.write_bytes(text.encode()))


def write_yaml(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write names and values, in their order, as `read_yaml` reads them; see `replace_file`."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # PyYAML writes these as they are, and reads them as spaces
        text = yaml.safe_dump(dict(content), sort_keys=False)
    write_text(path, text)


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before any work is done, that `replace_file` will be able to put a file at `path`; nothing is left there.

    Raises:
        OSError: a folder is there, or no file can be made there; the message names the path.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder (expected a file, or a new name)", os.fspath(path))
    if not _is_stream(path):
        with named_errors(path, folder := next(parent for parent in target.parents if parent.exists())):
            # Tried out: permissions do not tell of a file system that is read-only or makes no files, such as /proc.
            tempfile.TemporaryFile(dir=folder).close()


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
        partial.mkdir(parents=True)
        for name, write in writers.items():
            with named_errors(target / name, partial):
                write(partial / name)
        with named_errors(target, partial):
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            if make_room is not None:
                make_room()
            os.replace(partial, target)
            _sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def remove_tree(folder: Path) -> None:
    """Delete a folder, if it is there; one that is half deleted never stands under its own name."""
    if folder.exists():
        doomed = partial_name(folder, "old")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Delete what killed processes left half written or half deleted in a folder that this process holds; see `held`.

    Only names that `partial_name` makes, directly in the folder: of any file or folder, or of the one called `of`.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path.name, of) and path.is_dir():
            shutil.rmtree(path)
        elif is_leftover(path.name, of):
            path.unlink(missing_ok=True)


class HeldError(RuntimeError):
    """Another process is writing to the folder; the message names it."""


@contextmanager
def held(folder: str | os.PathLike[str], wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made if need be; the operating system lets go of it however the process ends.

    Args:
        folder: to hold.
        wait: seconds to wait for a process that holds it and may be ending.

    Raises:
        HeldError: another process holds it.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        who = holder.read_text() if holder.is_file() else "another process"
        raise HeldError(f"{folder} is in use by {who} (expected one process at a time)") from None
    try:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        yield
    finally:
        # Removed while the lock is still held: a name that is there is that of the process that holds it.
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def named_errors(path: str | os.PathLike[str], partial: Path) -> Iterator[None]:
    """Say which file could not be written: the system names `partial`, what is written first, or none at all.

    An error that names another file is left alone: it is about what is read meanwhile.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(partial)):
            raise
        what = (error.strerror or str(error)).removeprefix("cannot write: ")  # it may have been named by the writer
        raise OSError(error.errno or errno.EIO, f"cannot write: {what}", os.fspath(path)) from error
    except Exception as error:
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))  # safetensors wraps the system's error in its own
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, f"cannot write: {os.strerror(number)}", os.fspath(path)) from error


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether there is something that is no regular file, or a standard output that a shell may have redirected."""
    return os.fspath(path) == STDOUT or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


def _write_into(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write into what cannot be replaced: all of it or, if `write` fails, nothing."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        write(whole)
        sys.stdout.flush()
        # Opened anew, a file that standard output goes to would be written from its beginning.
        stdout = os.fspath(path) == STDOUT
        with open(1 if stdout else path, "wb", closefd=not stdout) as target, open(whole, "rb") as source:
            shutil.copyfileobj(source, target)


def _sync(path: Path) -> None:
    """Have a file or a folder on disk before its new name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(handle)
