"""Memory that products take in turn, and rows of a weight gathered in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_VIEWS = 256  # one for each size that was asked for


class Scratch(threading.local):
    """A buffer that every call takes in turn, one for each thread: fresh memory costs more than what is copied into it.

    The kernel clears each page of it at the first touch, and glibc gives large blocks back as soon as they are free.
    What is kept is as large as the largest live part of one weight.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.views: dict[tuple[int, int, torch.dtype], Tensor] = {}  # making one anew costs several calls

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix of the dtype of `like`; what was taken before is overwritten."""
        if not like.is_cpu:
            return like.new_empty(rows, columns)  # other devices have allocators that keep memory
        key = (rows, columns, like.dtype)
        if key not in self.views:
            size = rows * columns * like.element_size()
            if len(self.memory) < size or len(self.views) >= MOST_VIEWS:
                self.views.clear()
            with torch.inference_mode(False):  # what is made in inference mode could not be written to after it
                if len(self.memory) < size:
                    self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
                self.views[key] = self.memory[:size].view(like.dtype).view(rows, columns)
        return self.views[key]


ROWS, LEFT, PRODUCT = Scratch(), Scratch(), Scratch()


def gather_each(w: Tensor, rows: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """So many `rows` of w [size, S] after the other, in memory that the next call overwrites.

    What is read by columns has no gaps in half precision: oneDNN compiles code for every distance of two rows.
    """
    if w.stride(1) == 1 or w.element_size() > 2:
        return gather(w, rows).split_with_sizes(counts)
    S = w.shape[1]
    parts = ROWS.take(1, len(rows) * S, w)[0].split_with_sizes([n * S for n in counts])
    return [
        torch.gather(w.t(), 1, index.expand(S, -1), out=part.view(S, len(index))).t()
        for index, part in zip(rows.split_with_sizes(counts), parts, strict=True)
    ]


def gather(w: Tensor, index: Tensor | None) -> Tensor:
    """Rows of w [size, S], in memory that the next call overwrites."""
    if index is None:
        return w
    if w.stride(1) == 1:
        return torch.index_select(w, 0, index, out=ROWS.take(index.shape[0], w.shape[1], w))
    out = ROWS.take(w.shape[1], index.shape[0], w)
    return torch.gather(w.t(), 1, index.expand(w.shape[1], -1), out=out).t()
