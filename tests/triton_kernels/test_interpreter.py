"""What kernels refuse before a launch."""

from __future__ import annotations

import fastmask_kernels
import pytest
import torch
from fastmask_kernels import interpreter
from fastmask_kernels.row_matmul import row_matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_cpu_tensor_without_the_interpreter(monkeypatch):
    """A CPU tensor is refused where kernels run on a GPU."""
    plan = fastmask_kernels.Plan(torch.tensor([0]), 4, 1)
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="run on a GPU, given a tensor on cpu"):
        fastmask_kernels.Plan(torch.tensor([0]), 4, 1)
    index, counts = torch.arange(8)[None], torch.tensor([8])
    with pytest.raises(ValueError, match="run on a GPU, given a tensor on cpu"):
        row_matmul(torch.randn(4, 8), [torch.randn(8, 8)], [index], [counts], plan, [8])
    layout = fastmask_kernels.TileLayout.from_blocks(torch.ones(1, 1, 1, dtype=torch.bool), (64, 64))
    with pytest.raises(ValueError, match="run on a GPU, given a tensor on cpu"):
        fastmask_kernels.masked_matmul(torch.randn(4, 64), torch.randn(64, 64), layout, plan)
    with pytest.raises(ValueError, match="run on a GPU, given a tensor on cpu"):
        fastmask_kernels.masked_weight_grad(
            torch.randn(4, 64), torch.randn(4, 64), layout, plan, weight_dtype=torch.float32
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is off on a GPU")
def test_an_interpreter_that_cannot_loop_says_what_it_needs(monkeypatch):
    """An interpreter that cannot loop with this numpy is refused, and the error says what is needed."""

    class Broken:
        def __getitem__(self, grid):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(interpreter, "_loop_kernel", Broken())
    interpreter.interpreter_problem.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"interpreter of Triton .* numpy .*: it needs a numpy before 2\.4"):
            interpreter.check_runnable(torch.ones(1))
    finally:
        interpreter.interpreter_problem.cache_clear()


@pytest.mark.skipif(interpreter.interpreter_problem() is not None, reason="it says so")
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is off on a GPU")
def test_bfloat16_in_the_interpreter():
    """bfloat16 products, which the interpreter gets wrong, are refused there."""
    plan = fastmask_kernels.Plan(torch.tensor([0]), 4, 1)
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    with pytest.raises(RuntimeError, match="multiplies bfloat16 wrongly"):
        row_matmul(x, [weight], [torch.arange(8)[None]], [torch.tensor([8])], plan, [8])
