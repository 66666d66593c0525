"""A limit for what could run for ever: 5 seconds of work, or a minute of waiting on a machine that is busy."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

WORK, WAIT = 5, 60


class HungError(BaseException):
    """Not an `Exception`: code under test that catches those must not catch this one."""


@contextmanager
def no_hang(work: float = WORK, wait: float = WAIT) -> Iterator[None]:
    """Raise `HungError` if the body takes so many seconds of processor time, or of waiting."""

    def stop(*_: object) -> None:
        raise HungError

    timers = ((signal.SIGVTALRM, signal.ITIMER_VIRTUAL, work), (signal.SIGALRM, signal.ITIMER_REAL, wait))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
