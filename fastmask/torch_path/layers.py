"""Running one batch: one masked layer, or several that share their input (Q, K and V; gate and up)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmask.masks import UNPACKED, StoredMask, live_blocks
from fastmask.torch_path import batched, gated, looped
from fastmask.torch_path.activations import NONE, activate, activation_grad
from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.choice import cheapest
from fastmask.torch_path.columns import Columns
from fastmask.torch_path.live_units import LiveUnits
from fastmask.torch_path.rows import Rows
from fastmask.torch_path.segments import FULL, Needs, Pieces, Split
from fastmask.torch_path.weights import Weights

__all__ = ["backward", "forward"]

_WAYS = {"looped": looped, "gated": gated, "batched": batched}


def forward(
    masks: Sequence[StoredMask],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    language_ids: Tensor,
    n_languages: int,
    activation: str = NONE,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """Run x [B, T, K_in], activated, through each masked weight -> y of each, [B, T, its N_out].

    What had to be cast of the weights is put into `kept`, if it is a list: `backward` need not cast it again.

    Raises:
        ValueError: an id out of range, or a language with more live units than the packed side holds.
    """
    x = activate(x, activation)
    split = Split.of(language_ids, n_languages)
    layers = [_pieces_of(mask, weight) for mask, weight in zip(masks, weights, strict=True)]
    for mask, layer in zip(masks, layers, strict=True):
        _check_packed(mask, layer, split)
    split = split.merged(layers)
    ys, cast_weights = _WAYS[cheapest(layers, x, split)].forward(layers, x, weights, biases, split)
    if kept is not None:
        kept += cast_weights
    return ys


def backward(
    masks: Sequence[StoredMask],
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    language_ids: Tensor,
    n_languages: int,
    activation: str,
    needs_x: bool,
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of `forward`: (dx, dW of each, db of each), each None unless it is needed.

    `kept` is what the forward pass left there. Half-precision weights are summed in float32 when several languages add
    to them.
    """
    split = Split.of(language_ids, n_languages)
    layers = [_pieces_of(mask, weight) for mask, weight in zip(masks, weights, strict=True)]
    split = split.merged(layers)
    way, needs = _WAYS[cheapest(layers, x, split)], Needs(needs_x, needs_weight, needs_bias)
    dx, dws, dbs = way.backward(layers, dys, activate(x, activation), weights, split, needs, kept)
    return None if dx is None else activation_grad(dx, x, activation), dws, dbs


def _pieces_of(mask: StoredMask, weight: Tensor) -> Pieces:
    """The mask of one weight in the form that is run; made once for a mask and a packed width."""
    # Kept with the tensor that holds the mask, because operators receive tensors only; masks never change.
    made: dict[int, Pieces] | None = getattr(mask.index, "_fastmask_pieces", None)
    if made is None:
        made = mask.index._fastmask_pieces = {}  # type: ignore[attr-defined]
    pieces = made.get(mask.packed_width)
    if pieces is None:
        others = list(made.values())
        pieces = made[mask.packed_width] = _made_from(mask, weight, others[0] if others else None)
    return pieces


def _made_from(mask: StoredMask, weight: Tensor, of_another_width: Pieces | None) -> Pieces:
    N, K = weight.shape
    index = mask.index.detach()  # not the tensor that holds what is made here: they would hold each other
    if mask.kind == "blocks":
        keep = live_blocks(index, mask.extents, mask.geometry, (N, K))
        return Blocks(keep, (mask.geometry[0], mask.geometry[1]), N, K)
    if mask.kind == "weights":
        return Weights(index, N, K)
    of_rows, packed = mask.kind == "rows", None if mask.packed_width == UNPACKED else mask.packed_width
    if isinstance(of_another_width, (Rows, Columns)):
        live_units = of_another_width.live_units
    else:
        live_units = LiveUnits(index, mask.extents, mask.geometry[0], N if of_rows else K)
    return Rows(live_units, K, packed) if of_rows else Columns(live_units, N, packed)


def _check_packed(mask: StoredMask, pieces: Pieces, split: Split) -> None:
    if mask.packed_width == UNPACKED or not isinstance(pieces, (Rows, Columns)):
        return
    for language in split.positions:
        live = pieces.live(language)
        if live > mask.packed_width:
            name = "the full network (-1)" if language == FULL else f"language {language}"
            raise ValueError(f"{name} has {live} live {mask.kind}, more than the packed width {mask.packed_width}")
