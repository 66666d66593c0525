"""Which path computes a layer, decided in this one place: Triton kernels on a GPU, plain PyTorch everywhere else.

`FASTMASK_BACKEND` (torch or triton) overrides it in tests; `triton` without a GPU needs Triton's interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from fastmask.torch_path import layers as torch_layers

__all__ = ["as_examples", "path_for", "traced"]

FORCED = os.environ.get("FASTMASK_BACKEND", "")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (8, 0)  # compute capability of the oldest NVIDIA chip the kernels are compiled for


def path_for(x: Tensor, weights: Sequence[Tensor]) -> ModuleType:
    """`torch_path.layers` or `triton_path.layers`, for activations x and weights that are on one device.

    What the kernels cannot run goes to PyTorch, with one warning that says why.
    """
    if FORCED not in ("", "torch", "triton"):
        raise ValueError(f"FASTMASK_BACKEND must be 'torch' or 'triton', given {FORCED!r}")
    if FORCED == "torch" or (not FORCED and not _has_kernels(x.device)):
        return torch_layers
    reason = _why_not(x, weights)
    if reason is None:
        return _triton_layers()
    if FORCED == "triton":
        raise RuntimeError(f"FASTMASK_BACKEND=triton, but {reason}")
    _warn(reason)
    return torch_layers


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda"  # NVIDIA, and AMD under ROCm


def _why_not(x: Tensor, weights: Sequence[Tensor]) -> str | None:
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


@cache
def _triton_layers() -> ModuleType:
    return importlib.import_module("fastmask.triton_path.layers")


@cache
def _warn(reason: str) -> None:
    """Warn once for each reason."""
    warnings.warn(f"fastmask runs masked layers in plain PyTorch: {reason}", stacklevel=2)


def traced(*tensors: Tensor) -> bool:
    """Whether a tracer is looking, which must be shown a custom operator."""
    return torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors)


_PLAIN = (Tensor, nn.Parameter)  # not the stand-ins that a tracer passes


def as_examples(x: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]; T is spelled out because -1 is ambiguous in an empty batch."""
    if x.ndim == 3:
        return x
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    return x.reshape(x.shape[0], tokens, x.shape[-1])
