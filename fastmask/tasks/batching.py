"""Batches for predicting: of like lengths, cut where padding would cost more than one more batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["like_lengths"]

# Positions with which a batch keeps the device busy; and how much of a larger one may be padding.
ENOUGH = {"cpu": 256, "gpu": 8192}
PADDING = 0.1


def like_lengths(lengths: np.ndarray, most: int, device: torch.device) -> Iterator[np.ndarray]:
    """Rows of each batch, int64, from short examples to long ones.

    A hundred sentences of a treebank in batches of 64 are two fifths padding, which is computed like words.

    Args:
        lengths: positions of each example, int [n].
        most: examples of a batch, at most.
        device: where they are computed: a GPU wants larger batches, and minds padding less than launches.
    """
    enough = ENOUGH["cpu" if device.type == "cpu" else "gpu"]
    order = np.argsort(lengths, kind="stable")
    begin = positions = 0
    for end, row in enumerate(order.tolist()):
        size, longest = end - begin, int(lengths[row])
        padded = (size + 1) * longest
        wasteful = positions >= enough and padded > (positions + longest) / (1 - PADDING)
        if size and (size == most or wasteful):
            yield order[begin:end]
            begin, positions = end, 0
        positions += longest
    if len(order):
        yield order[begin:]
