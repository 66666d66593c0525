"""Processes of this machine that do the work of a comparison or a benchmark."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def processes(number: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `number` processes of `threads` CPU threads each, which end with this one, and where the block raises.

    They are spawned: a forked one inherits threads in an unknown state.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin, (threads,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()
        raise


def _begin(threads: int) -> None:
    """Be a worker: of few threads, deaf to Ctrl-C, which is the parent's to act on, and gone when the parent is."""
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
