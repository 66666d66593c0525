"""The random state of a process, of python, numpy and torch: taking it, setting it, and putting it back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomState", "preserved_random_state", "random_state", "set_random_state"]

RandomState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and what JSON can hold."""


def random_state(device: torch.device) -> RandomState:
    """The random state of this process, which computes on `device`."""
    version, python, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state, which libraries draw from
    tensors = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    rest = {"position": int(numpy["state"]["pos"]), "has_gauss": int(numpy["has_gauss"]), "gauss": numpy["gauss"]}
    return tensors, {"python": [version, gauss], "numpy": rest}


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Go on as the process did whose state it is; that of a GPU is left alone where it computed on none."""
    tensors, content = state
    version, gauss = content["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    rest = content["numpy"]
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, rest["position"], rest["has_gauss"], rest["gauss"]))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


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
