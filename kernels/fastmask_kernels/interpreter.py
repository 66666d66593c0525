"""Whether Triton's interpreter is on, and what kernels can run on.

`TRITON_INTERPRET=1`, set before the kernels are imported, runs them on the CPU, program after program. Its `tl.dot` is
right for float32 and float16, and silently wrong for bfloat16 (errors of 1e10), so launchers refuse that.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["check_runnable", "interpreter_problem", "interpreting", "runs_on"]

recorded_device: str | None = None  # the type of device whose launches `recorder` records


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`."""
    return device.type in ("cuda", recorded_device) or interpreting()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _loop_kernel(out, n):
    """As the kernels loop: up to a number that is computed. Grid: one program."""
    for i in range(0, tl.cdiv(n, 2)):
        tl.store(out + i, i)


@cache
def interpreter_problem() -> str | None:
    """Why the interpreter cannot run the kernels; None if it can, or is off.

    Triton 3.6 takes an array of one element for a number where a loop ends, which numpy 2.4 and later refuse.
    """
    if not interpreting():
        return None
    try:
        _loop_kernel[(1,)](torch.zeros(2, dtype=torch.int32), 3)
    except Exception as error:  # each version of Triton raises another
        import numpy

        return (
            f"the interpreter of Triton {triton.__version__} cannot run loops with numpy {numpy.__version__}: "
            f"it needs a numpy before 2.4, or a newer Triton ({error})"
        )
    return None


def check_runnable(tensor: Tensor) -> None:
    """See that kernels can run on a tensor here.

    Raises:
        ValueError: it is not on a GPU, without the interpreter.
        RuntimeError: it is bfloat16 with it, or an interpreter that does not work with this numpy.
    """
    if not runs_on(tensor.device):
        raise ValueError(f"Triton kernels run on a GPU, given a tensor on {tensor.device}")
    if problem := interpreter_problem():
        raise RuntimeError(problem)
    if interpreting() and tensor.dtype == torch.bfloat16:
        raise RuntimeError(
            "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly; use float16 or float32 with it"
        )
