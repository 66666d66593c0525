"""Attachment scores by the official scorer of the CoNLL 2018 shared task (`udtools.udeval`).

The scorer matches the characters of two whole files and reports line numbers of their concatenation; here sentences
are compared one by one first, so that a mismatch is reported with its sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO

from udtools.udeval import UDError, evaluate, load_conllu

__all__ = ["Gold", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Attachment scores in percent.

    Attributes:
        las: words with the right head and relation. Subtypes are ignored, as the official scorer does:
            ``acl:relcl`` predicted as ``acl`` is right.
        uas: words with the right head.
        clas: as LAS, over content words only (no function words, no punctuation).
        words: number of gold words.
    """

    las: float
    uas: float
    clas: float
    words: int


class Gold:
    """Gold sentences in the scorer's own form, which takes as long to make as trees take to score.

    Args:
        blocks: CoNLL-U blocks, one sentence each (`Sentence.conllu`).

    Raises:
        ValueError: no sentence.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        if not blocks:
            raise ValueError("no sentences to score")
        self.blocks = blocks
        self._sentences = [_rows(block) for block in blocks]
        self._loaded: object = None

    def score(self, predicted_blocks: Sequence[str]) -> Scores:
        """Score predicted trees, punctuation counted: as many blocks with the same words and tokens in the same order.

        Raises:
            ValueError: different numbers of sentences, a sentence whose words differ, or one that the official scorer
                refuses (several roots, a cycle, a HEAD that is no number); names the sentence, counted from 1.
        """
        if len(self.blocks) != len(predicted_blocks):
            raise ValueError(f"{len(predicted_blocks)} predicted sentences for {len(self.blocks)} gold sentences")
        predicted_sentences = [_rows(block) for block in predicted_blocks]
        for number, (gold, predicted) in enumerate(zip(self._sentences, predicted_sentences, strict=True), start=1):
            if [row[:2] for row in gold] != [row[:2] for row in predicted]:
                _refuse(gold, predicted, _name(number, self.blocks[number - 1]))
        with _deep_recursion(max(len(rows) for rows in self._sentences)):
            if self._loaded is None:
                self._loaded = _load(self._sentences, self.blocks, "gold")
            results = evaluate(self._loaded, _load(predicted_sentences, self.blocks, "predicted"))
        las, uas, clas = (100.0 * results[metric].f1 for metric in ("LAS", "UAS", "CLAS"))
        return Scores(las=las, uas=uas, clas=clas, words=results["Words"].gold_total)


def _rows(block: str) -> list[list[str]]:
    """Return the columns of the word and token lines of a block, without comments and empty nodes."""
    rows = [line.split("\t") for line in block.split("\n") if line and not line.startswith("#")]
    return [row for row in rows if "." not in row[0]]


def _name(number: int, block: str) -> str:
    for line in block.split("\n"):
        if line.startswith("# sent_id"):
            return f"sentence {number} ({line.partition('=')[2].strip()})"
    return f"sentence {number}"


def _refuse(gold: list[list[str]], predicted: list[list[str]], name: str) -> None:
    """Raise ValueError at the first line whose ID or FORM differs."""
    for position in range(max(len(gold), len(predicted))):
        left, right = (
            " ".join(rows[position][:2]) if position < len(rows) else "nothing" for rows in (gold, predicted)
        )
        if left != right:
            raise ValueError(f"{name}: gold has {left!r}, the prediction has {right!r} (expected the same words)")


def _load(sentences: list[list[list[str]]], gold_blocks: Sequence[str], side: str) -> object:
    """Return the scorer's own form of the sentences; raise ValueError naming a sentence that it refuses."""
    try:
        return load_conllu(StringIO("".join(_text(rows) for rows in sentences)), "<memory>", {})
    except (UDError, ValueError, IndexError):
        # Its message counts lines of the whole text, so ask again sentence by sentence.
        for number, rows in enumerate(sentences, start=1):
            try:
                load_conllu(StringIO(_text(rows)), "<memory>", {})
            except (UDError, ValueError, IndexError) as error:
                name = _name(number, gold_blocks[number - 1])
                raise ValueError(f"{side} {name}: the official scorer refuses it: {error}") from error
        raise


def _text(rows: list[list[str]]) -> str:
    """Return one sentence with only the columns that attachment scores read.

    The other columns would be parsed too, and a slip in DEPS would stop the scorer.
    """
    lines = (f"{row[0]}\t{row[1]}\t_\t_\t_\t_\t{row[6]}\t{row[7]}\t_\t_\n" for row in rows)
    return "".join(lines) + "\n"


@contextmanager
def _deep_recursion(words: int) -> Iterator[None]:
    """Allow for the scorer's recursion, which is as deep as the longest chain of heads."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, words + 500))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
