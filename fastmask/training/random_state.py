"""The random states of python, numpy and torch: comparing them, and putting them back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["preserved_random_state", "random_digest"]


def random_digest() -> str:
    """Return a digest of the random states of python, numpy and torch (CPU)."""
    digest = hashlib.sha256()
    digest.update(repr(random.getstate()).encode())
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is being watched
    digest.update(repr((kind, np.asarray(keys).tobytes(), rest)).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put all random states back at the end, so that what runs inside does not show in what follows."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
