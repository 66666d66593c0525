"""Whether Triton's interpreter is on, and what it must not be asked.

`TRITON_INTERPRET=1`, set before the kernels are imported, runs them on the CPU, program after program. Its `tl.dot` is
right for float32 and float16, and silently wrong for bfloat16 (errors of 1e10), so launchers refuse that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

__all__ = ["interpreting", "refuse_bf16"]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def refuse_bf16(*tensors: Tensor | None) -> None:
    """RuntimeError if a tensor is bfloat16 and the interpreter is on; None stands for an absent tensor."""
    if interpreting() and any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise RuntimeError(
            "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly; use float16 or float32 with it"
        )
