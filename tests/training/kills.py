"""A process that kills itself: before its n-th rename, fsync or delete, or after some time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("rename", "replace", "link", "fsync", "unlink", "remove", "rmdir")


def die() -> None:
    """End as a process does that is killed from outside: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(number: int | None, count: Any = None) -> list[str]:
    """Kill this process before its call number `number` (from 1) of those that put files in place or remove them.

    `shutil.rmtree`, `os.replace` and all others end in one of these.

    Args:
        number: None: never.
        count: a `multiprocessing.Value` where calls of several processes are counted as one row; whose call it is dies.

    Returns:
        The names of the calls so far; the list grows.
    """
    seen: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            place = len(seen)
            if count is not None:
                with count.get_lock():
                    count.value += 1
                    place = count.value
            if place == number:
                die()
            return call(*arguments, **options)

        return watching

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    return seen


def die_after(seconds: float) -> None:
    """Kill this process at that moment, wherever it is."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def calls_of(marker: Path) -> list[str]:
    """What a process that was not killed wrote of its calls."""
    return marker.read_text().split()
