"""`datasets` while it reads or writes its cache: quiet, and for one thread at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub

__all__ = ["preparing"]

# Progress bars and log levels of `datasets` belong to the whole process, and a second thread must not find a data set
# half prepared; so one thread at a time. Between processes `datasets` itself holds a file lock.
_one_at_a_time = threading.RLock()


@contextmanager
def preparing() -> Iterator[None]:
    """Silence the progress bars and messages of `datasets` inside, and put both back as they were."""
    with _one_at_a_time:
        levels = datasets.logging.get_verbosity(), huggingface_hub.logging.get_verbosity()
        bars_were_on = datasets.are_progress_bars_disabled() is False
        datasets.logging.set_verbosity(logging.CRITICAL)  # errors are raised, too
        huggingface_hub.logging.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.logging.set_verbosity(levels[0])
            huggingface_hub.logging.set_verbosity(levels[1])
            if bars_were_on:
                datasets.enable_progress_bars()
