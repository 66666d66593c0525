"""The operators under the masked layers: what autograd and `torch.compile` see.

`linear` is one masked layer of any kind, `projections` several packed ones that share their input. Each exists twice:
as a custom operator for tracers, and as a plain `autograd.Function` for eager calls, which spares them the operator's
Python wrapping: in a small layer that costs more than the layer.
"""

from fastmask.operators.linear import run
from fastmask.operators.projections import run_projections

__all__ = ["run", "run_projections"]
