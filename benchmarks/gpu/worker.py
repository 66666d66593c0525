"""The process that measures: a kernel that crashes, hangs or breaks the GPU's state costs its own rows alone."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")


class Worker(Generic[T]):
    """A fresh process that answers one call after the other; after one that failed a new process takes over.

    Args:
        run: what is called there.
    """

    def __init__(self, run: Callable[..., T]) -> None:
        self.run = run
        self._process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, *arguments: object, limit: float) -> T:
        """What `run(*arguments)` returns.

        Raises:
            RuntimeError: it failed, crashed, or had not ended after `limit` seconds.
        """
        end = time.monotonic() + limit
        if self._process is None:
            self._start()
        try:
            self._pipe.send(arguments)
            in_time = self._pipe.poll(max(0.0, end - time.monotonic()))
            found, problem = self._pipe.recv() if in_time else (None, f"took over {limit:.0f} s")
        except (EOFError, OSError):
            found, problem = None, "crashed"
        if problem:  # a GPU in an error state stays so for its process
            self.end()
            raise RuntimeError(problem)
        return found  # type: ignore[no-any-return]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.run), daemon=True)
        self._process.start()
        theirs.close()

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def __enter__(self) -> Worker[T]:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()


def _serve(pipe: Connection[Any, Any], run: Callable[..., object]) -> None:
    """Answer each call with what it returns, or with a line on what went wrong."""
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((run(*arguments), ""))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}".partition("\n")[0][:300]))
