"""`TileLayout`: which tiles of a weight each language owns, as the kernels read it; and checks of what goes with it.

As FlexAttention's block mask, but for weights. A weight [N, K] is cut into tiles of (TN, TK); for each language a tile
is empty (never read), partial (read with the bits of its weights) or full (read without). The kernels walk lists of
the tiles that are not empty: along a row of tiles for Y = X (W o M)^T, along a column for dX = dY (W o M).

All tensors have a size that does not depend on what the masks hold, so that nothing ever waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask_kernels.chips import CHIPS
from fastmask_kernels.plan import Plan

__all__ = ["EMPTY", "FULL_TILE", "PARTIAL", "TileLayout", "default_tile", "with_contiguous_rows"]

EMPTY, PARTIAL, FULL_TILE = 0, 1, 2  # what `TileLayout.state` says of a tile

_PAIRED = 128  # tiles of at least this side are worked on one by one
_CHUNK = 2**26  # bytes of temporary memory that a constructor may take at a time (one language at least)
_PACK = 0x0102040810204080  # multiplied with eight flags (bytes 0 or 1), it leaves their bits in the highest byte


def default_tile(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The tile (TN, TK) that suits masks over blocks of (bn, bk) weights; (1, 1) for masks over single weights.

    Tiles of 128 use what they read twice as often as tiles of 64, so they are taken wherever they skip as much: for
    blocks that are multiples of 128, and where nearly every tile is partial anyway. Blocks that are multiples of 64
    keep their own shape, so that each tile is empty or full and no bits are needed. A weight of `shape` (N, K) that has
    fewer tiles of 128 than a large GPU has multiprocessors takes tiles of 64: dW has one program for each.
    """
    if -(-shape[0] // 128) * -(-shape[1] // 128) < CHIPS["sm_90"].multiprocessors:
        return (64, 64)
    if block[0] % 64 == 0 and block[1] % 64 == 0:
        return (128 if block[0] % 128 == 0 else 64, 128 if block[1] % 128 == 0 else 64)
    return (128, 128)


class TileLayout:
    """The masks of L languages over one weight [N, K], cut into NT x KT tiles of (TN, TK).

    Segment 0 of S = L + 1 is the full network, segment l + 1 is language l, as in `Plan`. Build one with `from_bits` or
    `from_blocks`, on the device of what is given.

    State and lists take 5 bytes for each of the S x NT x KT tiles, 7 with both kinds of pairs: 3.1 MB, counts included,
    for 100 languages over 4096 x 4096 in tiles of 64. Bits take L x N x K / 8 bytes: 210 MB there.

    Attributes:
        shape, tile: (N, K) and (TN, TK).
        state: uint8 [S, NT, KT], 0 empty, 1 partial, 2 full. At an edge a tile is full if all that exists is live.
        row_tiles: int16 [S, NT, KT]; for each row of tiles the columns of the full ones, then of the partial ones.
        row_counts: int32 [S, NT, 2]; how many are full, how many partial. What follows them in the list means nothing.
        column_tiles, column_counts: int16 [S, KT, NT], int32 [S, KT, 2]; the same of each column of tiles.
        row_pairs: int16 [S, ceil(NT / 2), KT]; for rows 2r and 2r + 1 of tiles the columns where both are full, then
            those where only row 2r is, then only row 2r + 1; and int32 [S, ceil(NT / 2), 3], how many of each. None
            unless all tiles are empty or full and TN is below 128: two rows of such tiles together are no higher than
            the kernels can use.
        column_pairs: int16 [S, ceil(KT / 2), NT] and int32 [S, ceil(KT / 2), 3]; the same of columns.
        bits: int32 [L, N, ceil(K / 32)], weight k is bit k % 32 of word k // 32; None where no tile can be partial.
        one_bit: int32 [32] beside bits; entry i has bit i set.
    """

    def __init__(
        self, n_languages: int, shape: tuple[int, int], tile: tuple[int, int], device: torch.device | str
    ) -> None:
        (N, K), (TN, TK) = shape, tile
        if min(n_languages, N, K) < 1:
            raise ValueError(f"languages and the weight's sizes must be positive, given {n_languages} and {shape}")
        for size, name in ((TN, "tile[0]"), (TK, "tile[1]")):
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, given {size}")
        if TK % 32:
            raise ValueError(f"tile[1] must be a multiple of 32, the bits of a word, given {TK}")
        NT, KT, S = -(-N // TN), -(-K // TK), n_languages + 1
        if max(NT, KT) > torch.iinfo(torch.int16).max:
            raise ValueError(f"a weight of {N} x {K} has too many tiles of {TN} x {TK}: lists hold 32767 of a side")
        self.shape, self.tile = (N, K), (TN, TK)
        self.bits: Tensor | None = None
        self.one_bit: Tensor | None = None
        self.state = torch.full((S, NT, KT), FULL_TILE, dtype=torch.uint8, device=device)
        self.row_tiles = torch.empty(S, NT, KT, dtype=torch.int16, device=device)
        self.row_counts = torch.empty(S, NT, 2, dtype=torch.int32, device=device)
        self.column_tiles = torch.empty(S, KT, NT, dtype=torch.int16, device=device)
        self.column_counts = torch.empty(S, KT, 2, dtype=torch.int32, device=device)
        self.row_pairs: tuple[Tensor, Tensor] | None = None
        self.column_pairs: tuple[Tensor, Tensor] | None = None

    # ---- constructors

    @classmethod
    def from_bits(cls, bits: Tensor, N: int, K: int, tile: tuple[int, int] | None = None) -> TileLayout:
        """Masks over single weights.

        Args:
            bits: int32 [L, N, ceil(K / 32)], see the class; bits past K are ignored. Kept, not copied.
            N: rows of the weight.
            K: columns of the weight.
            tile: (TN, TK), powers of two, TN >= 16, TK >= 32; `default_tile` if None.

        Raises:
            TypeError, ValueError: another dtype, shape or tile.
        """
        if bits.dtype != torch.int32:
            raise TypeError(f"expected bits of dtype torch.int32, given {bits.dtype}")
        words = -(-K // 32)
        if bits.ndim != 3 or bits.shape[1:] != (N, words):
            raise ValueError(f"expected bits [languages, {N}, {words}] for {N} x {K}, given {tuple(bits.shape)}")
        layout = cls(bits.shape[0], (N, K), tile or default_tile((1, 1), (N, K)), bits.device)
        layout._take_bits(bits.contiguous())
        layout._fill_lists()
        return layout

    @classmethod
    def from_blocks(cls, keep: Tensor, block: tuple[int, int], tile: tuple[int, int] | None = None) -> TileLayout:
        """Masks over blocks of (bn, bk) weights, of any size; blocks that are no multiples of the tile become bits.

        Args:
            keep: bool [L, N / bn, K / bk]; true where a language owns the block.
            block: (bn, bk); (1, 1) for masks over single weights.
            tile: as in the class; `default_tile` if None.

        Raises:
            TypeError, ValueError: another dtype, shape or tile.
        """
        if keep.dtype != torch.bool:
            raise TypeError(f"expected keep of dtype torch.bool, given {keep.dtype}")
        if keep.ndim != 3 or len(block) != 2 or min(block) < 1:
            raise ValueError(
                f"expected keep [languages, N / bn, K / bk] and block (bn, bk), given {tuple(keep.shape)} and {block}"
            )
        L, (bn, bk) = keep.shape[0], block
        N, K = keep.shape[1] * bn, keep.shape[2] * bk
        layout = cls(L, (N, K), tile or default_tile(block, (N, K)), keep.device)
        TN, TK = layout.tile
        if bn % TN == 0 and bk % TK == 0:
            state = keep.to(torch.uint8) * FULL_TILE
            layout.state[1:].copy_(state.repeat_interleave(bn // TN, 1).repeat_interleave(bk // TK, 2))
            NT, KT = layout.n_tiles
            layout.row_pairs = layout._room_for_pairs(NT, KT) if TN < _PAIRED else None
            layout.column_pairs = layout._room_for_pairs(KT, NT) if TK < _PAIRED else None
        else:
            bits = torch.empty(L, N, -(-K // 32), dtype=torch.int32, device=keep.device)
            for flags, words in zip(keep, bits, strict=True):
                # Only the columns are spelled out; the rows of a block share their words.
                flags = F.pad(flags.repeat_interleave(bk, 1), (0, bits.shape[2] * 32 - K))
                octets = (flags.view(torch.int64) * _PACK >> 56) & 255
                words.copy_(octets.to(torch.uint8).view(torch.int32).repeat_interleave(bn, 0))
            layout._take_bits(bits)
        layout._fill_lists()
        return layout

    # ---- properties

    @property
    def n_languages(self) -> int:
        """L."""
        return self.state.shape[0] - 1

    @property
    def n_tiles(self) -> tuple[int, int]:
        """(NT, KT)."""
        return self.state.shape[1], self.state.shape[2]

    @property
    def device(self) -> torch.device:
        return self.state.device

    def pairs(self, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """Lists and counts of the pairs of rows, or of columns if transposed; None where there are none."""
        return self.column_pairs if transposed else self.row_pairs

    def check(self, plan: Plan, device: torch.device) -> None:
        """Raise ValueError unless the plan is of as many languages, and both lie on `device` with the activations."""
        if plan.n_languages != self.n_languages:
            raise ValueError(f"a plan of {plan.n_languages} languages with a layout of {self.n_languages}")
        for name, own in (("layout", self.device), ("plan", plan.token_rows.device)):
            if own != device:
                raise ValueError(f"{name}: expected on {device} with the activations, given on {own}")

    def __repr__(self) -> str:
        (N, K), (TN, TK) = self.shape, self.tile
        kind = "block tiles" if self.bits is None else "bits"
        return f"TileLayout({self.n_languages} languages, {N} x {K}, tiles of {TN} x {TK}, {kind})"

    # ---- how it is filled

    def _take_bits(self, bits: Tensor) -> None:
        """Keep the bits, and see which tiles they fill: a tile is full if all of its words are, and so on."""
        self.bits = bits
        # Computed on the device: a copy from the host could not be made inside of a CUDA graph.
        self.one_bit = 1 << torch.arange(32, dtype=torch.int32, device=bits.device)
        (N, K), (TN, TK), (NT, KT) = self.shape, self.tile, self.n_tiles
        words, tile_words = bits.shape[2], TK // 32
        exists = torch.full((words,), -1, dtype=torch.int32, device=self.device)
        if K % 32:
            exists[-1] = (1 << K % 32) - 1
        edge = (0, KT * tile_words - words, 0, NT * TN - N)
        step = max(1, _CHUNK // (4 * NT * TN * KT * tile_words))
        for part, state in zip(bits.split(step), self.state[1:].split(step), strict=True):
            part = part & exists
            live, full = (
                _by_tile(F.pad(part != 0, edge, value=False), TN, tile_words).any(-1).any(2),
                _by_tile(F.pad(part == exists, edge, value=True), TN, tile_words).all(-1).all(2),
            )
            state.copy_(live.to(torch.uint8) + (live & full))

    def _room_for_pairs(self, lines: int, across: int) -> tuple[Tensor, Tensor]:
        S, pairs, device = self.n_languages + 1, -(-lines // 2), self.device
        tiles = torch.empty(S, pairs, across, dtype=torch.int16, device=device)
        return tiles, torch.empty(S, pairs, 3, dtype=torch.int32, device=device)

    def _fill_lists(self) -> None:
        """Lists and counts, in both orientations."""
        NT, KT = self.n_tiles
        step = max(1, _CHUNK // (16 * NT * KT))
        for start in range(0, self.n_languages + 1, step):
            where = slice(start, start + step)
            for transposed, state, tiles, counts in (
                (False, self.state[where], self.row_tiles, self.row_counts),
                (True, self.state[where].transpose(1, 2), self.column_tiles, self.column_counts),
            ):
                _list(state, (FULL_TILE, PARTIAL), tiles[where], counts[where])
                if pairs := self.pairs(transposed):
                    live = F.pad(state != EMPTY, (0, 0, 0, state.shape[1] % 2)).to(torch.uint8)
                    _list(2 * live[:, ::2] + live[:, 1::2], (3, 2, 1), pairs[0][where], pairs[1][where])


def _list(kinds: Tensor, listed: tuple[int, ...], tiles: Tensor, counts: Tensor) -> None:
    """Where in each row of `kinds` [n, rows, columns] the `listed` kinds are, highest first, and how many of each."""
    # A stable sort keeps the tiles of one kind in ascending order.
    tiles.copy_(torch.sort(kinds, dim=2, descending=True, stable=True).indices)
    counts.copy_(torch.stack([(kinds == kind).sum(2) for kind in listed], 2))


def _by_tile(flags: Tensor, TN: int, tile_words: int) -> Tensor:
    """[n, NT * TN, KT * tile_words] -> [n, NT, TN, KT, tile_words]."""
    return flags.unflatten(2, (-1, tile_words)).unflatten(1, (-1, TN))


def with_contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if elements of a row lie side by side, else a copy."""
    return matrix if matrix.ndim != 2 or matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
