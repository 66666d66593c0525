"""Reading, checking and writing CoNLL-U, the ten-column format of Universal Dependencies.

Parsing of ids, numbers and comments is left to the `conllu` package. Lines are walked here because that package
forgets line numbers, splits a FORM at two spaces and fills up missing columns, and a message without a line number
is of no use in a file of 20,000 lines.

Format: https://universaldependencies.org/format.html
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conllu.exceptions import ParseException
from conllu.parser import parse_comment_line, parse_id_value

from fastmask.files import STDOUT, StrPath, replace_file

NAMES = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
ID, FORM, LEMMA, UPOS, XPOS, FEATS, HEAD, DEPREL, DEPS, MISC = range(len(NAMES))
NO_HEAD = -1

_BOM = "\ufeff"
_WORD_LINE = re.compile(_BOM + "?[1-9][0-9]*\t")
_HEAD = re.compile("0|[1-9][0-9]{0,8}")


class ConlluError(ValueError):
    """A file that is not the CoNLL-U that was asked for; the message reads ``FILE:LINE: what is wrong (expected)``."""

    def __init__(self, path: StrPath, line: int, problem: str) -> None:
        """Build the message, of a bounded length; `line` counts from 1."""
        if len(problem) > 300:
            problem = f"{problem[:200]} ... {problem[-90:]}"
        super().__init__(f"{os.fspath(path)}:{line}: {problem}")


@dataclass(frozen=True)
class Sentence:
    """One sentence: its n syntactic words.

    Multiword-token ranges (``3-4``) and empty nodes (``5.1``) are not words; they are in the text (`read_texts`).

    Attributes:
        words: n forms.
        upos: n universal part-of-speech tags, ``_`` where the file has none.
        heads: n numbers: 0 for the root, i for the i-th word (from 1), -1 where the file has no usable one.
        deprels: n relation labels with their subtypes, ``_`` where the file has none.
        sent_id: the ``# sent_id`` comment, or an empty string.
    """

    words: tuple[str, ...]
    upos: tuple[str, ...]
    heads: tuple[int, ...]
    deprels: tuple[str, ...]
    sent_id: str


def read_sentences(path: StrPath, require_tree: bool = True) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL-U file one by one.

    A byte order mark, Windows line endings, several blank lines and a missing final blank line are accepted.

    Args:
        path: a UTF-8 file, a pipe, or ``/dev/stdin``.
        require_tree: every sentence must be a tree with one root and a label on every word (training data, gold
            standard). With False, HEAD and DEPREL may hold anything (input of a parser, which overwrites them).

    Raises:
        ConlluError: the file holds no sentence, is not UTF-8, or breaks the format; raised when the bad sentence is
            reached.
        FileNotFoundError: there is no such file.
    """
    for sentence, _ in read_texts(path, require_tree):
        yield sentence


def read_texts(path: StrPath, require_tree: bool = True) -> Iterator[tuple[Sentence, str]]:
    """Yield every sentence with its text as it stands in the file; see `read_sentences`.

    The texts hold line endings, blank lines and the byte order mark, too: joined, they are the file.
    """
    lines: list[str] = []  # of the sentence, without their endings
    text: list[str] = []  # the same and the blank lines around them, as they stand in the file
    first, number, ended = 1, 0, False
    # Binary, so that a byte that is not UTF-8 is reported with its line; text mode would decode in large chunks.
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                whole = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if number == 1 and raw.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):
                    raise ConlluError(path, number, "the file is compressed (expected text: unpack it)") from None
                problem = f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8"
                raise ConlluError(path, number, f"{problem} (expected a UTF-8 file)") from None
            line = whole.removesuffix("\n").removesuffix("\r")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip(" "):
                if ended:
                    yield _sentence(lines, path, first, require_tree), "".join(text)
                    lines, text, ended = [], [], False
                if not lines:
                    first = number
                lines.append(line)
            else:
                ended = bool(lines)
            text.append(whole)
    if not lines:
        raise ConlluError(path, max(number, 1), "the file is empty (expected at least one sentence)")
    yield _sentence(lines, path, first, require_tree), "".join(text)


def with_columns(block: str, columns: Mapping[int, Sequence[str]]) -> str:
    """Return the block with some columns of its n word lines replaced, all else byte for byte.

    Args:
        block: the text of one sentence, as from `read_texts`.
        columns: which column (`UPOS`, `HEAD`, `DEPREL`, ...) -> its n values.

    Raises:
        ValueError: another number of values, one that is empty or holds white space, or a head that is not 0..n.
    """
    lines = block.split("\n")
    places = [i for i, line in enumerate(lines) if _WORD_LINE.match(line)]
    heads = {str(head) for head in range(len(places) + 1)}
    for column, values in columns.items():
        name = NAMES[column]
        if len(values) != len(places):
            raise ValueError(
                f"{len(values)} values of {name} for a sentence of {len(places)} words (expected {len(places)})"
            )
        for word, (place, value) in enumerate(zip(places, values, strict=True), start=1):
            if not value or any(character.isspace() for character in value):
                raise ValueError(f"{name} {value!r} of word {word} is empty or holds white space")
            if column == HEAD and value not in heads:
                raise ValueError(f"head {value} of word {word} is out of range (expected 0..{len(places)})")
            cells = lines[place].split("\t")
            cells[column] = value
            lines[place] = "\t".join(cells)
    return "\n".join(lines)


def write_texts(path: StrPath, texts: Iterable[str]) -> int:
    """Write the texts of sentences (see `read_texts`) to a UTF-8 file as they are; return how many.

    A file appears under its name only once it is complete, so a reader never sees half of it; ``/dev/stdout`` gets the
    texts as they come.
    """
    count = 0

    def write(target: Path | int) -> None:
        nonlocal count
        with open(target, "wb", closefd=not isinstance(target, int)) as file:
            for text in texts:
                file.write(text.encode())
                count += 1

    if os.fspath(path) == STDOUT:
        write(1)
    else:
        replace_file(path, write)
    return count


def _sentence(block: list[str], path: StrPath, first: int, require_tree: bool) -> Sentence:
    """Check one block whose first line is line `first` of the file, and return its sentence."""
    words: list[str] = []
    upos: list[str] = []
    given: list[str] = []  # HEAD of every word
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
        if len(columns) != len(NAMES):
            raise ConlluError(path, number, f"{len(columns)} columns (expected {len(NAMES)}, separated by tabs)")
        if not columns[FORM]:
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
        deprels.append(columns[DEPREL] or "_")
        numbers.append(number)
        given.append(columns[HEAD])

    if not words:
        raise ConlluError(path, first, "a sentence without words (expected at least one line with ID 1)")
    if range_end > len(words):
        problem = f"multiword token ends at word {range_end} (expected at most {len(words)}, the last word)"
        raise ConlluError(path, range_line, problem)
    heads = [_head(text, word, len(words)) for word, text in enumerate(given, start=1)]
    if require_tree:
        for head, text, label, number in zip(heads, given, deprels, numbers, strict=True):
            if head == NO_HEAD:
                raise ConlluError(path, number, _bad_head(text, len(words)))
            if label.partition(":")[0] in ("", "_"):
                raise ConlluError(path, number, "DEPREL is missing (expected a relation label on every word)")
            if any(character.isspace() for character in label):
                raise ConlluError(path, number, f"DEPREL {label!r} holds white space (expected a relation label)")
        _check_tree(heads, numbers, path)
    return Sentence(tuple(words), tuple(upos), tuple(heads), tuple(deprels), sent_id)


def _special_id(text: str, path: StrPath, number: int, expected: int) -> tuple[str, int, int]:
    """Split the id of a range or of an empty node into ("-" or ".", start, end); a plain number gives ("", id, id)."""
    try:
        value = parse_id_value(text)
    except (ParseException, ValueError):  # ValueError: thousands of digits
        value = None
    if value is None:
        raise ConlluError(path, number, f"ID {text!r} is not a number, a range or an empty node (expected {expected})")
    if isinstance(value, int):
        return "", value, value
    return value[1], value[0], value[2]


def _head(text: str, word: int, words: int) -> int:
    """Return the HEAD of the `word`-th of `words` words as a number, or `NO_HEAD` if no tree can have it."""
    head = int(text) if _HEAD.fullmatch(text) else NO_HEAD
    return NO_HEAD if head > words or head == word else head


def _bad_head(text: str, words: int) -> str:
    if text in ("", "_"):
        return "HEAD is missing (expected 0 or a word's ID)"
    if not re.fullmatch("0|-?[1-9][0-9]*", text):
        return f"HEAD {text!r} is not a whole number (expected 0 or a word's ID)"
    if _HEAD.fullmatch(text) and int(text) <= words:
        return f"HEAD {text} is the word itself (expected 0 or another word's ID)"
    return f"HEAD {text} is out of range (expected 0..{words})"


def _check_tree(heads: list[int], numbers: list[int], path: StrPath) -> None:
    """Raise unless `heads` has exactly one 0 and every word reaches it."""
    roots = [position for position, head in enumerate(heads) if head == 0]
    if not roots:
        raise ConlluError(path, numbers[0], "no root in the sentence (expected one word with HEAD 0)")
    if len(roots) > 1:
        where = ", ".join(str(position + 1) for position in roots)
        raise ConlluError(path, numbers[roots[1]], f"several roots, words {where} (expected one word with HEAD 0)")
    reaches = {0}
    for start in range(1, len(heads) + 1):
        walked: dict[int, None] = {}  # in order
        word = start
        while word not in reaches and word not in walked:
            walked[word] = None
            word = heads[word - 1]
        if word in walked:
            cycle = sorted(itertools.dropwhile(word.__ne__, walked))
            where = ", ".join(map(str, cycle))
            raise ConlluError(path, numbers[cycle[0] - 1], f"cycle through words {where} (expected a tree)")
        reaches.update(walked)
