"""What the kernels read of a mask, made once for each mask."""

from __future__ import annotations

from collections.abc import MutableMapping

from fastmask_kernels.packing import positions
from fastmask_kernels.tile_layout import TileLayout
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastmask.masks import StoredMask, live_blocks

__all__ = ["layout_of", "positions_of"]

# By the tensor that holds a mask, because operators receive tensors only; masks never change.
_made: MutableMapping[Tensor, TileLayout] = WeakIdKeyDictionary()
_tables: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


def layout_of(mask: StoredMask, N: int, K: int) -> TileLayout:
    """The tile layout of a block or weight mask over [N, K]; masks never change, so it is made once."""
    layout = _made.get(mask.index)
    if layout is None:
        if mask.kind == "blocks":
            keep = live_blocks(mask.index, mask.extents, mask.geometry, (N, K))
            layout = TileLayout.from_blocks(keep, (mask.geometry[0], mask.geometry[1]))
        else:
            # An alias: were the key held by its own value, neither would ever be freed.
            layout = TileLayout.from_bits(mask.index.detach(), N, K)
        _made[mask.index] = layout
    return layout


def positions_of(mask: StoredMask, size: int) -> Tensor:
    """Where each of `size` rows (or columns) lies in the packed form: int32 [L, size], -1 where it is dead."""
    table = _tables.get(mask.index)
    if table is None:
        table = _tables[mask.index] = positions(mask.index, mask.extents, size)
    return table
