"""The order of programs in a grid; and how those that add to one part of a weight's gradient take turns.

Sums of two languages meet in the same rows of dW. They take turns, so that every run gives the same bits: programs of
one language add to a strip of columns only after all programs of the languages before have. A semaphore for each strip
counts how many have; a program knows from the masks how many must. A program waits only for programs with lower ids
(`turn_order`), which hardware starts earlier, so that nobody waits for a program that cannot start. Where a chip's
barrier does not order the stores of all threads (`TURN_CHIPS` names those where it does), each language gets a launch
of its own instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["TURN_CHIPS", "end_turn", "grouped", "put_tile", "strips_together", "turn_order", "wait_for_turn"]

# Triton's barrier on AMD waits for shared memory only: another wave's stores may still be on their way when the counter
# is raised.
TURN_CHIPS = ("sm_80", "sm_90", "sm_100")


def strips_together(n_strips: int, n_chunks: int, programs: int) -> int:
    """As many strips at a time as give one segment about so many `programs`."""
    return min(n_strips, triton.cdiv(programs, n_chunks))


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
def turn_order(program, n_slots, n_chunks, n_strips, together):
    """The (slot, chunk, strip) of a program: groups of strips, in each all slots, in each all chunks, in each strips.

    A slot is a segment of the batch, a chunk a part of its rows. A strip's slots thus have ascending ids, and the part
    of dW that a group of strips needs stays in the L2 cache while the segments add to it.
    """
    in_group = together * n_chunks * n_slots
    first_strip = program // in_group * together
    strips = tl.minimum(n_strips - first_strip, together)
    place = program % in_group
    slot = place // (strips * n_chunks)
    place = place % (strips * n_chunks)
    return slot, place // strips, first_strip + place % strips


@triton.jit
def wait_for_turn(turn, before):
    """Returns once `before` programs have added to this strip: those of all segments before the caller's."""
    while tl.atomic_add(turn, 0, sem="acquire") < before:
        pass


@triton.jit
def end_turn(turn):
    """Says that this program has added to its strip; all of its threads' stores come first."""
    tl.debug_barrier()
    tl.atomic_add(turn, 1, sem="release")


@triton.jit
def put_tile(
    base, acc, live, rest, at, step, ADD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Adds acc [BN, BK] to rows of dW, or writes it there, in PIECES of its columns: registers hold no second tile.

    Columns lie `step` elements apart. `.cg` reads from the L2 cache, where the sums of other multiprocessors are.
    """
    if PIECES > 1:
        halves = tl.permute(tl.reshape(acc, (BN, 2, BK // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        put_tile(base, left, live, rest, at, step, ADD, BN, BK // 2, PIECES // 2)
        put_tile(base, right, live, rest, at + BK // 2, step, ADD, BN, BK // 2, PIECES // 2)
    else:
        k = at + tl.arange(0, BK)
        stored = live[:, None] & (k < rest)[None, :]
        place = base + k[None, :] * step
        if ADD:
            acc += tl.load(place, mask=stored, other=0.0, cache_modifier=".cg")
        tl.store(place, acc.to(base.dtype.element_ty), mask=stored)
