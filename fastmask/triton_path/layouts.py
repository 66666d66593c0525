"""What the kernels read of a mask, made once for each mask."""

from __future__ import annotations

from fastmask_kernels.packing import positions
from fastmask_kernels.tile_layout import TileLayout
from torch import Tensor

from fastmask.masks import StoredMask, live_blocks
from fastmask.triton_path.kept import Kept

__all__ = ["layout_of", "positions_of"]

# By the tensor that holds a mask, because operators receive tensors only; masks never change.
_layouts: Kept[TileLayout] = Kept()
_tables: Kept[Tensor] = Kept()


def layout_of(mask: StoredMask, N: int, K: int) -> TileLayout:
    """The tile layout of a block or weight mask over [N, K]."""

    def make() -> TileLayout:
        if mask.kind == "blocks":
            keep = live_blocks(mask.index, mask.extents, mask.geometry, (N, K))
            return TileLayout.from_blocks(keep, (mask.geometry[0], mask.geometry[1]))
        # An alias: were the key held by its own value, neither would ever be freed.
        return TileLayout.from_bits(mask.index.detach(), N, K)

    return _layouts.of(mask.index, make)


def positions_of(mask: StoredMask, size: int) -> Tensor:
    """Where each of `size` rows (or columns) lies in the packed form: int32 [L, size], -1 where it is dead."""
    return _tables.of(mask.index, lambda: positions(mask.index, mask.extents, size))
