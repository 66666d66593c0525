"""Where to compute, and in which precision."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DEVICES", "accelerator_for", "device_of"]

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


def accelerator_for(device: str, precision: str) -> Any:
    """An `accelerate.Accelerator`; a second one in the same process may have another precision than the first."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=device_of(device).type == "cpu")
