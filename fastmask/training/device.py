"""Where to compute."""

from __future__ import annotations

import torch

__all__ = ["DEVICES", "device_of"]

DEVICES = ("auto", "cpu", "cuda")


def device_of(name: str) -> torch.device:
    """The device for one of `DEVICES`; "auto" is a GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name not in DEVICES:
        raise ValueError(f"device is {name!r} (expected one of {', '.join(DEVICES)})")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU here (expected cpu, or auto)")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
