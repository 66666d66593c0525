"""Fast weights that take steps of AdamW instead of SGD: the same backups, and moments as small as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.live import WHOLE
from fastmask.meta.fast_weights import FastWeights

__all__ = ["AdamWeights"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass
class _Moments:
    """Exponential averages of a gradient and of its square, of the compact live part; `rows` where it was sparse."""

    first: Tensor
    second: Tensor
    rows: Tensor | None
    steps: int = 0


class AdamWeights(FastWeights):
    """As `FastWeights`, with steps of `torch.optim.AdamW(weight_decay=0)` (Loshchilov and Hutter 2019).

    Moments start at zero and cover only what may change: live parts of masked weights, looked-up rows of embeddings.
    An embedding must look up the same rows in each step, as it does when each takes the same batch.
    """

    _moments: dict[Tensor, _Moments]

    def __enter__(self) -> AdamWeights:
        """As in `FastWeights`; moments are new."""
        self._moments = {}
        super().__enter__()
        return self

    def _hook(self, parameter: Tensor, rate: float) -> Callable[[Tensor], Tensor | None]:
        @torch.no_grad()
        def take_step(gradient: Tensor) -> Tensor | None:
            self._take_step(parameter, gradient, rate)
            return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

        return take_step

    def _take_step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        backup = self._backup(parameter)
        if gradient.is_sparse and backup.part is WHOLE:
            gradient = gradient.coalesce()
            rows = gradient.indices()[0]
            if backup.live is None:
                backup._save_rows(parameter, rows)
            parameter.index_add_(0, rows, self._change(parameter, gradient.values(), rate, rows).to(parameter.dtype))
        else:
            backup.save_all(parameter)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            change = self._change(parameter, backup.part.read(dense), rate, None)
            backup.part.write(parameter, backup.part.read(parameter).add_(change))

    def _change(self, parameter: Tensor, gradient: Tensor, rate: float, rows: Tensor | None) -> Tensor:
        """What a step adds to the compact live part."""
        moments = self._moments.get(parameter)
        if moments is None:
            moments = _Moments(torch.zeros_like(gradient), torch.zeros_like(gradient), rows)
            self._moments[parameter] = moments
        elif rows is not None and (moments.rows is None or not torch.equal(rows, moments.rows)):
            raise ValueError("AdamW steps on an embedding need the same rows in every step: give one support batch")
        moments.steps += 1
        moments.first.lerp_(gradient, 1 - BETAS[0])
        moments.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrections = [1 - beta**moments.steps for beta in BETAS]
        scale = (moments.second / corrections[1]).sqrt_().add_(EPSILON)
        return moments.first.div(scale).mul_(-rate / corrections[0])
