"""`Plan`: a batch sorted by language, on the device and without asking it anything.

Kernels never move activations to sort them. A plan says in which row of the activations each token of a language lies,
and a kernel follows it; results are written to the same rows. Making one takes two small launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.interpreter import check_runnable
from fastmask_kernels.launching import launch

__all__ = ["Plan"]

_BLOCK = 256
_MANY = 2**14  # examples: to sort them takes less than to compare each with each


@triton.jit
def segment_of(ids, example, inside, n_segments):
    """The segments of examples, 0 for the full network; an id out of range, which `ok` reports, counts as the last."""
    segment = tl.load(ids + example, mask=inside, other=-1) + 1
    return tl.where((segment < 0) | (segment >= n_segments), n_segments - 1, segment).to(tl.int32)


# Program b writes the rows of example b's tokens to their sorted place: behind those of all examples of lower segments,
# and of its own segment's before it. The last program writes `starts`, `present` and `ok`. Grid: B + 1; or that alone.
@triton.jit(do_not_specialize=["n_examples", "tokens", "n_segments", "n_present"])
def plan_kernel(
    ids, token_rows, starts, present, ok, n_examples, tokens, n_segments, n_present,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0)
    if example < tl.num_programs(0) - 1:
        own = segment_of(ids, example, True, n_segments)
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_examples, BLOCK):
            other = start + tl.arange(0, BLOCK)
            segment = segment_of(ids, other, other < n_examples, n_segments)
            earlier = (segment < own) | ((segment == own) & (other < example))
            before += (earlier & (other < n_examples)).to(tl.int32)
        place = token_rows + tl.sum(before).to(tl.int64) * tokens
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tl.store(place + token, example * tokens + token, mask=token < tokens)
    else:
        segments = tl.arange(0, SEGMENTS)
        counts = tl.zeros([SEGMENTS], tl.int32)
        wrong = tl.zeros([ROWS], tl.int32)
        for start in range(0, n_examples, ROWS):
            other = start + tl.arange(0, ROWS)
            there = other < n_examples
            segment = segment_of(ids, other, there, n_segments)
            counts += tl.sum(((segment[:, None] == segments[None, :]) & there[:, None]).to(tl.int32), 0)
            language = tl.load(ids + other, mask=there, other=0)
            wrong += ((language < -1) | (language >= n_segments - 1)).to(tl.int32)
        tl.store(ok, tl.where(tl.sum(wrong) == 0, 1, 0))
        known = segments < n_segments
        tl.store(starts, 0)
        tl.store(starts + 1 + segments, tl.cumsum(counts, 0) * tokens, mask=known)
        has_tokens = known & (counts * tokens > 0)
        rank = tl.cumsum(has_tokens.to(tl.int32), 0)
        tl.store(present + rank - 1, segments, mask=has_tokens)
        tl.store(present + segments, -1, mask=(segments >= tl.sum(has_tokens.to(tl.int32))) & (segments < n_present))


# One program writes BLOCK tiles. Grid: blocks of tiles.
@triton.jit(do_not_specialize=["n_segments", "n_tiles", "size"])
def tiles_kernel(starts, tiles, n_segments, n_tiles, size, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segments = tl.arange(0, SEGMENTS)
    known = segments < n_segments
    begin = tl.load(starts + segments, mask=known, other=0)
    needed = tl.cdiv(tl.load(starts + segments + 1, mask=known, other=0) - begin, size)
    # Segments that end before a tile: how many they are is its segment, how many tiles they need, its place in that.
    done = (tl.cumsum(needed, 0)[None, :] <= tile[:, None]) & known[None, :]
    segment = tl.sum(done.to(tl.int32), 1)
    used = segment < n_segments
    inside = used & (tile < n_tiles)
    place = tile - tl.sum(tl.where(done, needed[None, :], 0), 1)
    first = tl.load(starts + segment, mask=inside, other=0) + place * size
    last = tl.minimum(first + size, tl.load(starts + segment + 1, mask=inside, other=0))
    tl.store(tiles + 3 * tile, tl.where(used, segment, -1), mask=tile < n_tiles)
    tl.store(tiles + 3 * tile + 1, tl.where(used, first, 0), mask=tile < n_tiles)
    tl.store(tiles + 3 * tile + 2, tl.where(used, last, 0), mask=tile < n_tiles)


class Plan:
    """The tokens of a mixed-language batch in the order of their languages.

    B examples of T tokens each are M = B * T rows of an activation [M, width]; S = L + 1 segments hold the tokens of
    the full network (segment 0) and of languages 0 to L - 1 (segments 1 to L). Nothing here waits for the device: sizes
    that depend on the ids are bounds, and what is left over is marked.

    Args:
        language_ids: int64 [B], -1 (the full network) to n_languages - 1. Others are an error that `ok` reports; no
            kernel reads what is not the batch's or the mask's because of it.
        tokens: T, tokens of one example.
        n_languages: L.

    Attributes:
        token_rows: int32 [M]; the row in which each token lies, sorted by segment, in order inside of one.
        starts: int32 [S + 1]; segment s is `token_rows[starts[s]:starts[s + 1]]`.
        present: int32 [min(S, B)]; the segments that have tokens, ascending, then -1.
        ok: int32 []; 1 if every id is in range, else 0.
        sizes: all that the host may look at: M, L, entries of `present`, and the device.

    Raises:
        ValueError: ids that are not on a GPU, without Triton's interpreter.
    """

    def __init__(self, language_ids: Tensor, tokens: int, n_languages: int) -> None:
        check_runnable(language_ids)
        B, device = language_ids.shape[0], language_ids.device
        self.n_rows, self.n_languages, self.n_segments = B * tokens, n_languages, n_languages + 1
        n_present, kind = min(self.n_segments, B), {"dtype": torch.int32, "device": device}
        self.token_rows, self.starts = torch.empty(self.n_rows, **kind), torch.empty(self.n_segments + 1, **kind)
        self.present, self.ok = torch.empty(n_present, **kind), torch.empty((), **kind)
        segments = triton.next_power_of_2(self.n_segments)
        if B > _MANY:
            order = torch.sort(language_ids, stable=True).indices
            self.token_rows.view(B, tokens).copy_(order[:, None] * tokens + torch.arange(tokens, device=device))
        launch(
            plan_kernel, (1 if B > _MANY else B + 1,), language_ids,
            language_ids.contiguous(), self.token_rows, self.starts, self.present, self.ok,
            B, tokens, self.n_segments, n_present,
            SEGMENTS=segments, ROWS=max(1, 2048 // segments), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        self.sizes = (self.n_rows, n_languages, n_present, device)
        self._tiles: dict[int, Tensor] = {}
        self._captured = _capturing(device)

    def n_tiles(self, size: int) -> int:
        """How many rows `tiles(size)` has: an upper bound of the tiles that any ids could need."""
        return self.n_rows // size + self.present.shape[0]

    def tiles(self, size: int) -> Tensor:
        """Pieces of at most `size` tokens of one segment.

        int32 [n_tiles, 3]: the segment, the position in `token_rows` of the first token, and that past the last; tiles
        that the batch does not need are (-1, 0, 0) and come last. Kept for the next caller; but those that the capture
        of a CUDA graph makes of a plan from outside hold nothing before a replay, and are the caller's alone.
        """
        made = self._tiles.get(size)
        if made is None:
            n_tiles, segments = self.n_tiles(size), triton.next_power_of_2(self.n_segments)
            made = torch.empty(n_tiles, 3, dtype=torch.int32, device=self.starts.device)
            if self._captured or not _capturing(made.device):
                self._tiles[size] = made
            block = max(1, 2048 // segments)
            if n_tiles:
                launch(
                    tiles_kernel, (triton.cdiv(n_tiles, block),), made,
                    self.starts, made, self.n_segments, n_tiles, size, SEGMENTS=segments, BLOCK=block, num_warps=4,
                )  # fmt: skip
        return made


def _capturing(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
