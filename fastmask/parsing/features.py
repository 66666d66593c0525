"""What the parser knows about a word: hashed character trigrams and UPOS, or the pieces of a Hugging Face tokenizer.

Both featurisers turn sentences into an `Encoded` once (`encode`) and rows of it into a `Batch` (`collate`). Sentences
are mappings with "words", "upos", "heads" and "deprels", as the rows of a treebank have them.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmask.parsing.batch import Batch, Encoded, flat_ranges
from fastmask.parsing.vocabulary import IGNORE, Vocabulary

__all__ = ["Features", "PieceFeatures", "SentenceTooLongError", "TrigramFeatures", "load_features", "trigrams"]


class SentenceTooLongError(ValueError):
    """A sentence has more words than the encoder has positions.

    Attributes:
        index: which sentence of those that were given, from 0.
        words: how many words it has.
        room: how many it may have.
    """

    def __init__(self, index: int, words: int, room: int, name: str = "") -> None:
        """Build the message; `name` is the sentence's id where it is known."""
        called = f" ({name})" if name else ""
        super().__init__(
            f"sentence {index + 1}{called} has {words} words (expected at most {room}, what the model has)"
        )
        self.index, self.words, self.room = index, words, room


class Features(Protocol):
    """What the parser and the training loop need from a featuriser."""

    max_positions: int
    special_positions: int

    def encode(self, sentences: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> Encoded:
        """Return all sentences as integer arrays, in order."""

    def collate(self, part: Encoded) -> Batch:
        """Return the sentences of `part` as one padded batch."""

    def positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [N]: the positions every sentence needs in the encoder."""

    def shorten(self, encoded: Encoded) -> Encoded:
        """Make every sentence fit at prediction, or raise `SentenceTooLongError`."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``features.json`` (and a tokenizer) into an existing folder."""


def trigrams(word: str, buckets: int, whole_word: bool = True) -> list[int]:
    """Return the buckets of the character trigrams of ``^word$``, and of the whole word as one more unit.

    The hash is CRC-32 of the UTF-8 text: the same in every process, unlike Python's own.
    """
    padded = f"^{word}$"
    units = [padded[i : i + 3] for i in range(max(1, len(padded) - 2))]
    if whole_word and len(units) > 1:
        units.append(padded)
    return [zlib.crc32(unit.encode("utf-8", "surrogatepass")) % buckets for unit in units]


def _encode(
    sentences: Iterable[Mapping[str, Any]],
    vocabulary: Vocabulary,
    known: dict[str, np.ndarray],
    units_of: Callable[[list[str]], list[np.ndarray]],
) -> Encoded:
    """Encode sentences; `units_of` gives the units (int32 arrays) of word forms that are not in `known` yet."""
    forms: list[str] = []
    lengths: list[int] = []
    upos, heads, deprels = [], [], []
    for sentence in sentences:
        words = sentence["words"]
        lengths.append(len(words))
        forms.extend(words)
        upos.append(vocabulary.upos_ids(sentence["upos"]))
        head = np.asarray(sentence["heads"], dtype=np.int64)
        heads.append(np.where((head < 0) | (head > len(words)), IGNORE, head))
        deprels.append(vocabulary.deprel_ids(sentence["deprels"]))
    new = [form for form in dict.fromkeys(forms) if form not in known]
    known.update(zip(new, units_of(new), strict=True))
    per_word = [known[form] for form in forms]
    counts = np.fromiter((len(units) for units in per_word), np.int64, len(per_word))

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    return Encoded(
        word_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        unit_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        units=joined(per_word),
        upos=joined(upos),
        heads=joined(heads),
        deprels=joined(deprels),
    )


class TrigramFeatures:
    """Model `small`: hashed character trigrams of every word, its UPOS beside them; nothing to download.

    The encoder sees one position per word and one, the first, for the root.
    """

    special_positions = 1

    def __init__(self, buckets: int = 16384, max_positions: int = 512, whole_word: bool = True) -> None:
        """Set the size of the hash table, the encoder's positions and whether a word also has a unit of its own."""
        if buckets < 1 or max_positions < 2:
            raise ValueError(f"buckets is {buckets} (expected >= 1), max_positions {max_positions} (expected >= 2)")
        self.buckets = buckets
        self.max_positions = max_positions
        self.whole_word = whole_word
        self._words: dict[str, np.ndarray] = {}

    def encode(self, sentences: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> Encoded:
        """Return all sentences as integer arrays, in order."""

        def units_of(words: list[str]) -> list[np.ndarray]:
            return [np.asarray(trigrams(word, self.buckets, self.whole_word), dtype=np.int32) for word in words]

        return _encode(sentences, vocabulary, self._words, units_of)

    def collate(self, part: Encoded) -> Batch:
        """Return a batch whose `units` are flat and whose `places` are the bag offsets of [B * W] words."""
        lengths = part.lengths
        counts = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=np.int64)
        counts[np.repeat(np.arange(len(lengths)), lengths), flat_ranges(np.zeros_like(lengths), lengths)] = np.diff(
            part.unit_start
        )
        offsets = np.cumsum(counts.ravel()) - counts.ravel()
        return Batch.cut(part, part.units, offsets, lengths + 1)

    def positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [N]: words + 1."""
        return encoded.lengths + 1

    def shorten(self, encoded: Encoded) -> Encoded:
        """Return `encoded`; raise `SentenceTooLongError` if a sentence has more words than there are positions."""
        _check_words(encoded, self)
        return encoded

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``features.json``."""
        content = {
            "kind": "trigrams",
            "buckets": self.buckets,
            "max_positions": self.max_positions,
            "whole_word": self.whole_word,
        }
        Path(folder, "features.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


class PieceFeatures:
    """A pretrained model: the pieces of its tokenizer, every word standing where its first piece stands.

    Words are tokenised one by one (`is_split_into_words`), each distinct form once. A word that tokenises to nothing
    (control characters, for one) becomes the unknown piece.
    """

    def __init__(self, tokenizer: Any, max_positions: int = 512) -> None:
        """Take a Hugging Face tokenizer and the number of positions its model has.

        Raises:
            ValueError: the tokenizer gives a word no pieces and has no unknown piece.
        """
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self._words: dict[str, np.ndarray] = {}
        with_special = tokenizer(["a"], is_split_into_words=True)["input_ids"]
        plain = tokenizer(["a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        start = next(i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
        self.prefix = np.asarray(with_special[:start], dtype=np.int64)
        self.suffix = np.asarray(with_special[start + len(plain) :], dtype=np.int64)
        self.special_positions = len(self.prefix) + len(self.suffix)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(self, sentences: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> Encoded:
        """Return all sentences as integer arrays, in order."""
        return _encode(sentences, vocabulary, self._words, self._pieces)

    def _pieces(self, words: list[str]) -> list[np.ndarray]:
        if not words:
            return []
        found = self.tokenizer([[word] for word in words], is_split_into_words=True, add_special_tokens=False)
        pieces = []
        for word, ids in zip(words, found["input_ids"], strict=True):
            if not ids and self.tokenizer.unk_token_id is None:
                raise ValueError(f"the tokenizer gives {word!r} no pieces and has no unknown piece to put in its place")
            pieces.append(np.asarray(ids or [self.tokenizer.unk_token_id], dtype=np.int32))
        return pieces

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

    def positions(self, encoded: Encoded) -> np.ndarray:
        """Return int64 [N]: pieces and special tokens."""
        return encoded.unit_lengths + self.special_positions

    def shorten(self, encoded: Encoded) -> Encoded:
        """Keep only the first piece of every word of a sentence that is too long, with a warning that counts them.

        A word's state is read at its first piece, so every word keeps its place in the tree.

        Raises:
            SentenceTooLongError: even so a sentence has more words than there are positions.
        """
        _check_words(encoded, self)
        long = self.positions(encoded) > self.max_positions
        if not long.any():
            return encoded
        warnings.warn(
            f"{int(long.sum())} sentences have more than {self.max_positions} pieces; "
            "only the first piece of each of their words is read",
            stacklevel=2,
        )
        counts = np.diff(encoded.unit_start)
        counts = np.where(np.repeat(long, encoded.lengths), 1, counts)
        return Encoded(
            word_start=encoded.word_start,
            unit_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            units=encoded.units[flat_ranges(encoded.unit_start[:-1], counts)],
            upos=encoded.upos,
            heads=encoded.heads,
            deprels=encoded.deprels,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``features.json`` and the tokenizer."""
        content = {"kind": "pieces", "max_positions": self.max_positions}
        Path(folder, "features.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        self.tokenizer.save_pretrained(Path(folder, "tokenizer"))


def load_features(folder: str | os.PathLike[str]) -> TrigramFeatures | PieceFeatures:
    """Read what `save` wrote."""
    content = json.loads(Path(folder, "features.json").read_text(encoding="utf-8"))
    kind = content.pop("kind")
    if kind == "trigrams":
        return TrigramFeatures(**content)
    if kind == "pieces":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(Path(folder, "tokenizer"), trust_remote_code=False)
        return PieceFeatures(tokenizer, **content)
    raise ValueError(f"features.json has kind {kind!r} (expected 'trigrams' or 'pieces')")


def _check_words(encoded: Encoded, features: Features) -> None:
    """Raise `SentenceTooLongError` for the first sentence with more words than the encoder has positions for them."""
    room = features.max_positions - features.special_positions
    over = np.flatnonzero(encoded.lengths > room)
    if len(over):
        raise SentenceTooLongError(int(over[0]), int(encoded.lengths[over[0]]), room)
