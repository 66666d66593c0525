"""The masked layer inside a Hugging Face model: it reads its languages from the model's router."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmask.functional import compute
from fastmask.linear import MaskedLinear
from fastmask.masks import Mask
from fastmask.models.routing import Router
from fastmask.operators import UNPACKED
from fastmask.torch_path.activations import NONE

__all__ = ["AttachedLinear"]


class AttachedLinear(MaskedLinear):
    """A `MaskedLinear` that looks like the `nn.Linear` it replaces.

    With `packed_unit` it works packed: a row mask puts each example's live heads (or neurons) at the front of an output
    as wide as the widest language of the batch, and a column mask reads such an input. The attention code in between
    reshapes with -1 heads and so needs no change; a slot that is left over is a head of zeros, which adds nothing.

    Args:
        packed_unit: rows or columns of one head (or neuron); the packed width is a multiple of it and holds at least
            one unit, because attention code cannot reshape zero heads. None for a layer that is not packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        *,
        router: Router,
        packed_unit: int | None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, mask, **options)
        self.router = router
        self.packed_unit = packed_unit
        self.activation = NONE  # applied to the input; set by `attach` where the model's own was taken out
        self._live_counts = mask.live_counts() if packed_unit is not None else []

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in or packed in] -> [B, ..., out or packed out]."""
        route = self.router.current()
        language_ids = route.language_ids
        if language_ids.shape[0] != x.shape[0]:
            if language_ids.shape[0] != 1:
                raise ValueError(
                    f"expected one language id for each of the {x.shape[0]} examples, "
                    f"given language_ids of shape {tuple(language_ids.shape)}"
                )
            language_ids = language_ids.expand(x.shape[0])
        if self.packed_unit is None:
            width = UNPACKED
        elif self.mask.kind == "columns":
            width = x.shape[-1]
        else:
            width = self._packed_width(route.present)
        return compute(x, self.weight, self.mask, language_ids, self.bias, width, self.activation)

    def _packed_width(self, present: tuple[int, ...] | None) -> int:
        assert self.packed_unit is not None
        if present is None:
            widest = max(self._live_counts)
        elif -1 in present:
            return self.out_features
        else:
            widest = max([0, *[self._live_counts[language] for language in present]])
        return max(widest, self.packed_unit)
