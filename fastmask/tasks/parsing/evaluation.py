"""Parsing whole treebanks: official scores per language, and CoNLL-U files in and out."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmask.errors import unknown
from fastmask.tasks.data.conllu import Sentence, read_texts, with_tree, write_texts
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.scores import Scores, score
from fastmask.tasks.parsing.vocabulary import UNKNOWN_UPOS
from fastmask.tasks.parsing.windows import Tree, cut, join, too_long

__all__ = ["Evaluation", "Prepared", "evaluate", "parse", "predict_file", "prepare"]

CHUNK = 512  # sentences of a file that are in memory at a time


@dataclass(frozen=True)
class Evaluation:
    """Scores of one language.

    Attributes:
        scores: official scores, percent.
        words_per_second: words per second of encoding, decoding and labelling; reading and scoring not counted.
    """

    scores: Scores
    words_per_second: float

    @property
    def las(self) -> float:
        """Labelled attachment score, percent."""
        return self.scores.las

    @property
    def uas(self) -> float:
        """Unlabelled attachment score, percent."""
        return self.scores.uas


@dataclass(frozen=True)
class Prepared:
    """A data set ready to be parsed many times: its arrays and its original CoNLL-U blocks."""

    encoded: Encoded
    blocks: list[str]


def prepare(parser: Parser, dataset: Iterable[Mapping[str, Any]], limit: int | None = None) -> Prepared:
    """Encode the first `limit` sentences of a data set (all by default); warn of what the parser will do badly."""
    rows = list(itertools.islice(dataset, limit))
    encoded = parser.features.encode(rows, parser.vocabulary)
    noticed = _Noticed(parser)
    noticed.look(encoded, rows)
    noticed.warn()
    return Prepared(encoded, [row["conllu"] for row in rows])


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


def evaluate(
    parser: Parser,
    datasets: Mapping[str, Prepared | Iterable[Mapping[str, Any]]],
    language_ids: Mapping[str, int] | int | None = None,
    batch_size: int = 64,
) -> dict[str, Evaluation]:
    """Parse and score every language's data set with dropout off; touches no random state.

    Args:
        parser: its encoder may be attached.
        datasets: by language; rows with words, upos, heads, deprels and conllu, or what `prepare` made of them.
        language_ids: which subnetwork reads a language: a number per language, one number for all (-1: the full
            network), or None where the encoder is not attached or `fastmask.language` says it.
        batch_size: sentences per batch, alike in length.

    Raises:
        FastmaskKeyError: `language_ids` lacks a language; nothing is parsed.
    """
    results = {}
    if isinstance(language_ids, Mapping):
        for language in datasets:
            if language not in language_ids:
                raise unknown("language", language, language_ids)
    for language, dataset in datasets.items():
        prepared = dataset if isinstance(dataset, Prepared) else prepare(parser, dataset)
        language_id = language_ids[language] if isinstance(language_ids, Mapping) else language_ids
        start = time.perf_counter()
        trees = parse(parser, prepared.encoded, language_id, batch_size)
        seconds = time.perf_counter() - start
        scores = score(prepared.blocks, _with_trees(prepared.blocks, trees))
        results[language] = Evaluation(scores, prepared.encoded.word_start[-1] / max(seconds, 1e-9))
    return results


def parse(parser: Parser, encoded: Encoded, language_id: int | None = None, batch_size: int = 64) -> list[Tree]:
    """Return (heads, labels) of every sentence, in the order of `encoded`; batches are made of like lengths.

    A sentence that is longer than the encoder is parsed in windows; see `fastmask.tasks.parsing.windows`.
    """
    device = next(parser.parameters()).device
    windows, first = cut(parser.features, encoded)
    order = np.argsort(windows.unit_lengths, kind="stable")
    results: list[Tree | None] = [None] * len(windows)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = parser.features.collate(windows.select(rows)).to(device)
        if language_id is not None:
            # On the CPU: there an attached encoder can look at the ids, and the full network (-1) is among them.
            batch.language_ids = torch.full((len(rows),), language_id, dtype=torch.int64)
        for row, heads, labels in zip(rows.tolist(), *parser.predict(batch), strict=True):
            results[row] = (heads, labels)
    return join([result for result in results if result is not None], first, parser.vocabulary.loose)


def predict_file(
    parser: Parser,
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    language: str | None = None,
    batch_size: int = 64,
) -> int:
    """Parse a CoNLL-U file into another one and return the number of sentences.

    Only HEAD and DEPREL of words change: all else stays byte for byte, line endings and a byte order mark included.
    Every sentence gets a tree with one root, labelled ``root`` as no other word is. A regular file appears under its
    name once it is complete; the input may be of any length, and so may a sentence.

    Args:
        parser: its encoder may be attached.
        in_path: UTF-8 CoNLL-U, a file or ``/dev/stdin``; HEAD and DEPREL may hold anything. The small model reads UPOS,
            and warns where it is missing.
        out_path: where to write; may be `in_path`, a pipe or ``/dev/stdout``.
        language: whose subnetwork to use; only where the encoder is attached. None: the full network.
        batch_size: sentences per batch.

    Raises:
        ConlluError: the input is not CoNLL-U.
        OSError: the input cannot be read, or the output not written.
    """
    with _language(parser, language):
        return write_texts(out_path, _predicted(parser, read_texts(in_path, require_tree=False), batch_size))


def _predicted(parser: Parser, sentences: Iterator[tuple[Sentence, str]], batch_size: int) -> Iterator[str]:
    """Yield the texts of a stream of sentences with their new trees, a chunk in memory at a time."""
    noticed = _Noticed(parser)
    while chunk := list(itertools.islice(sentences, CHUNK)):
        rows = [vars(sentence) for sentence, _ in chunk]
        encoded = parser.features.encode(rows, parser.vocabulary)
        noticed.look(encoded, rows)
        yield from _with_trees([text for _, text in chunk], parse(parser, encoded, batch_size=batch_size))
    noticed.warn(tags=True)


def _with_trees(blocks: Sequence[str], trees: Sequence[Tree]) -> list[str]:
    return [with_tree(block, heads.tolist(), labels) for block, (heads, labels) in zip(blocks, trees, strict=True)]


def _language(parser: Parser, language: str | None) -> Any:
    """Return the context in which the encoder runs a language's subnetwork, or the full network."""
    if not parser.is_attached:
        if language is not None:
            raise ValueError(f"language {language!r} was asked for, but the parser has no subnetworks attached")
        return nullcontext()
    import fastmask as fm  # here, because the top of the package imports from below

    return fm.language(parser.encoder, language)
