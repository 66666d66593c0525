"""What the row kernels share on the device: one of several weights, and how much of it a segment owns."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["live_count", "pick"]


@triton.jit
def pick(g, a0, a1, a2, G: tl.constexpr):
    """The argument of weight g, of G; a number or a pointer."""
    a = a0
    if G >= 2:
        a = tl.where(g == 1, a1, a)
    if G >= 3:
        a = tl.where(g == 2, a2, a)
    return a


@triton.jit
def live_count(counts, segment, N, width):
    """How many rows a segment owns: all N in segment 0, the full network."""
    count = tl.load(counts + segment - 1, mask=segment > 0, other=N).to(tl.int32)
    return tl.minimum(count, width)  # a buffer that is too narrow must not become an access past its end
