"""`MaskedLinear`: `nn.Linear` with one mask for each language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmask.functional import masked_linear
from fastmask.masks import Mask

__all__ = ["MaskedLinear"]

Self = TypeVar("Self", bound="MaskedLinear")


class MaskedLinear(nn.Linear):
    """A linear layer that L languages share, each through its own mask.

    The parameters, their names and the state dict are those of `nn.Linear`; the mask is configuration and is not saved
    with them (`fastmask.Subnetworks.save` saves masks). It follows the weight from device to device, and nothing else
    touches it: `to_empty`, a change of dtype and the meta device leave its values as they are.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        mask: a `Mask` over [out_features, in_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if (mask.out_features, mask.in_features) != (out_features, in_features):
            raise ValueError(
                f"the mask is for {mask.in_features} -> {mask.out_features} features, "
                f"the layer is {in_features} -> {out_features}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._mask: Mask
        self.mask = mask

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, mask: Mask, **options: Any) -> Self:
        """A masked layer that shares the Parameters of `linear`."""
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, mask=mask, bias=has_bias, device="meta", **options)
        # Not by assignment: `accelerate.init_empty_weights` puts what is assigned on the meta device.
        layer._parameters.update(linear._parameters)
        layer.mask = mask
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """As in `nn.Linear`; nothing for parameters without memory, where it would only take time."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor, language_ids: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in], int64 [B] -> [B, ..., out]; see `fastmask.masked_linear`."""
        return masked_linear(x, self.weight, self.mask, language_ids, self.bias)

    @property
    def mask(self) -> Mask:
        """The mask, on the device of the weight (where it was, while the weight is on the meta device)."""
        mask = self._beside_weight(self._mask)
        if mask is not self._mask:
            self._mask = mask
        return mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._mask = self._beside_weight(mask)

    def _beside_weight(self, mask: Mask) -> Mask:
        weight = self._parameters.get("weight")
        if weight is None:  # parametrized, or a piece of what FSDP holds, which may not be there at the moment
            weight = getattr(self, "weight", None)
        if weight is None or weight.is_meta or weight.device == mask.device:
            return mask
        return mask.to(weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Called by .to(), .cuda(), .half(), .to_empty() ...; `fn` is not for masks, which only ever move.
        super()._apply(fn, recurse)
        self.mask = self._mask
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask!r}"
