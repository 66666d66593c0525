"""`masked_linear`: one weight, many masks; and `MaskedLinear`: `nn.Linear` with one mask for each language.

`sparse_update_linear` uses the masks for learning only: the forward pass is that of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastmask.traced  # noqa: F401 - registers the operator that tracers are shown
from fastmask.errors import unknown
from fastmask.masks import UNPACKED, Mask
from fastmask.operators import autocast, run
from fastmask.torch_path.layers import Layers
from fastmask.torch_path.split import languages_of

FORWARDS = ("masked", "full")

Self = TypeVar("Self", bound="MaskedLinear")


def masked_linear(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None = None, *, validate: bool = False
) -> Tensor:
    """Apply one linear layer under a different mask for each example of the batch.

    Example b of language l = language_ids[b] gets `F.linear(x[b], weight * M_l, bias)`, within rounding; what M_l
    leaves out is not computed, forward or backward. A row mask gates the bias with its row; other masks leave it alone.

    Args:
        x: [B, ..., K], float; B examples.
        weight: [N, K], the dtype of x, or wider (float32 master weights under half-precision x: only the live part is
            cast, and the gradient comes back in the weight's dtype).
        mask: masks of L languages over this weight.
        language_ids: int64 [B], values 0..L-1, or -1 for the full, unmasked network. Examples of one language that lie
            side by side are read in place; scattered ones are copied together first. They may be written to at once,
            in a compiled function only after the backward pass.
        bias: [N] or None.
        validate: look at ids that are on a GPU before anything is computed, which waits for the GPU. Without it an id
            out of range is found by the GPU itself and ends the process with a device-side assertion, as with
            `torch.nn.functional.embedding`. Ids on the CPU are always looked at.

    Returns:
        y [B, ..., N] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a language id out of range.
    """
    return _checked_compute(x, weight, mask, language_ids, bias, validate, full_forward=False)


def sparse_update_linear(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None = None, *, validate: bool = False
) -> Tensor:
    """Apply one linear layer whole, and let each example change only what its language's mask leaves.

    All examples get `F.linear(x, weight, bias)`, and dx = dy @ weight. The gradient of the weight is the sum over
    languages of M_l * (dy_l.T @ x_l), of which only the live part is computed; it is dense, in the weight's dtype, and
    0 where no language of the batch owns anything. The gradient of the bias is gated with the rows of a row mask; other
    masks leave it alone. -1 is a language that owns everything. Sparse fine-tuning by masks is that of Ansell et al.
    2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", and Sung et al. 2021, "Training Neural Networks
    with Fixed Sparse Masks".

    Args, returns, raises: as `masked_linear`.
    """
    return _checked_compute(x, weight, mask, language_ids, bias, validate, full_forward=True)


def checked_forward(forward: str) -> str:
    """`forward`, if it is one of `FORWARDS`; raises KeyError if not."""
    if forward not in FORWARDS:
        raise unknown("forward", forward, FORWARDS)
    return forward


def _checked_compute(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None, validate: bool, full_forward: bool
) -> Tensor:
    x, (N, K) = autocast(x), (mask.out_features, mask.in_features)
    if tuple(weight.shape) != (N, K):
        raise ValueError(f"the mask is for a weight of shape {(N, K)}, given a weight of shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"expected a bias of shape {(N,)}, given {tuple(bias.shape)}")
    if x.ndim < 2:
        raise ValueError(f"expected x [B, ..., {K}] and a language id for each of B examples, given {tuple(x.shape)}")
    if x.shape[-1] != K:
        raise ValueError(f"expected x with last size {K}, given x of shape {tuple(x.shape)}")
    if language_ids.dtype != torch.int64:
        raise ValueError(f"expected language_ids of dtype torch.int64, given {language_ids.dtype}")
    if language_ids.ndim != 1 or language_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected one language id for each of the {x.shape[0]} examples of x, "
            f"given language_ids of shape {tuple(language_ids.shape)}"
        )
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"expected floating-point x and weight, given {x.dtype} and {weight.dtype}")
    if torch.promote_types(x.dtype, weight.dtype) != weight.dtype:
        raise ValueError(f"x of dtype {x.dtype} does not fit a weight of dtype {weight.dtype}: cast one of them")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"x is on {x.device}, bias on {bias.device}: expected one device")
    if not x.device == weight.device == mask.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, mask on {mask.device}: expected one device")
    if validate:
        languages_of(language_ids, mask.n_languages)
    layers = Layers([mask], [UNPACKED], full_forward=full_forward)
    return run(layers, x, [weight], [] if bias is None else [bias], language_ids)[0]


class MaskedLinear(nn.Linear):
    """A linear layer that L languages share, each through its own mask.

    The parameters, their names and the state dict are those of `nn.Linear`; the mask is configuration and is not saved
    with them (`fastmask.Subnetworks.save` saves masks). It follows the weight from device to device, and nothing else
    touches it: `to_empty`, a change of dtype and the meta device leave its values as they are.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        mask: a `Mask` over [out_features, in_features].
        forward: "masked", or "full" if masks restrict only what may learn (`fastmask.sparse_update_linear`).
    """

    transposed = False  # whether the weight is stored [in, out]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Mask,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        forward: str = "masked",
    ) -> None:
        full_forward = checked_forward(forward) == "full"
        if (mask.out_features, mask.in_features) != (out_features, in_features):
            raise ValueError(
                f"the mask is for {mask.in_features} -> {mask.out_features} features, "
                f"the layer is {in_features} -> {out_features}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.full_forward = full_forward
        self._mask: Mask
        self.mask = mask

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, mask: Mask, **options: Any) -> Self:
        """A masked layer that shares the Parameters of `linear`."""
        N, K = linear.weight.shape[::-1] if cls.transposed else linear.weight.shape
        layer = cls(K, N, mask=mask, bias=linear.bias is not None, device="meta", **options)
        # Not by assignment: `accelerate.init_empty_weights` puts what is assigned on the meta device.
        layer._parameters.update(linear._parameters)
        layer.mask = mask
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """As in `nn.Linear`; nothing for parameters without memory, where it would only take time."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor, language_ids: Tensor) -> Tensor:  # type: ignore[override]
        """[B, ..., in], int64 [B] -> [B, ..., out]; see `fastmask.masked_linear`, or `sparse_update_linear`."""
        function = sparse_update_linear if self.full_forward else masked_linear
        return function(x, self.weight, self.mask, language_ids, self.bias)

    @property
    def mask(self) -> Mask:
        """The mask, on the device of the weight (where it was, while the weight is on the meta device)."""
        weight = self._parameters.get("weight")
        if weight is None or weight.device != self._mask.extents.device:
            self._mask = self._beside_weight(self._mask)
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._mask = self._beside_weight(mask)
        self._follow_mask()

    def _follow_mask(self) -> None:
        """Make anew what a layer keeps of its mask."""

    @property
    def stored_mask(self) -> Mask:
        """The mask over the weight as it is stored."""
        return self.mask

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
        forward = ", forward='full'" if self.full_forward else ""
        return f"{super().extra_repr()}, mask={self.mask!r}{forward}"
