"""What the parser knows about a word: hashed character trigrams and UPOS, or the pieces of a Hugging Face tokenizer.

Both featurisers turn sentences into an `Encoded` once (`encode`) and rows of it into a `Batch` (`collate`). Sentences
are mappings with "words", "upos", "heads" and "deprels", as the rows of a treebank have them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastmask.tasks.parsing.batch import Batch, Encoded, flat_ranges
from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary, universal
from fastmask.tasks.pretrained import WordPieces


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
