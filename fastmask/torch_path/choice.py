"""Which way a batch is run: what each way costs, in multiply-adds.

- *looped*: one language after the other, its live weights gathered (`looped`). Any mask.
- *gated*: the whole weight for all tokens, gates on the activations (`gated`). Rows and columns.
- *batched*: live weights of all languages gathered, one batched product (`batched`). Packed rows and columns.

The constants were fitted to times of the FFN of width 256, 768 and 1024, 1 to 32 languages, 4 to 768 tokens of each and
densities of 0.1 to 0.9 on two cores, float32 by MKL and by oneDNN and bfloat16: the way that is chosen takes 2 to 5%
longer than the fastest on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeGuard

from torch import Tensor

from fastmask.torch_path.columns import Columns
from fastmask.torch_path.rows import Rows
from fastmask.torch_path.segments import FULL, HALF, Pieces, Split

__all__ = ["Way", "cheapest", "possible"]

Way = Literal["looped", "gated", "batched"]

GATHERED = 128  # what gathering a live weight and adding its gradient cost, in tokens that it is multiplied by
CALLS = 2**23  # what the calls for one language cost
READ = 64  # what reading the whole weight and writing its gradient cost, in tokens
GATE = 192  # what a gate on an activation costs
BATCHED = 1.5  # what a multiply-add costs in a batched product
MOST_GATHERED = 2**22  # elements of all languages' live weights together, which exist at once if batched


def cheapest(layers: Sequence[Pieces], x: Tensor, split: Split) -> Way:
    """The way for layers that share their input x [B, T, K]."""
    ways = possible(layers, x, split)
    if len(ways) == 1 or not _units_only(layers):
        return ways[0]
    return min(ways, key=lambda way: sum(_COSTS[way](layer, x.shape[1], split) for layer in layers))


def possible(layers: Sequence[Pieces], x: Tensor, split: Split) -> list[Way]:
    """The ways that give the result."""
    languages = split.positions
    if not _units_only(layers) or all(layer.whole(language) for layer in layers for language in languages):
        return ["looped"]
    ways: list[Way] = ["looped", "gated"]
    most = max(map(len, languages.values()))
    live = [max(map(layer.live, languages)) for layer in layers]
    if (
        len(languages) > 1
        and FULL not in languages
        and x.dtype not in HALF  # whose batched products are slow on a CPU
        and most * len(languages) <= 2 * split.size  # not mostly padding
        and all(layer.packed_width is not None for layer in layers)
        and all(0 < len(languages) * n * _other(layer) <= MOST_GATHERED for layer, n in zip(layers, live, strict=True))
    ):
        ways.append("batched")
    return ways


def _looped(layer: Rows | Columns, tokens: int, split: Split) -> float:
    languages = split.positions.items()
    work = sum(layer.live(language) * (len(where) * tokens + GATHERED) for language, where in languages)
    return work * _other(layer) + len(languages) * CALLS


def _gated(layer: Rows | Columns, tokens: int, split: Split) -> float:
    return layer.size * (split.size * tokens * (_other(layer) + GATE) + READ * _other(layer))


def _batched(layer: Rows | Columns, tokens: int, split: Split) -> float:
    most = max(map(len, split.positions.values()))
    live = max(map(layer.live, split.positions))
    return len(split.positions) * live * _other(layer) * (BATCHED * most * tokens + GATHERED)


_COSTS = {"looped": _looped, "gated": _gated, "batched": _batched}


def _other(layer: Rows | Columns) -> int:
    """The size of the side that is not masked."""
    return layer.in_width if isinstance(layer, Rows) else layer.out_width


def _units_only(layers: Sequence[Pieces]) -> TypeGuard[Sequence[Rows | Columns]]:
    return all(isinstance(layer, (Rows, Columns)) for layer in layers)
