"""Parsing whole treebanks: official scores per language, and CoNLL-U files in and out."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastmask.tasks.batching import like_lengths
from fastmask.tasks.data.conllu import Sentence, read_texts, with_tree, write_texts
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.scores import Scores
from fastmask.tasks.parsing.vocabulary import UNKNOWN_UPOS
from fastmask.tasks.parsing.windows import Tree, cut, join, too_long

__all__ = ["encode", "parse", "predict_file", "scores_of"]

CHUNK = 512  # sentences of a file that are in memory at a time


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
        """Take note of the next sentences."""
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


def scores_of(encoded: Encoded, trees: Sequence[Tree]) -> Scores:
    """Official scores of trees for sentences that have their CoNLL-U texts.

    Raises:
        ValueError: they have not, or there is no sentence.
    """
    return encoded.gold.score(_with_trees(encoded.gold.blocks, trees))


def parse(parser: Parser, encoded: Encoded, batch_size: int = 64) -> list[Tree]:
    """Return (heads, labels) of every sentence, in the order of `encoded`, by the subnetwork that `fastmask.language`
    says; batches are made of like lengths, of `batch_size` sentences at most.

    A sentence that is longer than the encoder is parsed in windows; see `fastmask.tasks.parsing.windows`.
    """
    device = next(parser.parameters()).device
    windows, first = cut(parser.features, encoded)
    results: list[Tree | None] = [None] * len(windows)
    for rows in like_lengths(parser.features.positions(windows), batch_size, device):
        batch = parser.features.collate(windows.select(rows)).to(device)
        for row, heads, labels in zip(rows.tolist(), *parser.predict(batch), strict=True):
            results[row] = (heads, labels)
    return join([result for result in results if result is not None], first, parser.vocabulary.loose)


def predict_file(parser: Parser, in_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> int:
    """Parse a CoNLL-U file into another one and return the number of sentences.

    Only HEAD and DEPREL of words change: all else stays byte for byte, line endings and a byte order mark included.
    Every sentence gets a tree with one root, labelled ``root`` as no other word is. A regular file appears under its
    name once it is complete; the input may be of any length, and so may a sentence.

    Args:
        parser: its encoder may be attached.
        in_path: UTF-8 CoNLL-U, a file or ``/dev/stdin``; HEAD and DEPREL may hold anything. The small model reads UPOS,
            and warns where it is missing.
        out_path: where to write; may be `in_path`, a pipe or ``/dev/stdout``.

    Raises:
        ConlluError: the input is not CoNLL-U.
        OSError: the input cannot be read, or the output not written.
    """
    return write_texts(out_path, _predicted(parser, read_texts(in_path, require_tree=False)))


def _predicted(parser: Parser, sentences: Iterator[tuple[Sentence, str]]) -> Iterator[str]:
    """Yield the texts of a stream of sentences with their new trees, a chunk in memory at a time."""
    noticed = _Noticed(parser)
    while chunk := list(itertools.islice(sentences, CHUNK)):
        rows = [vars(sentence) for sentence, _ in chunk]
        encoded = parser.features.encode(rows, parser.vocabulary)
        noticed.look(encoded, rows)
        yield from _with_trees([text for _, text in chunk], parse(parser, encoded))
    noticed.warn(tags=True)


def _with_trees(blocks: Iterable[str], trees: Sequence[Tree]) -> list[str]:
    return [with_tree(block, heads.tolist(), labels) for block, (heads, labels) in zip(blocks, trees, strict=True)]
