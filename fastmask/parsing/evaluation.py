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
from fastmask.parsing.batch import Encoded
from fastmask.parsing.conllu import Sentence, read_sentences, with_tree, write_blocks
from fastmask.parsing.features import SentenceTooLongError
from fastmask.parsing.parser import Parser
from fastmask.parsing.scores import Scores, score
from fastmask.parsing.vocabulary import UNKNOWN_UPOS

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
    """Encode the first `limit` sentences of a data set (all by default).

    Raises:
        SentenceTooLongError: a sentence has more words than the encoder has positions.
    """
    rows = list(itertools.islice(dataset, limit))
    encoded = parser.features.shorten(parser.features.encode(rows, parser.vocabulary))
    return Prepared(encoded, [row["conllu"] for row in rows])


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
        SentenceTooLongError: a sentence has more words than the encoder has positions.
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


def parse(
    parser: Parser, encoded: Encoded, language_id: int | None = None, batch_size: int = 64
) -> list[tuple[np.ndarray, list[str]]]:
    """Return (heads, labels) of every sentence, in the order of `encoded`; batches are made of like lengths."""
    device = next(parser.parameters()).device
    order = np.argsort(encoded.unit_lengths, kind="stable")
    results: list[tuple[np.ndarray, list[str]] | None] = [None] * len(encoded)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = parser.features.collate(encoded.select(rows)).to(device)
        if language_id is not None:
            # On the CPU: there an attached encoder can look at the ids, and the full network (-1) is among them.
            batch.language_ids = torch.full((len(rows),), language_id, dtype=torch.int64)
        for row, heads, labels in zip(rows.tolist(), *parser.predict(batch), strict=True):
            results[row] = (heads, labels)
    return [result for result in results if result is not None]


def predict_file(
    parser: Parser,
    in_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    language: str | None = None,
    batch_size: int = 64,
) -> int:
    """Parse a CoNLL-U file into another one and return the number of sentences.

    Only HEAD and DEPREL change: comments, multiword tokens, empty nodes and the other columns stay byte for byte. The
    output appears under its name once it is complete; the input may be of any length.

    Args:
        parser: its encoder may be attached.
        in_path: UTF-8 CoNLL-U; HEAD and DEPREL may be ``_``. The small model reads UPOS, and warns where it is missing.
        out_path: where to write; may be `in_path`.
        language: whose subnetwork to use; only where the encoder is attached. None: the full network.
        batch_size: sentences per batch.

    Raises:
        ConlluError: the input is not CoNLL-U.
        SentenceTooLongError: a sentence has more words than the encoder has positions.
    """
    with _language(parser, language):
        return write_blocks(out_path, _predicted(parser, read_sentences(in_path, require_tree=False), batch_size))


def _predicted(parser: Parser, sentences: Iterator[Sentence], batch_size: int) -> Iterator[str]:
    """Yield the parsed blocks of a stream of sentences, a chunk in memory at a time."""
    untagged = done = 0
    while chunk := list(itertools.islice(sentences, CHUNK)):
        rows = [{"words": s.words, "upos": s.upos, "heads": s.heads, "deprels": s.deprels} for s in chunk]
        try:
            encoded = parser.features.shorten(parser.features.encode(rows, parser.vocabulary))
        except SentenceTooLongError as error:
            name = chunk[error.index].sent_id
            raise SentenceTooLongError(done + error.index, error.words, error.room, name) from None
        done += len(chunk)
        untagged += int((encoded.upos == UNKNOWN_UPOS).sum())
        yield from _with_trees([s.conllu for s in chunk], parse(parser, encoded, batch_size=batch_size))
    if untagged and parser.upos is not None:
        message = f"{untagged} words have no UPOS, or one not seen in training; this model leans on it"
        warnings.warn(message, stacklevel=3)


def _with_trees(blocks: Sequence[str], trees: Sequence[tuple[np.ndarray, list[str]]]) -> list[str]:
    return [with_tree(block, heads.tolist(), labels) for block, (heads, labels) in zip(blocks, trees, strict=True)]


def _language(parser: Parser, language: str | None) -> Any:
    """Return the context in which the encoder runs a language's subnetwork, or the full network."""
    if not parser.is_attached:
        if language is not None:
            raise ValueError(f"language {language!r} was asked for, but the parser has no subnetworks attached")
        return nullcontext()
    import fastmask as fm  # here, because the top of the package imports from below

    return fm.language(parser.encoder, language)
