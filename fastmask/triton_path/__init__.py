"""The Triton path of the masked layers: what `torch_path` computes, by the kernels of `fastmask_kernels`.

`layers` says what each mask kind launches, `tables` keeps what the kernels read of a mask and a batch. Importing them
imports Triton, so only `operators` does, and only when a GPU is there; here is what speaks against it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["why_not"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (8, 0)  # compute capability of the oldest NVIDIA chip the kernels are compiled for


def why_not(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """What keeps the Triton kernels from running these, if anything does."""
    missing = _why_not_here(x.device)
    if missing is not None:
        return missing
    if x.dtype not in _DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {x.dtype}"
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        given = ", ".join(sorted({str(weight.dtype) for weight in weights}))
        return f"the kernels take weights of the activations' dtype ({x.dtype}) or float32, not {given}"
    if x.numel() // max(1, x.shape[-1]) >= 2**31:
        return f"the kernels take fewer than 2**31 tokens, not a batch of shape {tuple(x.shape)}"
    return None


@cache
def _why_not_here(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        from fastmask_kernels.interpreter import runs_on

        return None if runs_on(device) else f"there is no GPU behind {device}, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return f"the kernels need compute capability 8.0 or newer, not {torch.cuda.get_device_name(device)}"
    return None
