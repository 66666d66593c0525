"""Which chip a tensor lies on, as the tables of block sizes name chips."""

from __future__ import annotations

from functools import cache

import torch

from fastmask_kernels.limits import CHIPS

__all__ = ["chip_of", "has_tf32", "multiprocessors"]

stand_in = "sm_90"  # what a device counts as that is no GPU (the interpreter's, the recorder's)


def chip_of(device: torch.device) -> str:
    """One of "sm_80", "sm_90", "sm_100" and "gfx942"; what is no GPU counts as `stand_in`.

    A newer or older chip takes the entry of the nearest one that is not newer, so that its launches fit.
    """
    if device.type != "cuda":
        return stand_in
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _chip(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    # 12.x (consumer Blackwell) has the shared memory and the instructions of 8.x.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def has_tf32(device: torch.device) -> bool:
    """Whether Triton takes TF32 products there: of AMD's chips only for gfx942, for others it is a compile error."""
    if torch.version.hip is None or device.type != "cuda":
        return True
    return _architecture(device.index if device.index is not None else torch.cuda.current_device()) == "gfx942"


@cache
def _architecture(index: int) -> str:
    name: str = torch.cuda.get_device_properties(index).gcnArchName  # such as gfx942:sramecc+:xnack-
    return name.split(":")[0]


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; of what is no GPU those of the product that stands for `chip_of`."""
    if device.type != "cuda":
        return CHIPS[chip_of(device)].multiprocessors
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
