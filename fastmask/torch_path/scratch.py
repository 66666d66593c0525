"""Memory that outlives a call, for what a call gathers and multiplies on its way."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

__all__ = ["Scratch"]

MOST_VIEWS = 256  # one for each size that was asked for


class Scratch(threading.local):
    """A buffer that every call takes in turn, one for each thread: fresh memory costs more than what is copied into it.

    The kernel clears each page of it at the first touch, and glibc gives large blocks back as soon as they are free.
    What is kept is as large as the largest live part of one weight.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.views: dict[tuple[int, int, torch.dtype], Tensor] = {}  # making one anew costs several calls

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix of the dtype of `like`; what was taken before is overwritten."""
        if not like.is_cpu:
            return like.new_empty(rows, columns)  # other devices have allocators that keep memory
        key = (rows, columns, like.dtype)
        view = self.views.get(key)
        if view is None:
            size = rows * columns * like.element_size()
            if len(self.memory) < size or len(self.views) >= MOST_VIEWS:
                self.views.clear()
            if len(self.memory) < size:
                self.memory = torch.empty(size, dtype=torch.uint8)
            view = self.views[key] = self.memory[:size].view(like.dtype).view(rows, columns)
        return view
