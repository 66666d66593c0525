"""`masked_linear`: one weight, many masks, one call; and the custom operators under it.

Two operators serve every mask kind, so that autograd, `torch.compile` and the choice of path see one thing:
`fastmask::masked_linear` and `fastmask::masked_linear_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.masks import Mask
from fastmask.torch_path import batched, segments
from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.units import Columns, Rows
from fastmask.torch_path.weights import Weights

__all__ = ["masked_linear", "packed_linear"]

UNPACKED = -1


def masked_linear(x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None = None) -> Tensor:
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

    Returns:
        y [B, ..., N] in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a language id out of range.
    """
    return _call(x, weight, mask, language_ids, bias, UNPACKED)


def packed_linear(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None, packed_width: int
) -> Tensor:
    """`masked_linear` with the masked side compact: live units at the front of `packed_width`, zeros behind.

    A row mask makes y [B, ..., packed_width]; a column mask takes x [B, ..., packed_width] and never reads what lies
    behind the live units. `packed_width` must hold the widest language of the batch.
    """
    if mask.kind not in ("rows", "columns"):
        raise ValueError(f"only row and column masks can be packed, given a mask of kind {mask.kind!r}")
    return _call(x, weight, mask, language_ids, bias, packed_width)


def _call(
    x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None, packed_width: int
) -> Tensor:
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        # Only x is cast here: the weight is cast inside, after its dead part has been left out.
        x = x.to(torch.get_autocast_dtype(device_type))
    _check(x, weight, mask, language_ids, bias, packed_width)
    return torch.ops.fastmask.masked_linear(
        x,
        weight,
        bias,
        language_ids,
        mask.index,
        mask.extents,
        mask.kind,
        mask.geometry,
        mask.n_languages,
        packed_width,
    )


def _check(x: Tensor, weight: Tensor, mask: Mask, language_ids: Tensor, bias: Tensor | None, packed_width: int) -> None:
    N, K = mask.out_features, mask.in_features
    if tuple(weight.shape) != (N, K):
        raise ValueError(f"the mask is for a weight of shape {(N, K)}, given a weight of shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"expected a bias of shape {(N,)}, given {tuple(bias.shape)}")
    if x.ndim < 2:
        raise ValueError(f"expected x [B, ..., {K}] and a language id for each of B examples, given {tuple(x.shape)}")
    width = packed_width if packed_width != UNPACKED and mask.kind == "columns" else K
    if x.shape[-1] != width:
        raise ValueError(f"expected x with last size {width}, given x of shape {tuple(x.shape)}")
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
    if not x.device == weight.device == mask.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, mask on {mask.device}: expected one device")


# ---- custom operators


def _pieces(
    index: Tensor, extents: Tensor, kind: str, geometry: list[int], weight: Tensor, packed_width: int
) -> segments.Pieces:
    N, K = weight.shape
    packed = None if packed_width == UNPACKED else packed_width
    if kind == "rows":
        return Rows(index, extents, geometry[0], N, K, packed)
    if kind == "columns":
        return Columns(index, extents, geometry[0], N, K, packed)
    if kind == "blocks":
        return Blocks(index, extents, (geometry[0], geometry[1]), N, K)
    return Weights(index, N, K)


def _host_ids(language_ids: Tensor, n_languages: int) -> list[int]:
    ids: list[int] = language_ids.tolist()
    for position, language in enumerate(ids):
        if not -1 <= language < n_languages:
            raise ValueError(
                f"language_ids[{position}] is {language}; expected 0 to {n_languages - 1}, or -1 for the full network"
            )
    return ids


def _check_packed(pieces: segments.Pieces, kind: str, ids: list[int], packed_width: int) -> None:
    if packed_width == UNPACKED or not isinstance(pieces, (Rows, Columns)):
        return
    for language in set(ids):
        if pieces.live(language) > packed_width:
            name = "the full network (-1)" if language == -1 else f"language {language}"
            live = pieces.live(language)
            raise ValueError(f"{name} has {live} live {kind}, more than the packed width {packed_width}")


def _examples(x: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]; T is spelled out because -1 is ambiguous in an empty batch."""
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    return x.reshape(x.shape[0], tokens, x.shape[-1])


@torch.library.custom_op("fastmask::masked_linear", mutates_args=())
def _masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    language_ids: Tensor,
    index: Tensor,
    extents: Tensor,
    kind: str,
    geometry: list[int],
    n_languages: int,
    packed_width: int,
) -> Tensor:
    pieces = _pieces(index, extents, kind, geometry, weight, packed_width)
    ids = _host_ids(language_ids, n_languages)
    _check_packed(pieces, kind, ids, packed_width)
    examples = _examples(x)
    if batched.suits(pieces, examples.shape[1], ids):
        y = batched.Batched(pieces, weight, ids).forward(examples, bias)
    else:
        y = segments.forward(pieces, examples, weight, bias, ids)
    return y.view(*x.shape[:-1], pieces.out_width)


@_masked_linear.register_fake
def _(x, weight, bias, language_ids, index, extents, kind, geometry, n_languages, packed_width):  # type: ignore[no-untyped-def]
    packed_rows = kind == "rows" and packed_width != UNPACKED
    return x.new_empty(*x.shape[:-1], packed_width if packed_rows else weight.shape[0])


@torch.library.custom_op("fastmask::masked_linear_backward", mutates_args=())
def _masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    language_ids: Tensor,
    index: Tensor,
    extents: Tensor,
    kind: str,
    geometry: list[int],
    packed_width: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    pieces = _pieces(index, extents, kind, geometry, weight, packed_width)
    ids: list[int] = language_ids.tolist()
    wanted = (needs[0], needs[1], needs[2])
    dy_examples, examples = _examples(dy), _examples(x)
    if batched.suits(pieces, examples.shape[1], ids):
        dx, dw, db = batched.Batched(pieces, weight, ids).backward(dy_examples, examples, wanted)
    else:
        dx, dw, db = segments.backward(pieces, dy_examples, examples, weight, ids, wanted)
    # An operator cannot return None: what was not asked for comes back empty.
    return (
        x.new_empty(0) if dx is None else dx.view(x.shape),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


@_masked_linear_backward.register_fake
def _(dy, x, weight, language_ids, index, extents, kind, geometry, packed_width, needs):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _bias, language_ids, index, extents, ctx.kind, ctx.geometry, _, ctx.packed_width = inputs
    ctx.save_for_backward(x, weight, language_ids, index, extents)


def _backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    x, weight, language_ids, index, extents = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    dx, dw, db = torch.ops.fastmask.masked_linear_backward(
        dy, x, weight, language_ids, index, extents, ctx.kind, ctx.geometry, ctx.packed_width, needs
    )
    grads = [grad if needed else None for grad, needed in zip((dx, dw, db), needs, strict=True)]
    return (*grads, None, None, None, None, None, None, None)


_masked_linear.register_autograd(_backward, setup_context=_setup_context)
