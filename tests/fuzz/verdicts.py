"""What a reader may do with a damaged file: read it as it is, or say in one line which file is wrong, and how."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from hang import HungError, no_hang

__all__ = ["Verdicts"]

EXPECTED = (ValueError, KeyError, OSError, RuntimeError)  # what the commands print without "this is a bug"


class Verdicts:
    """Collects what went wrong over many mutants, so that one failure does not hide the others."""

    def __init__(self) -> None:
        self.read = self.refused = 0
        self.wrong: list[str] = []

    def reading(self, what: str, read: Callable[[], Any], expected: Callable[[], Any], *names: object) -> None:
        """See that `read()` returns what `expected()` does, or raises an error whose message has all of `names`."""
        try:
            with no_hang(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read()
        except HungError:
            self.wrong.append(f"{what}: more than five seconds")
        except Exception as error:  # every kind: which ones are right is what is tested
            self.error(what, error, *names)
        else:
            self.read += 1
            if found != expected():
                self.wrong.append(f"{what}: read as other content")

    def error(self, what: str, error: BaseException, *names: object) -> None:
        """See that an error is one that a user can make something of."""
        self.refused += 1
        if not isinstance(error, EXPECTED) or isinstance(error, (NotImplementedError, RecursionError)):
            self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        else:
            self.message(what, str(error), *names)

    def message(self, what: str, message: str, *names: object) -> None:
        """See that a message is one line of readable length that names the file."""
        missing = [str(name) for name in names if str(name) not in message]
        if missing or "\n" in message or not message.isprintable() or len(message) > 1000:
            self.wrong.append(f"{what}: says {message[:300]!r} (expected one line with {', '.join(map(str, names))})")

    def check(self, least: int = 1) -> None:
        """Fail with the first of what went wrong; also if mutants did not reach both ends."""
        print(f"{self.read} read, {self.refused} refused")
        shown = "\n".join(self.wrong[:25])
        assert not self.wrong, f"{len(self.wrong)} of {self.read + self.refused}:\n{shown}"
        assert self.refused >= least
