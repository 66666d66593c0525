"""Parsing whole treebanks: the trees of a data set, and CoNLL-U files in and out."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastmask.files import StrPath
from fastmask.tasks.data.conllu import DEPREL, HEAD, Sentence
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.features import Features
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.vocabulary import IGNORE, UNKNOWN_UPOS
from fastmask.tasks.predicting import like_lengths, predicted_sentences

Tree = tuple[np.ndarray, list[str]]  # heads, 0 for the root, and labels


def encode(parser: Parser, rows: Iterable[Mapping[str, Any]]) -> Encoded:
    """Sentences to parse and score; a warning says what the parser will do badly with."""
    rows = list(rows)
    encoded = parser.features.encode(rows, parser.vocabulary)
    noticed = _Noticed(parser)
    noticed.look(encoded, rows)
    noticed.warn()
    return encoded


class _Noticed:
    """What is noticed about sentences, of which a data set or a file has many, and said once."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.sentences = self.words = self.long = self.unknown = self.untagged = 0
        self.longest = ""  # not the longest one, but the first that is too long

    def look(self, encoded: Encoded, rows: Sequence[Mapping[str, Any]]) -> None:
        long = too_long(self.parser.features, encoded)
        if len(long) and not self.long:
            row = int(long[0])
            name = str(rows[row].get("sent_id") or "")
            called = f" ({name if name.isprintable() else repr(name)})" if name else ""
            self.longest = f"sentence {self.sentences + row + 1}{called} with {int(encoded.lengths[row])} words"
        self.long += len(long)
        self.sentences += len(encoded)
        self.words += int(encoded.word_start[-1])
        self.unknown += int(self.parser.features.unknown(encoded).sum())
        self.untagged += int((encoded.upos == UNKNOWN_UPOS).sum())

    def warn(self, tags: bool = False) -> None:
        """Say it; of missing tags only where asked: a language's test set may well have a tag that is new."""
        if self.long:
            warnings.warn(
                f"{self.long} of {self.sentences} sentences do not fit into the encoder's "
                f"{self.parser.features.max_positions} positions and are parsed in parts; the first is {self.longest}",
                stacklevel=3,
            )
        if self.unknown > self.words / 2:
            warnings.warn(
                f"{self.unknown} of {self.words} words are unknown to the model's tokenizer: it reads nothing of them",
                stacklevel=3,
            )
        if tags and self.untagged and self.parser.upos is not None:
            warnings.warn(
                f"{self.untagged} words have no UPOS, or one not seen in training; this model leans on it", stacklevel=3
            )


def parse(parser: Parser, encoded: Encoded, batch_size: int = 64) -> list[Tree]:
    """Return (heads, labels) of every sentence, in the order of `encoded`, by the subnetwork that `fastmask.language`
    says; batches are made of like lengths, of `batch_size` sentences at most.

    A sentence that is longer than the encoder is parsed in windows; see `cut`.
    """
    device = next(parser.parameters()).device
    windows, first = cut(parser.features, encoded)
    results: list[Tree | None] = [None] * len(windows)
    for rows in like_lengths(parser.features.positions(windows), batch_size, device):
        batch = parser.features.collate(windows.select(rows)).to(device)
        for row, heads, labels in zip(rows.tolist(), *parser.predict(batch), strict=True):
            results[row] = (heads, labels)
    return join([result for result in results if result is not None], first, parser.vocabulary.loose)


def predict_file(parser: Parser, in_path: StrPath, out_path: StrPath) -> int:
    """Parse a CoNLL-U file into another one and return the number of sentences; see `predicted_sentences`.

    Only HEAD and DEPREL of words change. Every sentence gets a tree with one root, labelled ``root`` as no other word
    is. The small model reads UPOS, and warns where it is missing.
    """
    noticed = _Noticed(parser)

    def trees(sentences: list[Sentence]) -> Iterator[dict[int, Sequence[str]]]:
        rows = [vars(sentence) for sentence in sentences]
        encoded = parser.features.encode(rows, parser.vocabulary)
        noticed.look(encoded, rows)
        for heads, labels in parse(parser, encoded):
            yield {HEAD: [str(head) for head in heads.tolist()], DEPREL: labels}

    count = predicted_sentences(in_path, out_path, trees)
    noticed.warn(tags=True)
    return count


# ---- sentences that are longer than the encoder: left out of training, and parsed in windows whose trees are joined


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
    """Cut sentences that are too long into windows, which follow one another and hold as many words as fit.

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
        relations=encoded.relations,
    )
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
