"""`TileLayout`: which tiles of a weight each language owns, as the kernels read it.

As FlexAttention's block mask, but for weights. A weight [N, K] is cut into tiles of (TN, TK); for each language a tile
is empty (never read), partial (read with the bits of its weights) or full (read without). The kernels walk lists of
the tiles that are not empty: along a row of tiles for Y = X (W o M)^T, along a column for dX = dY (W o M).

All tensors have a size that does not depend on what the masks hold, so that one language can be replaced alone
(`update`) and nothing ever waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask_kernels.limits import CHIPS

__all__ = ["EMPTY", "FULL_TILE", "PARTIAL", "TileLayout", "default_tile"]

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
        shape, tile, block: (N, K), (TN, TK) and the (bn, bk) that `update` expects of `keep`, or None (bits).
        state: uint8 [S, NT, KT], 0 empty, 1 partial, 2 full. At an edge a tile is full if all that exists is live.
        row_tiles: int16 [S, NT, KT]; for each row of tiles the columns of the full ones, then of the partial ones.
        row_counts: int32 [S, NT, 2]; how many are full, how many partial. What follows them in the list means nothing.
        column_tiles, column_counts: int16 [S, KT, NT], int32 [S, KT, 2]; the same of each column of tiles.
        row_pairs: int16 [S, ceil(NT / 2), KT]; for rows 2r and 2r + 1 of tiles the columns where both are full, then
            those where only row 2r is, then only row 2r + 1. None unless all tiles are empty or full and TN is below
            128: two rows of such tiles together are no higher than the kernels can use.
        row_pair_counts: int32 [S, ceil(NT / 2), 3]; how many of each.
        column_pairs, column_pair_counts: int16 [S, ceil(KT / 2), NT], int32 [S, ceil(KT / 2), 3]; the same of columns.
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
        self.block: tuple[int, int] | None = None
        self.bits: Tensor | None = None
        self.one_bit: Tensor | None = None
        self.state = torch.full((S, NT, KT), FULL_TILE, dtype=torch.uint8, device=device)
        self.row_tiles = torch.empty(S, NT, KT, dtype=torch.int16, device=device)
        self.row_counts = torch.empty(S, NT, 2, dtype=torch.int32, device=device)
        self.column_tiles = torch.empty(S, KT, NT, dtype=torch.int16, device=device)
        self.column_counts = torch.empty(S, KT, 2, dtype=torch.int32, device=device)
        self.row_pairs: Tensor | None = None
        self.row_pair_counts: Tensor | None = None
        self.column_pairs: Tensor | None = None
        self.column_pair_counts: Tensor | None = None

    # ---- constructors

    @classmethod
    def from_bits(cls, bits: Tensor, N: int, K: int, tile: tuple[int, int] | None = None) -> TileLayout:
        """Masks over single weights.

        Args:
            bits: int32 [L, N, ceil(K / 32)], see the class; bits past K are ignored. Kept, not copied: `update` writes
                into it.
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
        layout._read_bits(0, layout.n_languages)
        layout._fill_lists(0, layout.n_languages + 1)
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
        bn, bk = block
        N, K = keep.shape[1] * bn, keep.shape[2] * bk
        tile = tile or default_tile(block, (N, K))
        layout = cls(keep.shape[0], (N, K), tile, keep.device)
        layout.block = (bn, bk)
        if bn % tile[0] or bk % tile[1]:
            layout._take_bits(torch.empty(layout.n_languages, N, -(-K // 32), dtype=torch.int32, device=keep.device))
        else:
            layout._make_pairs()
        layout._read_blocks(keep, 0)
        layout._fill_lists(0, layout.n_languages + 1)
        return layout

    def update(self, language: int, *, bits: Tensor | None = None, keep: Tensor | None = None) -> None:
        """Replace the mask of one language in place: give what the layout was built from, for that language.

        Args:
            language: 0 to L - 1.
            bits: int32 [N, ceil(K / 32)], for a layout made by `from_bits`.
            keep: bool [N / bn, K / bk], for a layout made by `from_blocks`.

        Raises:
            IndexError: no such language.
            TypeError, ValueError: the other kind of mask, or a wrong dtype or shape.
        """
        if not 0 <= language < self.n_languages:
            raise IndexError(f"language {language} of a layout of {self.n_languages}")
        if self.block is None:
            assert self.bits is not None
            given, name, dtype, expected = bits, "bits", torch.int32, tuple(self.bits.shape[1:])
        else:
            sides = (self.shape[0] // self.block[0], self.shape[1] // self.block[1])
            given, name, dtype, expected = keep, "keep", torch.bool, sides
        if given is None or (bits is not None and keep is not None):
            raise ValueError(f"this layout was built from {name}: give {name} alone")
        if given.dtype != dtype:
            raise TypeError(f"expected {name} of dtype {dtype}, given {given.dtype}")
        if tuple(given.shape) != expected:
            raise ValueError(f"expected {name} {expected} of one language, given {tuple(given.shape)}")
        if self.block is None:
            self.bits[language].copy_(given)  # type: ignore[index]
            self._read_bits(language, language + 1)
        else:
            self._read_blocks(given[None], language)
        self._fill_lists(language + 1, language + 2)

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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def pairs(self, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """Lists and counts of the pairs of rows, or of columns if transposed; None where there are none."""
        if transposed:
            tiles, counts = self.column_pairs, self.column_pair_counts
        else:
            tiles, counts = self.row_pairs, self.row_pair_counts
        return None if tiles is None or counts is None else (tiles, counts)

    def __repr__(self) -> str:
        (N, K), (TN, TK) = self.shape, self.tile
        kind = "block tiles" if self.bits is None else "bits"
        return f"TileLayout({self.n_languages} languages, {N} x {K}, tiles of {TN} x {TK}, {kind})"

    # ---- how it is filled

    def _take_bits(self, bits: Tensor) -> None:
        self.bits = bits
        # Computed on the device: a copy from the host could not be made inside of a CUDA graph.
        self.one_bit = 1 << torch.arange(32, dtype=torch.int32, device=bits.device)

    def _read_blocks(self, keep: Tensor, first: int) -> None:
        """State, and bits where there are any, of the languages from `first` on: `keep` bool [n, N / bn, K / bk]."""
        assert self.block is not None
        bn, bk = self.block
        if self.bits is None:
            state = keep.to(torch.uint8) * FULL_TILE
            state = state.repeat_interleave(bn // self.tile[0], 1).repeat_interleave(bk // self.tile[1], 2)
            self.state[first + 1 : first + 1 + len(keep)].copy_(state)
            return
        K, words = self.shape[1], self.bits.shape[2]
        for language, flags in enumerate(keep, first):
            # Only the columns are spelled out; the rows of a block share their words.
            flags = F.pad(flags.repeat_interleave(bk, 1), (0, words * 32 - K))
            octets = (flags.view(torch.int64) * _PACK >> 56) & 255
            self.bits[language].copy_(octets.to(torch.uint8).view(torch.int32).repeat_interleave(bn, 0))
        self._read_bits(first, first + len(keep))

    def _read_bits(self, first: int, last: int) -> None:
        """State of the languages from `first` to before `last`: a tile is full if all of its words are, and so on."""
        assert self.bits is not None
        (N, K), (TN, TK), (NT, KT) = self.shape, self.tile, self.n_tiles
        words, tile_words = self.bits.shape[2], TK // 32
        exists = torch.full((words,), -1, dtype=torch.int32, device=self.device)
        if K % 32:
            exists[-1] = (1 << K % 32) - 1
        edge = (0, KT * tile_words - words, 0, NT * TN - N)
        step = max(1, _CHUNK // (4 * NT * TN * KT * tile_words))
        for start in range(first, last, step):
            part = self.bits[start : min(start + step, last)] & exists
            live, full = (
                _by_tile(F.pad(part != 0, edge, value=False), TN, tile_words).any(-1).any(2),
                _by_tile(F.pad(part == exists, edge, value=True), TN, tile_words).all(-1).all(2),
            )
            self.state[start + 1 : start + 1 + len(part)].copy_(live.to(torch.uint8) + (live & full))

    def _make_pairs(self) -> None:
        """Room for the lists of pairs, where they are of use."""
        (NT, KT), S, device = self.n_tiles, self.n_languages + 1, self.device
        if self.tile[0] < _PAIRED:
            self.row_pairs = torch.empty(S, -(-NT // 2), KT, dtype=torch.int16, device=device)
            self.row_pair_counts = torch.empty(S, -(-NT // 2), 3, dtype=torch.int32, device=device)
        if self.tile[1] < _PAIRED:
            self.column_pairs = torch.empty(S, -(-KT // 2), NT, dtype=torch.int16, device=device)
            self.column_pair_counts = torch.empty(S, -(-KT // 2), 3, dtype=torch.int32, device=device)

    def _fill_lists(self, first: int, last: int) -> None:
        """Lists and counts, in both orientations, of the segments from `first` to before `last`."""
        NT, KT = self.n_tiles
        step = max(1, _CHUNK // (16 * NT * KT))
        for start in range(first, last, step):
            where = slice(start, min(start + step, last))
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
