"""The operator under the masked layers: what autograd and `torch.compile` see, and the choice of what computes it."""

from fastmask.operators.linear import Settings, run

__all__ = ["Settings", "run"]
