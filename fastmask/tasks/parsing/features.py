"""What the parser reads: sentences as integer arrays (`Encoded`), batches of them, and two ways to make these of words.

A sentence has words, and a word has units: hashed character trigrams (UPOS beside them), or the pieces of a Hugging
Face tokenizer. Both featurisers turn sentences into an `Encoded` once (`encode`) and rows of it into a `Batch`
(`collate`). Sentences are mappings with "words", "upos", "heads" and "deprels", as the rows of a treebank have them.
Everything is stored flat, one array for the whole data set, so that a batch is cut out with a few numpy calls and no
Python loop over words.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary, universal
from fastmask.tasks.pretrained import WordPieces

Tree = tuple[np.ndarray, list[str]]  # heads, 0 for the root, and labels


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


class Features:
    """What the parser and the training loop need from a featuriser.

    Attributes:
        max_positions: positions that the encoder has.
        special_positions: how many of them every sentence needs beside those of its words.
    """

    max_positions: int
    special_positions: int

    def encode(self, sentences: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> Encoded:
        """Return all sentences as integer arrays, in order."""
        forms: list[str] = []
        lengths: list[int] = []
        upos, heads, deprels = [], [], []
        relations: list[str] = []
        for sentence in sentences:
            words = sentence["words"]
            lengths.append(len(words))
            forms.extend(words)
            upos.append(vocabulary.upos_ids(sentence["upos"]))
            head = np.asarray(sentence["heads"], dtype=np.int64)
            heads.append(np.where((head < 0) | (head > len(words)), IGNORE, head))
            deprels.append(vocabulary.deprel_ids(sentence["deprels"]))
            relations.extend(universal(label) for label in sentence["deprels"])
        distinct = list(dict.fromkeys(forms))
        units = dict(zip(distinct, self.units_of(distinct), strict=True))
        per_word = [units[form] for form in forms]
        counts = np.fromiter((len(found) for found in per_word), np.int64, len(per_word))

        def joined(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

        return Encoded(
            word_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            unit_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            units=joined(per_word),
            upos=joined(upos),
            heads=joined(heads),
            deprels=joined(deprels),
            relations=np.array(relations, dtype=object),
        )

    def units_of(self, words: list[str]) -> list[np.ndarray]:
        """Return the units of every word, int32, at least one and no more than fit into the encoder."""
        raise NotImplementedError

    def collate(self, part: Encoded) -> Batch:
        """Return the sentences of `part`, each of which fits into the encoder, as one padded batch."""
        raise NotImplementedError

    def word_positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [n]: the positions every word needs in the encoder."""
        raise NotImplementedError

    def positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [N]: the positions every sentence needs in the encoder."""
        ends = np.concatenate([[0], np.cumsum(self.word_positions(encoded))])
        return np.diff(ends[encoded.word_start]) + self.special_positions

    def too_long(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [m]: the sentences that need more positions than the encoder has."""
        return np.flatnonzero(self.positions(encoded) > self.max_positions)

    def unknown(self, encoded: Encoded) -> np.ndarray:
        """Return bool [n]: words of which nothing is known but that they are there."""
        return np.zeros(int(encoded.word_start[-1]), dtype=bool)


def trigrams(word: str, buckets: int) -> list[int]:
    """Return the buckets of the character trigrams of ``^word$``, and of the whole word as one more unit.

    The hash is CRC-32 of the UTF-8 text: the same in every process, unlike Python's own.
    """
    padded = f"^{word}$"
    units = [padded[i : i + 3] for i in range(max(1, len(padded) - 2))]
    if len(units) > 1:
        units.append(padded)
    return [zlib.crc32(unit.encode("utf-8", "surrogatepass")) % buckets for unit in units]


class TrigramFeatures(Features):
    """Model `small`: hashed character trigrams of every word, its UPOS beside them; nothing to download.

    The encoder sees one position per word and one, the first, for the root.
    """

    special_positions = 1

    def __init__(self, buckets: int = 16384, max_positions: int = 512) -> None:
        if buckets < 1 or max_positions < 2:
            raise ValueError(f"buckets is {buckets} (expected >= 1), max_positions {max_positions} (expected >= 2)")
        self.buckets = buckets
        self.max_positions = max_positions

    def units_of(self, words: list[str]) -> list[np.ndarray]:
        return [np.asarray(trigrams(word, self.buckets), dtype=np.int32) for word in words]

    def collate(self, part: Encoded) -> Batch:
        """Return a batch whose `units` are flat and whose `places` are the bag offsets of [B * W] words."""
        lengths = part.lengths
        counts = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        counts[np.repeat(np.arange(len(lengths)), lengths), flat_ranges(np.zeros_like(lengths), lengths)] = np.diff(
            part.unit_start
        )
        offsets = np.cumsum(counts.ravel()) - counts.ravel()
        return Batch.cut(part, part.units, offsets, lengths + 1)

    def word_positions(self, encoded: Encoded) -> np.ndarray:
        return np.ones(int(encoded.word_start[-1]), dtype=np.int64)


class PieceFeatures(WordPieces, Features):
    """A pretrained model: the pieces of its tokenizer, every word standing where its first piece stands."""

    def collate(self, part: Encoded) -> Batch:
        """Return a batch whose `units` are input ids [B, T] and whose `places` are first pieces [B, W]."""
        lengths, unit_lengths = part.lengths, part.unit_lengths
        B, before = len(lengths), len(self.prefix)
        total = unit_lengths + self.special_positions
        ids = np.full((B, int(total.max(initial=0))), self.pad, dtype=np.int64)
        ids[:, :before] = self.prefix
        rows = np.repeat(np.arange(B), unit_lengths)
        ids[rows, flat_ranges(np.full(B, before), unit_lengths)] = part.units
        for i, piece in enumerate(self.suffix):
            ids[np.arange(B), before + unit_lengths + i] = piece
        first = np.zeros((B, int(lengths.max(initial=0))), dtype=np.int64)
        word_rows = np.repeat(np.arange(B), lengths)
        sentence_start = part.unit_start[part.word_start[:-1]]
        first[word_rows, flat_ranges(np.zeros_like(lengths), lengths)] = (
            part.unit_start[:-1] - sentence_start[word_rows] + before
        )
        return Batch.cut(part, ids, first, total)

    def word_positions(self, encoded: Encoded) -> np.ndarray:
        return np.diff(encoded.unit_start)

    def unknown(self, encoded: Encoded) -> np.ndarray:
        """Return bool [n]: words all of whose pieces are the unknown piece."""
        if not len(encoded.units):
            return super().unknown(encoded)
        is_known = encoded.units != (-1 if self.tokenizer.unk_token_id is None else self.tokenizer.unk_token_id)
        return ~np.logical_or.reduceat(is_known, encoded.unit_start[:-1])


# ---- sentences that are longer than the encoder: parsed in windows, whose trees are joined


def cut(features: Features, encoded: Encoded) -> tuple[Encoded, np.ndarray]:
    """Cut sentences that are too long into windows, which follow one another and hold as many words as fit.

    Returns:
        The same words with every window as a sentence, those of a cut sentence without gold heads; and int64 [N + 1]:
        the windows of sentence i are first[i] .. first[i + 1].
    """
    room = features.max_positions - features.special_positions
    ends = np.concatenate([[0], np.cumsum(features.word_positions(encoded))])  # positions up to each word
    windows = np.ones(len(encoded), dtype=np.int64)
    heads, starts = encoded.heads.copy(), [encoded.word_start]
    for sentence in features.too_long(encoded):
        word, end = (int(place) for place in encoded.word_start[sentence : sentence + 2])
        heads[word:end] = IGNORE
        cuts = []
        while ends[end] - ends[word] > room:
            word = int(np.searchsorted(ends, ends[word] + room, side="right")) - 1
            cuts.append(word)
        windows[sentence] += len(cuts)
        starts.append(np.array(cuts, dtype=np.int64))
    parts = replace(encoded, word_start=np.sort(np.concatenate(starts)), heads=heads)
    return parts, np.concatenate([[0], np.cumsum(windows)])


def join(trees: Sequence[Tree], first: np.ndarray, label: str) -> list[Tree]:
    """Join the trees of the windows of every sentence into one, whose root is that of the first window.

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
