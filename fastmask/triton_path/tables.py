"""What the kernels read of a mask and of a batch, made once for all layers and passes that need it."""

from __future__ import annotations

import torch
from fastmask_kernels.packing import positions
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_layout import TileLayout
from torch import Tensor

from fastmask import bits
from fastmask.kept import Kept, sent
from fastmask.masks import Mask
from fastmask.torch_path.split import languages_of

_layouts: Kept[TileLayout] = Kept()
_positions: Kept[Tensor] = Kept()
_plans: Kept[Plan] = Kept()


def layout_of(mask: Mask) -> TileLayout:
    """The tile layout of a block or weight mask."""
    N, K = mask.out_features, mask.in_features

    def make() -> TileLayout:
        words = mask.index.detach()  # not the tensor that this is kept with
        if mask.kind == "weights":
            return TileLayout.from_bits(words, N, K)
        bn, bk = mask.geometry
        return TileLayout.from_blocks(bits.unpack_by_shifts(words, K // bk), (bn, bk))

    return _layouts.of(mask.index, make)


def size_of(mask: Mask) -> int:
    """How many rows (or columns) the weight of a row (or column) mask has."""
    return mask.out_features if mask.kind == "rows" else mask.in_features


def positions_of(mask: Mask) -> Tensor:
    """Where each row (or column) lies in the packed form: int32 [L, size], -1 where it is dead."""
    return _positions.of(mask.index, lambda: positions(mask.index, mask.extents, size_of(mask)))


def plan_of(language_ids: Tensor, tokens: int, n_languages: int, device: torch.device) -> Plan:
    """The plan of a batch of examples of `tokens` tokens each, on `device`.

    Ids on a GPU that are out of range are found there, without waiting for it: as with an index of `torch.embedding`,
    the next call that does wait raises a device-side assertion.

    Raises:
        ValueError: an id on the CPU that is out of range.
    """
    # Also says whether the ids are those that the plan was made of.
    languages = languages_of(language_ids, n_languages) if language_ids.is_cpu else None

    def make() -> Plan:
        plan = Plan(sent(language_ids, device), tokens, n_languages)
        torch._assert_async(plan.ok, f"language_ids out of range: expected -1 to {n_languages - 1}")
        return plan

    return _plans.of(language_ids, make, (tokens, n_languages, device, languages), device)
