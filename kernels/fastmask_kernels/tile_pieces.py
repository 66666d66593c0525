"""What the kernels over tiles share on the device: the order of programs, and loads that know the weight's edges."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grouped", "load_tile"]


@triton.jit
def grouped(program, firsts, seconds, GROUP: tl.constexpr):
    """The place (first, second) of a program in a grid of firsts x seconds.

    GROUP firsts go through all seconds side by side before the next ones start, so that programs that run at the same
    time share what they read on both sides.
    """
    start = program // (GROUP * seconds) * GROUP
    in_group = tl.minimum(firsts - start, GROUP)
    place = program % (GROUP * seconds)
    return start + place % in_group, place // in_group


@triton.jit
def load_tile(pointers, inside_rows, inside_columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Load a tile; what lies outside is 0. An even side needs no check, and its argument is not read."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(pointers)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=inside_columns[None, :], other=0)
    elif EVEN_COLUMNS:
        tile = tl.load(pointers, mask=inside_rows[:, None], other=0)
    else:
        tile = tl.load(pointers, mask=inside_rows[:, None] & inside_columns[None, :], other=0)
    return tile
