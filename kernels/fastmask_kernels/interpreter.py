"""Whether Triton's interpreter is on, and what kernels can run on.

`TRITON_INTERPRET=1`, set before the kernels are imported, runs them on the CPU, program after program. Its `tl.dot` is
right for float32 and float16, and silently wrong for bfloat16 (errors of 1e10), so launchers refuse that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

__all__ = ["check_runnable", "interpreting", "runs_on"]

recorded_device: str | None = None  # the type of device whose launches `recorder` records


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`."""
    return device.type in ("cuda", recorded_device) or interpreting()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def check_runnable(*tensors: Tensor | None) -> None:
    """See that kernels can run on these tensors here; None stands for an absent one.

    Raises:
        ValueError: a tensor that is not on a GPU, without the interpreter.
        RuntimeError: a bfloat16 tensor with it.
    """
    if not interpreting():
        for tensor in tensors:
            if tensor is not None and not runs_on(tensor.device):
                raise ValueError(f"Triton kernels run on a GPU, given a tensor on {tensor.device}")
    elif any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise RuntimeError(
            "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly; use float16 or float32 with it"
        )
