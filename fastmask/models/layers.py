"""The masked layer inside a Hugging Face model: it reads its languages from the model's router.

Layers that share their input (Q, K and V; gate and up) are `Siblings`: whichever the model calls first computes all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask.linear import MaskedLinear
from fastmask.masks import UNPACKED, Mask
from fastmask.models.routing import Route, Router
from fastmask.operators import compute, compute_projections
from fastmask.torch_path.activations import NONE

__all__ = ["AttachedLinear", "Siblings"]


class AttachedLinear(MaskedLinear):
    """A `MaskedLinear` that looks like the `nn.Linear` it replaces.

    With `packed_unit` it works packed: a row mask puts each example's live heads (or neurons) at the front of an output
    as wide as the widest language of the batch, and a column mask reads such an input. The attention code in between
    reshapes with -1 heads and so needs no change; a slot that is left over is a head of zeros, which adds nothing.

    Args:
        packed_unit: rows or columns of one head (or neuron); the packed width is a multiple of it and holds at least
            one unit, because attention code cannot reshape zero heads. None for a layer that is not packed.
        of_heads: whether the units are heads, which a route may want unpacked.
        activation: a name of `torch_path.activations`, applied to the input in place of the model's own.
        siblings: the layers that read the same input, to which this one is added.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        *,
        router: Router,
        packed_unit: int | None,
        of_heads: bool = False,
        activation: str = NONE,
        siblings: Siblings | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, mask, **options)
        self.router = router
        self.packed_unit = packed_unit
        self.of_heads = of_heads
        self.activation = activation
        self.siblings = siblings
        if siblings is not None:
            siblings.layers.append(self)
        self._live_counts = mask.live_counts() if packed_unit is not None else []

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in or packed in] -> [B, ..., out or packed out]."""
        route = self.router.current()
        if self.siblings is not None and route.shared and not self.siblings.come_one_by_one(x):
            return self.siblings.output_of(self, x, route)
        mask, width = self.mask, self.packed_width(route, x)
        examples, ids = route.examples(x)
        return route.joined(compute(examples, self.weight, mask, ids, self.bias, width, self.activation))

    def packed_width(self, route: Route, x: Tensor) -> int:
        """Width of the packed side: that of the input, or of the widest language present, or of all if not known."""
        if self.packed_unit is None or (self.of_heads and not route.packs_heads):
            return UNPACKED
        if self._mask.kind == "columns":
            return x.shape[-1]
        if route.present is None:
            widest = max(self._live_counts)
        elif -1 in route.present:
            return self.out_features
        else:
            widest = max([0, *[self._live_counts[language] for language in route.present]])
        if self.packed_unit == 1 and x.is_cuda:
            # Rows that begin at a multiple of 16 bytes are copied 16 bytes at a time.
            widest = min(-(-widest // 64) * 64, self.out_features)
        return max(widest, self.packed_unit)


@dataclass
class _Outputs:
    """The outputs of all siblings for one input, by their number; each is handed out once."""

    x: Tensor
    version: int
    with_grad: bool
    left: dict[int, Tensor]

    def fit(self, me: int, x: Tensor) -> bool:
        """Whether the output of number `me` is there, and for this very input in this gradient mode."""
        same = self.x is x and self.version == _version(x) and self.with_grad == torch.is_grad_enabled()
        return same and me in self.left


class Siblings:
    """Row-masked layers that a model calls with one input, one after the other.

    The first that is called computes the outputs of all, and the others hand theirs out. An output is only handed out
    for the very tensor, the route and the gradient mode it was computed for; anything else is computed afresh.
    """

    def __init__(self) -> None:
        self.layers: list[AttachedLinear] = []

    def come_one_by_one(self, x: Tensor) -> bool:
        """Whether accelerate offloads their weights, and brings back only that of the layer that is called."""
        if x.is_meta:
            return False
        weights = [layer._parameters.get("weight") for layer in self.layers]
        return any(weight is not None and weight.is_meta for weight in weights)

    def output_of(self, layer: AttachedLinear, x: Tensor, route: Route) -> Tensor:
        """The output of one of the layers for x [B, ..., in]."""
        me, layers = self.layers.index(layer), self.layers
        outputs: _Outputs | None = route.waiting.get(self)
        if outputs is None or not outputs.fit(me, x):
            examples, ids = route.examples(x)
            ys = compute_projections(
                examples,
                [sibling.weight for sibling in layers],
                [sibling.mask for sibling in layers],
                ids,
                [sibling.bias for sibling in layers if sibling.bias is not None],
                [sibling.packed_width(route, x) for sibling in layers],
            )
            outputs = _Outputs(x, _version(x), torch.is_grad_enabled(), dict(enumerate(map(route.joined, ys))))
            route.waiting[self] = outputs
        y = outputs.left.pop(me)
        if not outputs.left:
            del route.waiting[self]
        return y


def _version(x: Tensor) -> int:
    """Counts what was written to x in place.

    A tracer knows of no versions and shows writes as new tensors. Tensors of inference mode keep none either: a model
    that wrote to the input between its projections would go unnoticed there.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
