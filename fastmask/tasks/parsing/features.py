"""What the parser reads: sentences as integer arrays (`Encoded`), batches of them, and two ways to make these of words.

A sentence has words, and a word has units: hashed character trigrams (UPOS beside them), or the pieces of a Hugging
Face tokenizer. Both featurisers turn sentences into an `Encoded` once (`encode`) and rows of it into a `Batch`
(`collate`). Sentences are mappings with "words", "upos", "heads" and "deprels", as the rows of a treebank have them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary, universal
from fastmask.tasks.pretrained import WordPieces

Tree = tuple[np.ndarray, list[str]]  # heads, 0 for the root, and labels


@dataclass(frozen=True)
class EncodedSentence:
    """A sentence of n words, as integer arrays (int64).

    Attributes:
        units: [u], those of all words, one after the other.
        counts: [n], how many of them each word has, at least one.
        upos: [n].
        heads: [n], 0 for the root, i for the i-th word, `IGNORE` where there is none.
        deprels: [n], `IGNORE` where there is none or it was not seen in training.
        relations: object [n], the universal part of every word's relation as the data has it, to score against.
    """

    units: np.ndarray
    counts: np.ndarray
    upos: np.ndarray
    heads: np.ndarray
    deprels: np.ndarray
    relations: np.ndarray

    def part(self, begin: int, end: int) -> EncodedSentence:
        """Words `begin` to `end` by themselves, without heads."""
        first, last = (int(self.counts[:word].sum()) for word in (begin, end))
        own = {name: of[begin:end] for name, of in vars(self).items()}
        none = np.full(end - begin, IGNORE, dtype=np.int64)
        return EncodedSentence(**{**own, "units": self.units[first:last], "heads": none})


class Encoded(list[EncodedSentence]):
    """N sentences."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Words of every sentence, int64 [N]."""
        return np.array([len(sentence.counts) for sentence in self], dtype=np.int64)

    def flat(self, name: str) -> np.ndarray:
        """One of the arrays of all sentences, one after the other."""
        return joined(getattr(sentence, name) for sentence in self)

    @staticmethod
    def join(parts: Sequence[Encoded]) -> Encoded:
        return Encoded(itertools.chain.from_iterable(parts))

    def select(self, rows: np.ndarray) -> Encoded:
        """Return sentences `rows` (int64 [m]), in that order, as a data set of their own."""
        return Encoded(self[row] for row in rows)


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
    def of(part: Encoded, units: torch.Tensor, places: torch.Tensor, unit_lengths: np.ndarray) -> Batch:
        """The sentences of `part` as one batch, their units beside them."""
        return Batch(
            lengths=torch.from_numpy(part.lengths),
            upos=padded([sentence.upos for sentence in part], 0),
            heads=padded([sentence.heads for sentence in part], IGNORE),
            deprels=padded([sentence.deprels for sentence in part], IGNORE),
            units=units,
            places=places,
            unit_lengths=torch.from_numpy(unit_lengths),
            lengths_list=part.lengths.tolist(),
        )


def padded(arrays: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    """The rows of a batch, [B, longest]."""
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    rows = np.full((len(arrays), int(lengths.max(initial=0))), fill, dtype=np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = joined(arrays)
    return torch.from_numpy(rows)


def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """One after the other; int64 where there is none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


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
        rows = list(sentences)
        words = list(dict.fromkeys(word for row in rows for word in row["words"]))
        units = dict(zip(words, self.units_of(words), strict=True))

        def encoded(row: Mapping[str, Any]) -> EncodedSentence:
            own, heads = [units[word] for word in row["words"]], np.asarray(row["heads"], dtype=np.int64)
            return EncodedSentence(
                units=joined(own),
                counts=np.array([len(found) for found in own], dtype=np.int64),
                upos=vocabulary.upos_ids(row["upos"]),
                heads=np.where((heads < 0) | (heads > len(own)), IGNORE, heads),
                deprels=vocabulary.deprel_ids(row["deprels"]),
                relations=np.array([universal(label) for label in row["deprels"]], dtype=object),
            )

        return Encoded(map(encoded, rows))

    def units_of(self, words: list[str]) -> list[np.ndarray]:
        """Return the units of every word, int32, at least one and no more than fit into the encoder."""
        raise NotImplementedError

    def collate(self, part: Encoded) -> Batch:
        """Return the sentences of `part`, each of which fits into the encoder, as one padded batch."""
        raise NotImplementedError

    def word_positions(self, sentence: EncodedSentence) -> np.ndarray:
        """Return int64 [n]: the positions every word of a sentence needs in the encoder."""
        raise NotImplementedError

    def positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [N]: the positions every sentence needs in the encoder."""
        of_words = [int(self.word_positions(sentence).sum()) for sentence in encoded]
        return np.array(of_words, dtype=np.int64) + self.special_positions

    def too_long(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [m]: the sentences that need more positions than the encoder has."""
        return np.flatnonzero(self.positions(encoded) > self.max_positions)

    def unknown(self, encoded: Encoded) -> np.ndarray:
        """Return bool, of every word whether nothing is known of it but that it is there."""
        return np.zeros(int(encoded.lengths.sum()), dtype=bool)


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
        counts = padded([sentence.counts for sentence in part], 0).flatten()
        offsets = counts.cumsum(0) - counts
        return Batch.of(part, torch.from_numpy(part.flat("units")), offsets, part.lengths + 1)

    def word_positions(self, sentence: EncodedSentence) -> np.ndarray:
        return np.ones_like(sentence.counts)


class PieceFeatures(WordPieces, Features):
    """A pretrained model: the pieces of its tokenizer, every word standing where its first piece stands."""

    def collate(self, part: Encoded) -> Batch:
        """Return a batch whose `units` are input ids [B, T] and whose `places` are first pieces [B, W]."""
        ids = [np.concatenate([self.prefix, sentence.units, self.suffix]) for sentence in part]
        first = [len(self.prefix) + np.cumsum(sentence.counts) - sentence.counts for sentence in part]
        return Batch.of(part, padded(ids, self.pad), padded(first, 0), np.array([len(of) for of in ids]))

    def word_positions(self, sentence: EncodedSentence) -> np.ndarray:
        return sentence.counts

    def unknown(self, encoded: Encoded) -> np.ndarray:
        """Return bool, of every word whether all of its pieces are the unknown piece."""
        units, counts = encoded.flat("units"), encoded.flat("counts")
        if not len(units):
            return super().unknown(encoded)
        is_known = units != (-1 if self.tokenizer.unk_token_id is None else self.tokenizer.unk_token_id)
        return ~np.logical_or.reduceat(is_known, np.cumsum(counts) - counts)


# ---- sentences that are longer than the encoder: parsed in windows, whose trees are joined


def cut(features: Features, encoded: Encoded) -> tuple[Encoded, np.ndarray]:
    """Cut sentences that are too long into windows, which follow one another and hold as many words as fit.

    Returns:
        The same words with every window as a sentence, those of a cut sentence without gold heads; and int64 [N + 1]:
        the windows of sentence i are first[i] .. first[i + 1].
    """
    room = features.max_positions - features.special_positions
    windows, first = Encoded(), [0]
    for sentence in encoded:
        ends = np.concatenate([[0], np.cumsum(features.word_positions(sentence))])  # positions up to each word
        cuts = [0]
        while ends[-1] - ends[cuts[-1]] > room:
            cuts.append(int(np.searchsorted(ends, ends[cuts[-1]] + room, side="right")) - 1)
        pairs = itertools.pairwise([*cuts, len(sentence.counts)])
        windows += [sentence] if len(cuts) == 1 else [sentence.part(begin, end) for begin, end in pairs]
        first.append(len(windows))
    return windows, np.array(first)


def join(trees: Sequence[Tree], first: np.ndarray, label: str) -> list[Tree]:
    """Join the trees of the windows of every sentence into one, whose root is that of the first window.

    Args:
        trees: of all windows.
        first: as `cut` returns it.
        label: of the arcs from the first window's root to the roots of the others.
    """
    whole = []
    for begin, end in itertools.pairwise(first.tolist()):
        heads, labels = trees[begin]
        root = int(np.flatnonzero(heads == 0)[0]) + 1 if end > begin + 1 else 0
        for more, names in trees[begin + 1 : end]:
            own = int(np.flatnonzero(more == 0)[0])
            heads = np.concatenate([heads, np.where(more == 0, root, more + len(heads))])
            labels = [*labels, *names[:own], label, *names[own + 1 :]]
        whole.append((heads, labels))
    return whole
