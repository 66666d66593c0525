"""Packing live units to the front and back."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from fastmask_kernels.configs import Config
from fastmask_kernels.naive import naive_pack, naive_unpack
from fastmask_kernels.packing import CONFIG, pack, positions, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, launches_kernels
from row_samples import nan_from_empty, sample  # noqa: F401 (a fixture)

pytestmark = launches_kernels

SMALL = Config((("BM", 4), ("BN", 16)), num_warps=1, num_stages=1)
SHAPES = {
    "one language": ([0, 0], 19, 1, 33),
    "three, mixed with the full network": ([2, -1, 0, 2, 0, -1], 7, 3, 40),
    "eight, some absent": ([7, 3, 3, 5, 1], 5, 8, 21),
    "only a dead language": ([1, 1], 5, 3, 20),
    "one of everything": ([0], 1, 1, 1),
}


def check(ids: list[int], tokens: int, L: int, N: int, dtype: torch.dtype, config: Config, seed: int = 0) -> None:
    """Both directions against plain torch, bit by bit: they move numbers and compute none."""
    s = sample(ids, tokens, L, [N], 1, dtype=dtype, seed=seed)
    index, counts, width, packed = s.indices[0], s.counts[0], s.widths[0], s.packed[0]
    wide = torch.randn(len(s.languages), N, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    result = pack(wide, index, counts, s.plan, width, config=config)
    assert torch.equal(result, naive_pack(wide, index, counts, s.languages, width))
    result = unpack(packed, positions(index, counts, N), s.plan, config=config)  # NaN behind the live units
    assert torch.equal(result, naive_unpack(packed, index, counts, s.languages, N))


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, [torch.float32, torch.float16], whole=ON_GPU))
def test_pack_and_unpack(shape: tuple, dtype: torch.dtype) -> None:
    """Units are in their places, and dead ones are zero."""
    check(*shape, dtype=dtype, config=SMALL)


def test_default_blocks() -> None:
    """The block sizes that are shipped give the same."""
    check([1, -1, 0, 2], 20, 3, 300, torch.float16, CONFIG)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_shape_and_mask(data: st.DataObject) -> None:
    """Any combination of sizes, languages and masks is right."""
    L = data.draw(st.integers(1, 4), "L")
    ids = data.draw(st.lists(st.integers(-1, L - 1), min_size=1, max_size=4), "ids")
    tokens, N = data.draw(st.integers(1, 9), "tokens"), data.draw(st.integers(1, 36), "N")
    check(ids, tokens, L, N, torch.float32, SMALL, data.draw(st.integers(0, 99), "seed"))


def test_unpack_undoes_pack() -> None:
    """A layer that unpacks reads what a layer that packs has written."""
    s = sample([2, -1, 0, 1], 7, 3, [40], 1)
    wide = torch.randn(len(s.languages), 40, device=DEVICE)
    mask = s.indices[0], s.counts[0], s.plan
    back = unpack(pack(wide, *mask, s.widths[0], config=SMALL), positions(*mask[:2], 40), s.plan, config=SMALL)
    for row, language in enumerate(s.languages):
        live = torch.ones(40, dtype=torch.bool, device=DEVICE)
        if language >= 0:
            live[:] = False
            live[s.indices[0][language, : int(s.counts[0][language])]] = True
        assert torch.equal(back[row], wide[row].where(live, 0))


def test_positions_invert_the_index() -> None:
    """Padding of the index (zeros) is not taken for unit 0."""
    index = torch.tensor([[1, 3, 4], [2, 0, 0], [0, 0, 0]], device=DEVICE)
    table = positions(index, torch.tensor([3, 1, 0], device=DEVICE), 5)
    assert table.dtype == torch.int32
    assert table.tolist() == [[-1, 0, -1, 1, 2], [-1, -1, 0, -1, -1], [-1] * 5]


def test_slices_are_read() -> None:
    """Slices of wider buffers are read."""
    s = sample([2, -1, 0, 1], 7, 3, [40], 1)
    index, counts, width = s.indices[0], s.counts[0], s.widths[0]
    wide = torch.randn(len(s.languages), 50, device=DEVICE)
    packed = pack(wide[:, 5:45], index, counts, s.plan, width, config=SMALL)
    assert torch.equal(packed, naive_pack(wide[:, 5:45], index, counts, s.languages, width))


def test_an_empty_batch() -> None:
    """A batch of no examples (the last shard of a data set) gives empty outputs."""
    s = sample([], 7, 3, [40], 1)
    mask = s.indices[0], s.counts[0], s.plan
    assert pack(torch.zeros(0, 40, device=DEVICE), *mask, 9).shape == (0, 9)
    assert unpack(torch.zeros(0, 9, device=DEVICE), positions(*mask[:2], 40), s.plan).shape == (0, 40)


def test_wrong_use_is_named() -> None:
    """A wrong argument is refused by a message that names it."""
    s = sample([0], 5, 2, [16], 1)
    index, counts, plan = s.indices[0], s.counts[0], s.plan
    x = torch.zeros(5, 16, device=DEVICE)
    with pytest.raises(TypeError, match=r"x: expected float16.*given torch\.int64"):
        pack(x.long(), index, counts, plan, 9)
    with pytest.raises(ValueError, match=r"x: expected shape \[5, width\], given \(4, 16\)"):
        pack(x[:4], index, counts, plan, 9)
    with pytest.raises(ValueError, match="width: expected a positive integer, given 0"):
        pack(x, index, counts, plan, 0)
    with pytest.raises(ValueError, match=r"indices\[0\]: expected int64 \[2, most\]"):
        pack(x, index[:1], counts, plan, 9)
    with pytest.raises(ValueError, match=r"table: expected contiguous int32 \[2, N\]"):
        unpack(x, index, plan)
