"""Sentences that are longer than the encoder: parsed in windows, whose trees are joined into one, or left out.

Windows follow one another and hold as many words as fit. The first window's root is that of the sentence; the roots of
the others are attached to it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np

from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.features import Features
from fastmask.tasks.parsing.vocabulary import IGNORE

__all__ = ["Tree", "cut", "join", "rows_that_fit", "too_long"]

Tree = tuple[np.ndarray, list[str]]  # heads, 0 for the root, and labels


def too_long(features: Features, encoded: Encoded, limit: int | None = None) -> np.ndarray:
    """Return int64 [m]: the sentences that need more positions than the encoder has, or than `limit`."""
    room = features.max_positions if limit is None else min(limit, features.max_positions)
    return np.flatnonzero(features.positions(encoded) > room)


def rows_that_fit(
    features: Features, encoded: Encoded, what: str, language: str = "", limit: int | None = None
) -> np.ndarray:
    """Return int64 [m]: the sentences to train on; a warning says how many are too long and left out.

    Args:
        features: of the encoder.
        encoded: N sentences.
        what: they are, for messages: "training sentences".
        language: whose they are, for messages.
        limit: at most so many positions; what the encoder has if None.

    Raises:
        ValueError: there are sentences, and none of them fits.
    """
    long = too_long(features, encoded, limit)
    fits = np.setdiff1d(np.flatnonzero(encoded.lengths > 0), long)
    room = features.max_positions if limit is None else min(limit, features.max_positions)
    whose = f"{language}: " if language else ""
    if len(encoded) and not len(fits):
        raise ValueError(f"{whose}none of the {len(encoded)} {what} fits into {room} positions")
    if len(long):
        warnings.warn(
            f"{whose}{len(long)} of {len(encoded)} {what} are left out: they need more than {room} positions",
            stacklevel=2,
        )
    return fits


def cut(features: Features, encoded: Encoded) -> tuple[Encoded, np.ndarray]:
    """Cut sentences that are too long into windows.

    Returns:
        The same words with every window as a sentence, those of a cut sentence without gold heads; and int64 [N + 1]:
        the windows of sentence i are first[i] .. first[i + 1].
    """
    room = features.max_positions - features.special_positions
    ends = np.concatenate([[0], np.cumsum(features.word_positions(encoded))])  # positions up to each word
    windows = np.ones(len(encoded), dtype=np.int64)
    heads, starts = encoded.heads.copy(), [encoded.word_start]
    for sentence in too_long(features, encoded):
        word, end = (int(place) for place in encoded.word_start[sentence : sentence + 2])
        heads[word:end] = IGNORE
        cuts = []
        while ends[end] - ends[word] > room:
            word = int(np.searchsorted(ends, ends[word] + room, side="right")) - 1
            cuts.append(word)
        windows[sentence] += len(cuts)
        starts.append(np.array(cuts, dtype=np.int64))
    parts = Encoded(
        word_start=np.sort(np.concatenate(starts)),
        unit_start=encoded.unit_start,
        units=encoded.units,
        upos=encoded.upos,
        heads=heads,
        deprels=encoded.deprels,
    )
    return parts, np.concatenate([[0], np.cumsum(windows)])


def join(trees: Sequence[Tree], first: np.ndarray, label: str) -> list[Tree]:
    """Join the trees of the windows of every sentence into one tree with one root.

    Args:
        trees: of all windows.
        first: as `cut` returns it.
        label: of the arcs from the first window's root to the roots of the others.
    """
    joined = []
    for begin, end in itertools.pairwise(first.tolist()):
        heads, labels = trees[begin]
        root = int(np.flatnonzero(heads == 0)[0]) + 1 if end > begin + 1 else 0
        for more, names in trees[begin + 1 : end]:
            own = int(np.flatnonzero(more == 0)[0])
            heads = np.concatenate([heads, np.where(more == 0, root, more + len(heads))])
            labels = [*labels, *names[:own], label, *names[own + 1 :]]
        joined.append((heads, labels))
    return joined
