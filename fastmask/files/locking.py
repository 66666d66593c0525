"""A folder that one process at a time may write to; who holds it is named to the others."""

from __future__ import annotations

import datetime
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fastmask.files.reading import FileError, Record, read_json
from fastmask.files.writing import remove_leftovers, write_text

__all__ = ["LOCK_FILES", "HeldError", "held"]

LOCK_FILES = LOCK, HOLDER = ".lock", ".holder.json"


class HeldError(RuntimeError):
    """Another process is writing to the folder; the message names it."""


class Holder(Record):
    """Who holds a folder: a process on a machine, and since when."""

    host: str
    process: int
    since: str


@contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, which is made if need be; the operating system lets go of it however the process ends.

    Raises:
        HeldError: another process holds it.
        OSError: the folder cannot be written to, or one of `LOCK_FILES` is a link.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOCK_FILES:
        if (folder / name).is_symlink():
            raise OSError(errno.ELOOP, "is a link (expected the lock of this folder)", os.fspath(folder / name))
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise HeldError(f"{folder} is in use{_holder(folder)} (expected one process at a time)") from None
    try:
        remove_leftovers(folder, of=HOLDER)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        me = Holder(host=socket.gethostname(), process=os.getpid(), since=since)
        write_text(folder / HOLDER, me.model_dump_json())
        yield
    finally:
        # Removed while the lock is still held: a name that is there is that of the process that holds it.
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who holds the folder, as far as it can be told."""
    try:
        holder: Holder = read_json(folder / HOLDER, Holder)
        return f" by process {holder.process} on {holder.host}, since {holder.since}"
    except (OSError, FileError):
        return " by another process"
