"""What one process does for all of them: several that write to one folder would destroy each other's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from fastmask.files import held

__all__ = ["held_by_first", "on_first"]

T = TypeVar("T")


def on_first(accelerator: Any, work: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; all get what it returns, and all fail if it does.

    Raises:
        RuntimeError: on the other processes, if `work` raised on the first.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"the first process failed: {outcome[1]}")
    result: T = outcome[0]
    return result


@contextmanager
def held_by_first(accelerator: Any, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for all processes of a run; see `fastmask.files.held`."""
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(held(folder))

        on_first(accelerator, hold)
        yield
