"""Sentences as integer arrays (`Encoded`, once per data set) and as the tensors of one step (`Batch`).

A sentence has words, and a word has units: hashed character trigrams or subword pieces, depending on the featuriser.
Everything is stored flat, one array for the whole data set, so that a batch is cut out with a few numpy calls and no
Python loop over words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastmask.tasks.parsing.vocabulary import IGNORE


def flat_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return int64 [sum(counts)]: starts[0], starts[0]+1, ... (counts[0] numbers), then starts[1], ...

    Args:
        starts: int64 [n].
        counts: int64 [n], not negative.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)


@dataclass(frozen=True)
class Encoded:
    """N sentences with n words and u units in all.

    Attributes:
        word_start: int64 [N + 1], the words of sentence i are word_start[i] .. word_start[i + 1].
        unit_start: int64 [n + 1], the units of word j are unit_start[j] .. unit_start[j + 1]; at least one each.
        units: int32 [u].
        upos: int32 [n].
        heads: int32 [n], 0 for the root, i for the i-th word, `IGNORE` where there is none.
        deprels: int32 [n], `IGNORE` where there is none or it was not seen in training.
        relations: object [n], the universal part of every word's relation as the data has it, to score against.
    """

    word_start: np.ndarray
    unit_start: np.ndarray
    units: np.ndarray
    upos: np.ndarray
    heads: np.ndarray
    deprels: np.ndarray
    relations: np.ndarray

    def __len__(self) -> int:
        return len(self.word_start) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Words of every sentence, int64 [N]."""
        return np.diff(self.word_start)

    @property
    def unit_lengths(self) -> np.ndarray:
        """Units of every sentence, int64 [N]."""
        return np.diff(self.unit_start[self.word_start])

    @staticmethod
    def join(parts: Sequence[Encoded]) -> Encoded:

        def starts(arrays: list[np.ndarray]) -> np.ndarray:
            offsets = np.cumsum([0] + [int(a[-1]) for a in arrays[:-1]])
            shifted = [a[:-1] + offset for a, offset in zip(arrays, offsets, strict=True)]
            return np.concatenate([*shifted, arrays[-1][-1:] + offsets[-1]])

        flat = ("units", "upos", "heads", "deprels", "relations")
        return Encoded(
            word_start=starts([p.word_start for p in parts]),
            unit_start=starts([p.unit_start for p in parts]),
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in flat},
        )

    def select(self, rows: np.ndarray) -> Encoded:
        """Return sentences `rows` (int64 [m]), in that order, as a data set of their own."""
        lengths = self.lengths[rows]
        words = flat_ranges(self.word_start[rows], lengths)
        counts = np.diff(self.unit_start)[words]
        return Encoded(
            word_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            unit_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            units=self.units[flat_ranges(self.unit_start[words], counts)],
            upos=self.upos[words],
            heads=self.heads[words],
            deprels=self.deprels[words],
            relations=self.relations[words],
        )


@dataclass
class Batch:
    """B sentences, padded to W words.

    Attributes:
        lengths: int64 [B], words of every sentence; `lengths_list` is the same on the host.
        upos: int64 [B, W], 0 in the padding.
        heads: int64 [B, W], 0 = root, `IGNORE` in the padding and where unknown.
        deprels: int64 [B, W], `IGNORE` in the padding and where unknown.
        units: trigrams: int64 [u], the units of all words; pieces: int64 [B, T] input ids with special tokens.
        places: trigrams: int64 [B * W], where every word's units begin in `units` (padding: no units);
            pieces: int64 [B, W], position of every word's first piece among the T (padding: 0).
        unit_lengths: int64 [B], positions of every sentence the encoder sees, its root or special tokens included.
        language_ids: int64 [B] into the subnetworks' languages, -1 for the full network, or None.
    """

    lengths: torch.Tensor
    upos: torch.Tensor
    heads: torch.Tensor
    deprels: torch.Tensor
    units: torch.Tensor
    places: torch.Tensor
    unit_lengths: torch.Tensor
    lengths_list: list[int]
    language_ids: torch.Tensor | None = None

    @property
    def n_words(self) -> int:
        """Words of the batch, padding not counted."""
        return sum(self.lengths_list)

    @property
    def word_mask(self) -> torch.Tensor:
        """Which are words and which padding: bool [B, W], True for words."""
        return torch.arange(self.upos.shape[1], device=self.upos.device) < self.lengths[:, None]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {name: of.to(device, non_blocking=True) for name, of in self._tensors().items()}
        return replace(self, **moved)

    def tiled(self, times: int) -> Batch:
        """Return the whole batch `times` times over, [times * B] sentences: first all of them, then all of them again.

        For scoring sentences under several subnetworks at once: `language_ids` are repeated, too, for the caller to
        replace.
        """
        again: dict[str, Any] = {name: of.repeat(times, *[1] * (of.ndim - 1)) for name, of in self._tensors().items()}
        if self.units.ndim == 1:  # flat trigrams: each copy's places point into its own copy of the units
            offsets = torch.arange(times, device=self.places.device) * len(self.units)
            again["places"] += offsets.repeat_interleave(len(self.places))
        return replace(self, **again, lengths_list=self.lengths_list * times)

    @staticmethod
    def cut(part: Encoded, units: np.ndarray, places: np.ndarray, unit_lengths: np.ndarray) -> Batch:
        """Pad the word columns of `part` (the sentences of one batch) and put its units beside them."""
        lengths = part.lengths
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = flat_ranges(np.zeros_like(lengths), lengths)

        def padded(values: np.ndarray, fill: int) -> torch.Tensor:
            out = np.full((len(lengths), int(lengths.max(initial=0))), fill, dtype=np.int64)
            out[rows, columns] = values
            return torch.from_numpy(out)

        return Batch(
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            upos=padded(part.upos, 0),
            heads=padded(part.heads, IGNORE),
            deprels=padded(part.deprels, IGNORE),
            units=torch.from_numpy(units.astype(np.int64)),
            places=torch.from_numpy(places.astype(np.int64)),
            unit_lengths=torch.from_numpy(unit_lengths.astype(np.int64)),
            lengths_list=[int(n) for n in lengths],
        )
