"""Reading, checking and writing CoNLL-U, the ten-column format of Universal Dependencies.

Parsing of ids, numbers and comments is left to the `conllu` package. Lines are walked here because that package
forgets line numbers, splits a FORM at two spaces and fills up missing columns, and a message without a line number
is of no use in a file of 20,000 lines.

Format: https://universaldependencies.org/format.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conllu.exceptions import ParseException
from conllu.parser import parse_comment_line, parse_id_value, parse_int_value

__all__ = ["ConlluError", "Sentence", "read_sentences", "with_tree", "write_blocks"]

COLUMNS = 10
ID, FORM, LEMMA, UPOS, XPOS, FEATS, HEAD, DEPREL, DEPS, MISC = range(COLUMNS)
NO_HEAD = -1


class ConlluError(ValueError):
    """A file that is not the CoNLL-U that was asked for; the message reads ``FILE:LINE: what is wrong (expected)``."""

    def __init__(self, path: str | os.PathLike[str], line: int, problem: str) -> None:
        """Build the message; `line` counts from 1."""
        super().__init__(f"{os.fspath(path)}:{line}: {problem}")


@dataclass(frozen=True)
class Sentence:
    """One sentence: its n syntactic words and the block of text it came from.

    Multiword-token ranges (``3-4``) and empty nodes (``5.1``) are not words; they stay in `conllu`.

    Attributes:
        words: n forms.
        upos: n universal part-of-speech tags, ``_`` where the file has none.
        heads: n numbers: 0 for the root, i for the i-th word (from 1), -1 where the file has ``_``.
        deprels: n relation labels with their subtypes, ``_`` where the file has none.
        sent_id: the ``# sent_id`` comment, or an empty string.
        conllu: comments and token lines joined by newlines, without a trailing newline.
    """

    words: tuple[str, ...]
    upos: tuple[str, ...]
    heads: tuple[int, ...]
    deprels: tuple[str, ...]
    sent_id: str
    conllu: str


def read_sentences(path: str | os.PathLike[str], require_tree: bool = True) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL-U file one by one.

    A byte order mark, Windows line endings, several blank lines and a missing final blank line are accepted.

    Args:
        path: a UTF-8 file.
        require_tree: every sentence must be a tree with one root and a label on every word (training data, gold
            standard). With False, HEAD and DEPREL may be ``_`` and heads need not form a tree (input of a parser).

    Raises:
        ConlluError: the file holds no sentence, is not UTF-8, or breaks the format; raised when the bad sentence is
            reached, so what came before it has been yielded.
        FileNotFoundError: there is no such file.
    """
    block: list[str] = []
    first, number, found = 1, 0, False
    # Binary, so that a byte that is not UTF-8 is reported with its line; text mode would decode in large chunks.
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problem = (
                    f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8 (expected a UTF-8 file)"
                )
                raise ConlluError(path, number, problem) from None
            if line.strip(" "):
                if not block:
                    first = number
                block.append(line)
            elif block:
                yield _sentence(block, path, first, require_tree)
                block, found = [], True
    if block:
        yield _sentence(block, path, first, require_tree)
    elif not found:
        raise ConlluError(path, max(number, 1), "the file is empty (expected at least one sentence)")


def with_tree(conllu_block: str, heads: Sequence[int], deprels: Sequence[str]) -> str:
    """Return the block with columns 7 (HEAD) and 8 (DEPREL) of its n word lines replaced, all else byte for byte.

    Args:
        conllu_block: one sentence, as in `Sentence.conllu`.
        heads: n integers in 0..n, 0 for the root.
        deprels: n labels.

    Raises:
        ValueError: a length differs from the number of words, a head is out of range, or a label is empty or holds
            white space.
    """
    lines = conllu_block.split("\n")
    places = [i for i, line in enumerate(lines) if line.partition("\t")[0].isdecimal()]
    n = len(places)
    if len(heads) != n or len(deprels) != n:
        raise ValueError(
            f"{len(heads)} heads and {len(deprels)} deprels for a sentence of {n} words (expected {n} each)"
        )
    for position, place in enumerate(places):
        head, deprel = int(heads[position]), str(deprels[position])
        if not 0 <= head <= n:
            raise ValueError(f"head {head} of word {position + 1} is out of range (expected 0..{n})")
        if not deprel or any(character.isspace() for character in deprel):
            raise ValueError(f"deprel {deprel!r} of word {position + 1} is empty or holds white space")
        columns = lines[place].split("\t")
        columns[HEAD], columns[DEPREL] = str(head), deprel
        lines[place] = "\t".join(columns)
    return "\n".join(lines)


def write_blocks(path: str | os.PathLike[str], blocks: Iterable[str]) -> int:
    """Write sentences (`Sentence.conllu` or the result of `with_tree`) to a UTF-8 file; return how many.

    The file appears under its name only once it is complete, so a reader never sees half of it.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    count = 0
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for block in blocks:
                file.write(block + "\n\n")
                count += 1
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _sentence(block: list[str], path: str | os.PathLike[str], first: int, require_tree: bool) -> Sentence:
    """Check one block whose first line is line `first` of the file, and return its sentence."""
    words: list[str] = []
    upos: list[str] = []
    heads: list[int] = []
    deprels: list[str] = []
    numbers: list[int] = []  # line number of every word
    sent_id = ""
    range_end, range_line = 0, 0  # last word covered by a multiword token, and that token's line
    empty_node = (0, 0)  # the last empty node, as (word before it, count)
    started = False

    for number, line in enumerate(block, start=first):
        if line.startswith("#"):
            if started:
                raise ConlluError(path, number, "comment inside a sentence (expected a blank line before a new one)")
            sent_id = dict(parse_comment_line(line)).get("sent_id") or sent_id
            continue
        started = True
        columns = line.split("\t")
        if len(columns) != COLUMNS:
            raise ConlluError(path, number, f"{len(columns)} columns (expected {COLUMNS}, separated by tabs)")
        if not columns[FORM].strip():
            raise ConlluError(path, number, "FORM is empty (expected a word form)")

        expected = len(words) + 1
        if columns[ID] != str(expected):
            kind, start, end = _special_id(columns[ID], path, number, expected)
            if kind == "-" and start == expected and start > range_end:
                range_end, range_line = end, number
            elif kind == "." and start == len(words) and end == (empty_node[1] + 1 if empty_node[0] == start else 1):
                empty_node = (start, end)
            else:
                problem = f"ID {columns[ID]!r} is out of sequence (expected word {expected}"
                problem += ")" if kind else ", a range or an empty node)"
                raise ConlluError(path, number, problem)
            continue
        words.append(columns[FORM])
        upos.append(columns[UPOS] or "_")
        heads.append(_head(columns[HEAD], path, number, expected, require_tree))
        if require_tree and columns[DEPREL] in ("", "_"):
            raise ConlluError(path, number, "DEPREL is missing (expected a relation label on every word)")
        deprels.append(columns[DEPREL] or "_")
        numbers.append(number)

    if not words:
        raise ConlluError(path, first, "a sentence without words (expected at least one line with ID 1)")
    if range_end > len(words):
        problem = f"multiword token ends at word {range_end} (expected at most {len(words)}, the last word)"
        raise ConlluError(path, range_line, problem)
    for position, head in enumerate(heads):
        if head > len(words):
            problem = f"HEAD {head} is out of range (expected 0..{len(words)})"
            raise ConlluError(path, numbers[position], problem)
    if require_tree:
        _check_tree(heads, numbers, path)
    return Sentence(tuple(words), tuple(upos), tuple(heads), tuple(deprels), sent_id, "\n".join(block))


def _special_id(text: str, path: str | os.PathLike[str], number: int, expected: int) -> tuple[str, int, int]:
    """Split the id of a range or of an empty node into ("-" or ".", start, end); a plain number gives ("", id, id)."""
    try:
        value = parse_id_value(text)
    except ParseException:
        value = None
    if value is None:
        raise ConlluError(path, number, f"ID {text!r} is not a number, a range or an empty node (expected {expected})")
    if isinstance(value, int):
        return "", value, value
    return value[1], value[0], value[2]


def _head(text: str, path: str | os.PathLike[str], number: int, word: int, required: bool) -> int:
    """Return HEAD as a number that is not negative, or `NO_HEAD` for ``_`` where a head is not required."""
    try:
        head = parse_int_value(text)
    except ParseException:
        raise ConlluError(path, number, f"HEAD {text!r} is not a whole number (expected 0 or a word's ID)") from None
    if head is None:
        if required:
            raise ConlluError(path, number, "HEAD is missing (expected 0 or a word's ID)")
        return NO_HEAD
    if head < 0:
        raise ConlluError(path, number, f"HEAD {head} is out of range (expected 0 or a word's ID)")
    if head == word:
        raise ConlluError(path, number, f"HEAD {head} is the word itself (expected 0 or another word's ID)")
    return head


def _check_tree(heads: list[int], numbers: list[int], path: str | os.PathLike[str]) -> None:
    """Raise unless `heads` has exactly one 0 and every word reaches it."""
    roots = [position for position, head in enumerate(heads) if head == 0]
    if not roots:
        raise ConlluError(path, numbers[0], "no root in the sentence (expected one word with HEAD 0)")
    if len(roots) > 1:
        where = ", ".join(str(position + 1) for position in roots)
        raise ConlluError(path, numbers[roots[1]], f"several roots, words {where} (expected one word with HEAD 0)")
    reaches = [False] * len(heads)
    for start in range(len(heads)):
        walked: list[int] = []
        seen: set[int] = set()
        word = start
        while word >= 0 and not reaches[word]:
            if word in seen:
                cycle = sorted(walked[walked.index(word) :])
                where = ", ".join(str(position + 1) for position in cycle)
                raise ConlluError(path, numbers[cycle[0]], f"cycle through words {where} (expected a tree)")
            seen.add(word)
            walked.append(word)
            word = heads[word] - 1
        for position in walked:
            reaches[position] = True
