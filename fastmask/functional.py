"""`masked_linear`: one weight, many masks, one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import operators
from fastmask.masks import UNPACKED, Mask
from fastmask.torch_path.activations import NONE

__all__ = ["compute", "compute_projections", "masked_linear"]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    language_ids: Tensor,
    bias: Tensor | None = None,
    *,
    validate: bool = False,
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
            side by side are read in place; scattered ones are copied together first.
        bias: [N] or None.
        validate: look at ids that are on a GPU before anything is computed, which waits for the GPU. Without it an id
            out of range is found by the GPU itself and ends the process with a device-side assertion, as with
            `torch.nn.functional.embedding`. Ids on the CPU are always looked at.

    Returns:
        y [B, ..., N] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a language id out of range.
    """
    x = _autocast(x)
    _check(x, weight, mask, language_ids, bias)
    if validate and language_ids.numel():
        low, high = torch.aminmax(language_ids)
        if low < -1 or high >= mask.n_languages:
            raise ValueError(
                f"language_ids are from {int(low)} to {int(high)}; expected 0 to {mask.n_languages - 1}, "
                "or -1 for the full network"
            )
    return compute(x, weight, mask, language_ids, bias, UNPACKED)


def compute(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    language_ids: Tensor,
    bias: Tensor | None,
    packed_width: int,
    activation: str = NONE,
) -> Tensor:
    """`masked_linear` without the checks, for layers that were checked once; packed unless `packed_width` is -1.

    Packed, the masked side is compact: live units at the front of `packed_width`, zeros behind. A row mask makes
    y [B, ..., packed_width]; a column mask takes x [B, ..., packed_width], where anything finite may lie behind the
    live units (it meets zeros, if it is read at all). `packed_width` must hold the widest language of the batch.
    `activation`, a name of `torch_path.activations`, is applied to x first and computed again in the backward pass
    instead of being kept.
    """
    biases = [] if bias is None else [bias]
    return compute_projections(x, [weight], [mask], language_ids, biases, [packed_width], activation)[0]


def compute_projections(
    x: Tensor,
    weights: list[Tensor],
    masks: list[Mask],
    language_ids: Tensor,
    biases: list[Tensor],
    packed_widths: list[int],
    activation: str = NONE,
) -> Sequence[Tensor]:
    """`compute` for several masks of one kind over one input: y_g of each.

    All weights have a bias, or none has: then `biases` is empty.
    """
    stored = [mask.stored(width) for mask, width in zip(masks, packed_widths, strict=True)]
    return operators.run(_autocast(x), weights, biases, language_ids, stored, masks[0].n_languages, activation)


def _autocast(x: Tensor) -> Tensor:
    """Cast x as autocast would; the weight is cast inside, after its dead part has been left out."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _check(x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None) -> None:
    N, K = mask.out_features, mask.in_features
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
