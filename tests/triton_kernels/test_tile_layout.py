"""`TileLayout` against masks that are spelled out: state, lists in both orientations, bits, updates, refusals."""

from __future__ import annotations

import pytest
import torch
from fastmask_kernels.tile_layout import FULL_TILE, PARTIAL, TileLayout, default_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE
from torch import Tensor


def keep_of(L: int, N: int, K: int, density: float, seed: int = 0) -> Tensor:
    """Random masks bool [L, N, K]; from three on the second owns nothing and the third everything."""
    keep = torch.rand(L, N, K, generator=torch.Generator().manual_seed(seed)) < density
    if L >= 3:
        keep[1], keep[2] = False, True
    return keep.to(DEVICE)


def pack(keep: Tensor) -> Tensor:
    """Bits of a mask, written the slow way."""
    words = -(-keep.shape[-1] // 32)
    padded = torch.nn.functional.pad(keep, (0, words * 32 - keep.shape[-1])).unflatten(-1, (words, 32))
    values = (padded.to(torch.int64) << torch.arange(32, device=keep.device)).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def expected_state(keep: Tensor, tile: tuple[int, int]) -> Tensor:
    """State of every segment, tile by tile."""
    L, N, K = keep.shape
    state = torch.full((L + 1, -(-N // tile[0]), -(-K // tile[1])), FULL_TILE, dtype=torch.uint8)
    for language in range(L):
        for row in range(state.shape[1]):
            for column in range(state.shape[2]):
                rows, columns = (
                    slice(row * tile[0], (row + 1) * tile[0]),
                    slice(column * tile[1], (column + 1) * tile[1]),
                )
                part = keep[language, rows, columns]
                state[language + 1, row, column] = FULL_TILE if part.all() else PARTIAL if part.any() else 0
    return state


def check(layout: TileLayout, keep: Tensor) -> None:
    """A layout holds exactly these masks."""
    state = expected_state(keep, layout.tile)
    assert torch.equal(layout.state.cpu(), state)
    for tiles, counts, of in (
        (layout.row_tiles, layout.row_counts, state),
        (layout.column_tiles, layout.column_counts, state.transpose(1, 2)),
    ):
        for segment, row in torch.cartesian_prod(torch.arange(of.shape[0]), torch.arange(of.shape[1])).tolist():
            full = (of[segment, row] == FULL_TILE).nonzero().flatten().tolist()
            partial = (of[segment, row] == PARTIAL).nonzero().flatten().tolist()
            assert counts[segment, row].tolist() == [len(full), len(partial)]
            assert tiles[segment, row, : len(full) + len(partial)].tolist() == full + partial
    for transposed, of in ((False, state), (True, state.transpose(1, 2))):
        pairs = layout.pairs(transposed)
        assert (pairs is not None) == (layout.bits is None and layout.tile[transposed] < 128)
        if pairs is not None:
            check_pairs(*pairs, of != 0)
    if layout.bits is None:
        assert not (state == PARTIAL).any(), "partial tiles without bits"
    else:
        assert torch.equal(layout.bits, pack(keep))


def check_pairs(tiles: Tensor, counts: Tensor, live: Tensor) -> None:
    """Lists of pairs of rows hold exactly the live tiles, bool [S, rows, columns]."""
    S, rows, columns = live.shape
    assert tiles.shape == (S, -(-rows // 2), columns)
    for segment, pair in torch.cartesian_prod(torch.arange(S), torch.arange(tiles.shape[1])).tolist():
        first = live[segment, 2 * pair]
        second = live[segment, 2 * pair + 1] if 2 * pair + 1 < rows else torch.zeros_like(first)
        parts = [part.nonzero().flatten().tolist() for part in (first & second, first & ~second, second & ~first)]
        assert counts[segment, pair].tolist() == [len(part) for part in parts]
        listed = [column for part in parts for column in part]
        assert tiles[segment, pair, : len(listed)].tolist() == listed


SHAPES = [(1, 1, 1), (3, 7, 33), (2, 64, 64), (4, 33, 130), (3, 48, 96)]


@pytest.mark.parametrize(("L", "N", "K"), SHAPES)
@pytest.mark.parametrize("tile", [(16, 32), (32, 64)])
def test_from_bits(L: int, N: int, K: int, tile: tuple[int, int]) -> None:
    """Live tiles are listed, and only those without a dead weight are taken as full, at the edges, too."""
    for density in (0.02, 0.5, 0.999):
        keep = keep_of(L, N, K, density)
        check(TileLayout.from_bits(pack(keep), N, K, tile), keep)


def test_bits_past_the_edge_are_ignored() -> None:
    """Padding bits past the edge, which are the caller's and undefined, make no tile partial."""
    keep = torch.ones(1, 16, 33, dtype=torch.bool, device=DEVICE)
    bits = pack(keep)
    bits[..., -1] = -1
    assert TileLayout.from_bits(bits, 16, 33, (16, 32)).state.tolist() == [[[2, 2]], [[2, 2]]]
    empty = torch.zeros_like(bits)
    empty[..., -1] = ~1
    assert TileLayout.from_bits(empty, 16, 33, (16, 32)).state[1].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("block", "has_bits"), [((16, 32), False), ((32, 64), False), ((16, 16), True), ((1, 1), True), ((5, 7), True)]
)
def test_from_blocks(block: tuple[int, int], has_bits: bool) -> None:
    """Block masks keep exactly their weights, and hold bits only where tiles are not whole blocks."""
    flags = keep_of(3, 4, 5, 0.5, seed=1)  # an odd number of columns, of rows below
    layout = TileLayout.from_blocks(flags, block, (16, 32))
    assert (layout.bits is not None) == has_bits
    check(layout, flags.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2))


@pytest.mark.parametrize("tile", [(16, 32), (16, 128), (128, 32), (128, 128)])
@pytest.mark.parametrize("sides", [(1, 1), (3, 2), (5, 4)])
def test_pairs(tile: tuple[int, int], sides: tuple[int, int]) -> None:
    """Rows of tiles that are worked on together have the tiles of both, and no others."""
    flags = keep_of(4, *sides, 0.5, seed=2)
    layout = TileLayout.from_blocks(flags, tile, tile)
    check(layout, flags.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2))


def test_chunks_give_the_same_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large mask, read in several pieces, gets the layout it would get in one."""
    keep = keep_of(5, 33, 70, 0.3)
    whole = TileLayout.from_bits(pack(keep), 33, 70, (16, 32))
    monkeypatch.setattr("fastmask_kernels.tile_layout._CHUNK", 1)
    check(TileLayout.from_bits(pack(keep), 33, 70, (16, 32)), keep)
    monkeypatch.setattr("fastmask_kernels.tile_layout._CHUNK", nbytes(whole))
    check(TileLayout.from_blocks(keep, (1, 1), (16, 32)), keep)


def nbytes(layout: TileLayout) -> int:
    """Bytes of all tensors together."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(vars(layout)) if torch.is_tensor(leaf)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_nbytes_is_what_the_docstring_says() -> None:
    """The memory of a layout is what its docstring promises."""
    flags = torch.ones(10, 64, 64, dtype=torch.bool, device=DEVICE)
    layout = TileLayout.from_blocks(flags, (64, 64), (64, 64))
    tiles = 11 * 64 * 64
    assert nbytes(layout) == 7 * tiles + 2 * 11 * 64 * 2 * 4 + 2 * 11 * 32 * 3 * 4
    assert nbytes(TileLayout.from_blocks(flags, (128, 128))) == 5 * tiles + 2 * 11 * 64 * 2 * 4
    assert (layout.n_languages, layout.shape, layout.n_tiles) == (10, (4096, 4096), (64, 64))
    assert layout.device == flags.device


def test_default_tile() -> None:
    """Masks over aligned blocks need no bits, and small weights get tiles small enough to keep a GPU busy."""
    large = (4096, 4096)
    assert default_tile((128, 256), large) == (128, 128)
    assert default_tile((64, 128), large) == (64, 128)
    assert default_tile((192, 64), large) == (64, 64)
    assert default_tile((1, 1), large) == default_tile((32, 32), large) == (128, 128)
    assert default_tile((1, 1), (768, 768)) == default_tile((128, 128), (768, 768)) == (64, 64)


def test_refusals() -> None:
    """A wrong mask is an error."""
    bits = torch.zeros(2, 32, 2, dtype=torch.int32, device=DEVICE)
    for error, call in (
        (TypeError, lambda: TileLayout.from_bits(bits.long(), 32, 64, (16, 32))),
        (ValueError, lambda: TileLayout.from_bits(bits, 32, 65, (16, 32))),
        (ValueError, lambda: TileLayout.from_bits(bits, 32, 64, (8, 32))),
        (ValueError, lambda: TileLayout.from_bits(bits, 32, 64, (16, 16))),
        (ValueError, lambda: TileLayout.from_bits(bits, 32, 64, (48, 32))),
        (ValueError, lambda: TileLayout.from_bits(bits[:0], 32, 64, (16, 32))),
        (TypeError, lambda: TileLayout.from_blocks(bits, (16, 32))),
        (ValueError, lambda: TileLayout.from_blocks(bits.bool(), (0, 32))),
    ):
        with pytest.raises(error):
            call()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 100), st.floats(0, 1), st.sampled_from([(16, 32), (32, 32)])
)
def test_any_shape(L: int, N: int, K: int, density: float, tile: tuple[int, int]) -> None:
    """A layout holds its masks, whatever the shape."""
    keep = keep_of(L, N, K, density, seed=N * K)
    check(TileLayout.from_bits(pack(keep), N, K, tile), keep)
    check(TileLayout.from_blocks(keep, (1, 1), tile), keep)
