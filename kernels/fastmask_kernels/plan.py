"""`Plan`: a batch sorted by language, on the device and without asking it anything.

Kernels never move activations to sort them. A plan says in which row of the activations each token of a language lies,
and a kernel follows it; results are written to the same rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FULL", "Plan"]

FULL = -1  # the language id of the full, unmasked network


class Plan:
    """The tokens of a mixed-language batch in the order of their languages.

    B examples of T tokens each are M = B * T rows of an activation [M, width]; S = L + 1 segments hold the tokens of
    the full network (segment 0) and of languages 0 to L - 1 (segments 1 to L). Nothing here waits for the device: sizes
    that depend on the ids are bounds, and what is left over is marked.

    Args:
        language_ids: int64 [B], -1 (the full network) to n_languages - 1; others are an error that is not checked here.
        tokens: T, tokens of one example.
        n_languages: L.

    Attributes:
        token_rows: int32 [M]; the row in which each token lies, sorted by segment, in order inside of one.
        starts: int32 [S + 1]; segment s is `token_rows[starts[s]:starts[s + 1]]`.
        present: int32 [min(S, B)]; the segments that have tokens, ascending, then -1.
    """

    def __init__(self, language_ids: Tensor, tokens: int, n_languages: int) -> None:
        B, device = language_ids.shape[0], language_ids.device
        self.n_rows, self.n_languages, self.n_segments = B * tokens, n_languages, n_languages + 1
        sorted_ids, order = torch.sort(language_ids, stable=True)
        inside = torch.arange(tokens, device=device)
        self.token_rows = (order[:, None] * tokens + inside).flatten().to(torch.int32)
        bounds = torch.arange(-1, n_languages + 1, device=device)
        self.starts = (torch.searchsorted(sorted_ids, bounds) * tokens).to(torch.int32)
        has_tokens = self.starts.diff() > 0
        present = torch.sort(has_tokens.to(torch.int8), descending=True, stable=True).indices
        present = torch.where(has_tokens[present], present, -1)
        self.present = present[: min(self.n_segments, B)].to(torch.int32)
        self._tiles: dict[int, Tensor] = {}

    def n_tiles(self, size: int) -> int:
        """How many rows `tiles(size)` has: an upper bound of the tiles that any ids could need."""
        return self.n_rows // size + self.present.shape[0]

    def tiles(self, size: int) -> Tensor:
        """Pieces of at most `size` tokens of one segment.

        int32 [n_tiles, 3]: the segment, the position in `token_rows` of the first token, and that past the last; tiles
        that the batch does not need are (-1, 0, 0) and come last.
        """
        if size not in self._tiles:
            starts = self.starts[:-1]
            needed = (self.starts.diff() + size - 1) // size
            ends = needed.cumsum(0)
            tile = torch.arange(self.n_tiles(size), device=starts.device)
            segment = torch.searchsorted(ends, tile, right=True)
            spare = segment == self.n_segments
            segment = segment.masked_fill(spare, 0)
            first = starts[segment] + (tile - (ends - needed)[segment]) * size
            last = torch.minimum(first + size, self.starts[segment + 1])
            columns = (segment.masked_fill(spare, -1), first.masked_fill(spare, 0), last.masked_fill(spare, 0))
            self._tiles[size] = torch.stack(columns, 1).to(torch.int32)
        return self._tiles[size]
