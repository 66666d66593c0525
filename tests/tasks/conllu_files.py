"""CoNLL-U files of every shape, and what must stay the same when they are parsed."""

from __future__ import annotations

import re

from hypothesis import strategies as st

SAFE = st.characters(exclude_characters="\t\n", exclude_categories=["Cs"])
CELL = st.text(SAFE, max_size=4)
ENDINGS = st.sampled_from(["\n", "\r\n"])
BLANKS = st.lists(st.tuples(st.sampled_from(["", " "]), ENDINGS).map("".join), max_size=3)
WORD = re.compile(rb"(\xef\xbb\xbf)?[0-9]+\t")


@st.composite
def sentences(draw: st.DrawFn, trees: bool) -> list[str]:
    """The lines of a sentence, without their endings: comments, tokens, words, empty nodes."""
    lines = [f"# {text}" for text in draw(st.lists(CELL | st.just("sent_id = s"), max_size=2))]
    n = draw(st.integers(1, 4))
    heads = draw(st.permutations(range(n))) if trees else [draw(CELL) for _ in range(n)]
    covered = 0
    for word in range(n + 1):
        cells = [draw(CELL) for _ in range(9)]
        cells[0] = draw(st.text(SAFE, min_size=1, max_size=4))
        if word:
            own = list(cells)
            # A chain in any order is a tree: the head of each word is the one before it in the permutation.
            own[5] = str(heads[word - 1]) if not trees else str(_before(heads, word - 1))
            own[6] = draw(st.sampled_from(["root", "a:b"])) if trees else own[6]
            lines.append("\t".join([str(word), *own]))
        for number in range(draw(st.integers(0, 1))):
            lines.append("\t".join([f"{word}.{number + 1}", *cells]))
        if word < n and word >= covered and draw(st.booleans()):
            covered = draw(st.integers(word + 1, n))
            lines.append("\t".join([f"{word + 1}-{covered}", *cells]))
    return lines


def _before(order: list[int], word: int) -> int:
    place = order.index(word)
    return 0 if place == 0 else order[place - 1] + 1


@st.composite
def files(draw: st.DrawFn, trees: bool = False) -> bytes:
    """The bytes of a file: line endings mixed, blank lines anywhere, perhaps a byte order mark and no end."""
    parts = ["\ufeff" * draw(st.booleans()), *draw(BLANKS)]
    for lines in draw(st.lists(sentences(trees), min_size=1, max_size=3)):
        parts += [line + draw(ENDINGS) for line in lines]
        parts += [draw(ENDINGS), *draw(BLANKS)]
    text = "".join(parts)
    return (text.rstrip("\r\n") if draw(st.booleans()) else text).encode()


def head_and_deprel_away(content: bytes) -> list[bytes]:
    """The lines of a file without the two columns of words that a parser writes."""
    lines = []
    for line in content.split(b"\n"):
        if WORD.match(line):
            columns = line.split(b"\t")
            line = b"\t".join(columns[:6] + columns[8:])
        lines.append(line)
    return lines
