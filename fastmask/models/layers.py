"""The masked layer inside a Hugging Face model: it reads its languages from the model's router.

Layers that share their input (Q, K and V; gate and up) are `Siblings`: whichever the model calls first computes all.
One layer that holds several projections (fused QKV, gate-up) computes them side by side: its `parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.linear import MaskedLinear
from fastmask.masks import UNPACKED, Mask
from fastmask.models.routing import Route, Router
from fastmask.operators import compute, compute_projections
from fastmask.torch_path.layers import NONE

__all__ = ["AttachedConv1D", "AttachedLinear", "Siblings"]


class AttachedLinear(MaskedLinear):
    """A `MaskedLinear` that looks like the `nn.Linear` it replaces.

    With `packs` it works packed: a row mask puts each example's live heads (or neurons) at the front of an output
    as wide as the widest language of the batch, and a column mask reads such an input. The attention code in between
    reshapes with -1 heads and so needs no change; a slot that is left over is a head of zeros, which adds nothing.

    Args:
        unit: rows or columns of one head (or neuron); the packed width is a multiple of it and holds at least one unit,
            because attention code cannot reshape zero heads. None for a mask that is not over units.
        packs: whether live units are packed; otherwise each stays in its slot, and dead ones are zeros.
        of_heads: whether the units are heads, which a route may want unpacked.
        parts: output rows of each of several projections that the weight holds, and of a unit in each; () for one.
        activation: a name of `torch_path.layers`, applied to the input in place of the model's own.
        siblings: the layers that read the same input, to which this one is added.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        *,
        router: Router,
        unit: int | None,
        packs: bool = True,
        of_heads: bool = False,
        parts: Sequence[tuple[int, int]] = (),
        activation: str = NONE,
        siblings: Siblings | None = None,
        **options: Any,
    ) -> None:
        self.parts = tuple(parts)
        super().__init__(
            in_features, out_features, mask, forward="full" if router.full_forward else "masked", **options
        )
        self.router = router
        self.unit = unit
        self.packs = packs and unit is not None
        self.of_heads = of_heads
        self.activation = activation
        self.siblings = siblings
        if siblings is not None:
            siblings.layers.append(self)

    def _follow_mask(self) -> None:
        # What lives is counted here, and not in a pass: a tracer cannot, and on a GPU it would wait.
        if self._mask.live.is_meta:  # moved to where nothing has values: what was counted before holds
            return
        self._counts = self._mask.live_counts() if self._mask.kind in ("rows", "columns") else []
        self._of_parts: list[tuple[Mask, list[int]]] = []
        if self.parts:
            keep = self._mask.to_dense()[:, :, 0].split([size for size, _ in self.parts], 1)
            masks = [Mask.rows(of_part, self.in_features) for of_part in keep]
            self._of_parts = [(of_part, of_part.live_counts()) for of_part in masks]

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in or packed in] -> [B, ..., out or packed out]."""
        route = self.router.current()
        if self.siblings is not None and route.shared and not self.siblings.come_one_by_one(x):
            return self.siblings.output_of(self, x, route)
        if self.parts and self.packs_in(route):
            return self._parts_side_by_side(x, route)
        mask, width = self.mask, self.packed_width(route, x)
        examples, ids = route.examples(x)
        y = compute(examples, self.matrix, mask, ids, self.bias, width, self.activation, self.full_forward)
        return route.joined(y)

    def packs_in(self, route: Route) -> bool:
        """Whether live units travel packed in a pass."""
        return self.packs and (route.packs_heads or not self.of_heads)

    def packed_width(self, route: Route, x: Tensor) -> int:
        """Width of the packed side: that of the input, or of the widest language present, or of all if not known."""
        if not self.packs_in(route):
            return UNPACKED
        if self._mask.kind == "columns":
            return x.shape[-1]
        assert self.unit is not None
        return self._widest(self._counts, route, x, self.out_features, self.unit)

    @staticmethod
    def _widest(counts: list[int], route: Route, x: Tensor, full: int, unit: int) -> int:
        if route.present is None:
            widest = max(counts)
        elif -1 in route.present:
            return full
        else:
            widest = max([0, *[counts[language] for language in route.present]])
        if unit == 1 and x.is_cuda:
            # Rows that begin at a multiple of 16 bytes are copied 16 bytes at a time.
            widest = min(-(-widest // 64) * 64, full)
        return max(widest, unit)

    def _parts_side_by_side(self, x: Tensor, route: Route) -> Tensor:
        """Each part packed by itself: [queries | keys | values] with as many units of each."""
        sizes = [size for size, _ in self.parts]
        masks = [self._beside_weight(mask) for mask, _ in self._of_parts]
        widths = [
            self._widest(counts, route, x, size, unit)
            for (_, counts), (size, unit) in zip(self._of_parts, self.parts, strict=True)
        ]
        biases = [] if self.bias is None else list(self.bias.split(sizes))
        weights = list(self.matrix.split(sizes))
        examples, ids = route.examples(x)
        return route.joined(torch.cat(list(compute_projections(examples, weights, masks, ids, biases, widths)), -1))


class AttachedConv1D(AttachedLinear):
    """An `AttachedLinear` in the place of GPT-2's `Conv1D`, whose weight is stored transposed, [in, out]."""

    transposed = True
    _stored: tuple[Mask, Mask] | None = None  # a mask, and the same over [in, out]

    @classmethod
    def from_linear(cls, linear: nn.Module, mask: Mask, **options: Any) -> AttachedConv1D:
        """A masked layer that shares the Parameters of a `Conv1D`."""
        layer = cls(mask.in_features, mask.out_features, mask=mask, device="meta", **options)
        layer._parameters.update(linear._parameters)
        layer.mask = mask
        return layer.train(linear.training)

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        # The kernels read rows that lie together.
        return self.weight.t().contiguous() if self.weight.is_cuda else self.weight.t()

    @property
    def stored_mask(self) -> Mask:
        """The mask over [in, out]: of rows one over columns, and the other way round."""
        mask = self.mask
        if self._stored is None or self._stored[0] is not mask:
            self._stored = mask, mask.transposed()
        return self._stored[1]


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
                [sibling.matrix for sibling in layers],
                [sibling.mask for sibling in layers],
                ids,
                [sibling.bias for sibling in layers if sibling.bias is not None],
                [sibling.packed_width(route, x) for sibling in layers],
                NONE,
                layer.full_forward,
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
