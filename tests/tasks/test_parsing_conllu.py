"""Reading and writing CoNLL-U: wrong files must be refused at the right line, right ones come back unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conllu_files import files, head_and_deprel_away
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_parser import small_parser

from fastmask.tasks.data.conllu import (
    DEPREL,
    HEAD,
    ConlluError,
    Sentence,
    read_sentences,
    read_texts,
    with_columns,
    write_texts,
)
from fastmask.tasks.parsing.features import TrigramFeatures
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import Vocabulary

PARSER = small_parser()


def row(identifier: object, head: object = 0, form: str = "w", deprel: str = "dep", upos: str = "NOUN") -> str:
    return f"{identifier}\t{form}\tl\t{upos}\tx\tf=1\t{head}\t{deprel}\t_\tm=1"


GOOD = "\n".join(
    [
        "# newdoc",
        "# sent_id = s-1",
        "# text = dámelo ya",
        row("1-3", "_", "dámelo", "_", "_"),
        row(1, 0, "da", "root", "VERB"),
        row(2, 1, "me", "iobj", "PRON"),
        row(3, 1, "lo", "obj:x", "PRON"),
        "3.1\te\t_\tVERB\t_\t_\t_\t_\t1:conj\t_",
        "3.2\te\t_\tVERB\t_\t_\t_\t_\t1:conj\t_",
        row(4, 1, "ya  no", "advmod", "_"),
    ]
)


@pytest.fixture
def read(tmp_path: Path):
    def read_text(text: str | bytes, require_tree: bool = True) -> list[Sentence]:
        path = tmp_path / "f.conllu"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(read_sentences(path, require_tree))

    return read_text


def test_words_are_the_syntactic_words_only(read) -> None:
    """Multiword tokens and empty nodes are not words."""
    (sentence,) = read(GOOD + "\n\n")
    assert sentence.words == ("da", "me", "lo", "ya  no")
    assert sentence.upos == ("VERB", "PRON", "PRON", "_")
    assert sentence.heads == (0, 1, 1, 1)
    assert sentence.deprels == ("root", "iobj", "obj:x", "advmod")
    assert sentence.sent_id == "s-1"


@pytest.mark.parametrize(
    "text",
    [GOOD, GOOD + "\n", "\n\n" + GOOD + "\n\n\n\n", "\ufeff" + GOOD + "\n\n", GOOD.replace("\n", "\r\n") + "\r\n\r\n"],
    ids=["no-newline", "no-blank-line", "many-blank-lines", "bom", "crlf"],
)
def test_harmless_variants_read_the_same(read, text: str) -> None:
    """Files written on another system or by another tool are read alike."""
    assert read(text) == read(GOOD + "\n\n")


def test_sentences_stream(tmp_path: Path) -> None:
    """The first sentence is returned before the rest of the file is read."""
    path = tmp_path / "f.conllu"
    path.write_text(f"{row(1)}\n\n{row(2)}\n\n")
    sentences = read_sentences(path)
    assert next(sentences).words == ("w",)
    with pytest.raises(ConlluError):
        next(sentences)


FIRST = f"# one\n{row(1)}\n\n"  # three lines of a good sentence before every bad one

BAD = {
    "columns": (4, "1\tw\tl", "3 columns"),
    "spaces-for-tabs": (4, row(1).replace("\t", "  "), "1 columns"),
    "id-word": (4, row("one"), "ID 'one' is not a number"),
    "id-huge": (4, row("9" * 5000), "is not a number"),
    "id-empty": (4, row(""), "ID '' is not a number"),
    "id-skipped": (5, f"{row(1)}\n{row(3, 1)}", "ID '3' is out of sequence (expected word 2"),
    "id-repeated": (5, f"{row(1)}\n{row(1)}", "out of sequence"),
    "id-zero": (4, row(0), "out of sequence"),
    "range-late": (5, f"{row(1)}\n{row('1-2')}\n{row(2, 1)}", "ID '1-2' is out of sequence"),
    "range-backwards": (4, f"{row('2-1')}\n{row(1)}", "ID '2-1' is not a number"),
    "range-overlaps": (6, f"{row('1-2')}\n{row(1)}\n{row('2-3')}\n{row(2, 1)}\n{row(3, 1)}", "out of sequence"),
    "range-too-long": (4, f"{row('1-3')}\n{row(1)}\n{row(2, 1)}", "multiword token ends at word 3"),
    "empty-node-early": (4, f"{row('1.1')}\n{row(1)}", "ID '1.1' is out of sequence"),
    "empty-node-skipped": (5, f"{row(1)}\n{row('1.2')}", "ID '1.2' is out of sequence"),
    "form-empty": (4, row(1, form=""), "FORM is empty"),
    "comment-inside": (5, f"{row(1)}\n# text = b\n{row(1)}", "comment inside a sentence"),
    "comments-only": (4, "# text = b\n# nothing", "a sentence without words"),
}
BAD_TREES = {
    "head-missing": (4, row(1, "_"), "HEAD is missing"),
    "head-empty": (4, row(1, ""), "HEAD is missing"),
    "head-word": (4, row(1, "root"), "HEAD 'root' is not a whole number"),
    "head-fraction": (4, row(1, "0.0"), "HEAD '0.0' is not a whole number"),
    "head-zeros": (4, row(1, "00"), "HEAD '00' is not a whole number"),
    "head-digits": (4, row(1, "\u0661"), "HEAD '\u0661' is not a whole number"),
    "head-huge": (4, row(1, "9" * 5000), "HEAD 999"),
    "head-negative": (4, row(1, -1), "HEAD -1 is out of range"),
    "head-large": (5, f"{row(1)}\n{row(2, 3)}", "HEAD 3 is out of range (expected 0..2)"),
    "head-self": (5, f"{row(1)}\n{row(2, 2)}", "HEAD 2 is the word itself"),
    "deprel-missing": (4, row(1, deprel="_"), "DEPREL is missing"),
    "deprel-empty": (4, row(1, deprel=""), "DEPREL is missing"),
    "deprel-subtype-only": (4, row(1, deprel=":pass"), "DEPREL is missing"),
    "deprel-space": (4, row(1, deprel="a b"), "DEPREL 'a b' holds white space"),
    "deprel-line-separator": (4, row(1, deprel="a\u2028"), "DEPREL 'a\\u2028' holds white space"),
    "no-root": (4, f"{row(1, 2)}\n{row(2, 1)}", "no root"),
    "two-roots": (5, f"{row(1)}\n{row(2)}", "several roots, words 1, 2"),
    "cycle": (5, f"{row(1)}\n{row(2, 3)}\n{row(3, 2)}\n{row(4, 3)}", "cycle through words 2, 3"),
}


@pytest.mark.parametrize(("line", "text", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("require_tree", [True, False], ids=["tree", "no-tree"])
def test_malformed_files_are_refused_at_their_line(
    read, line: int, text: str, message: str, require_tree: bool
) -> None:
    """A malformed file is refused, and the error names the line."""
    with pytest.raises(ConlluError) as error:
        read(f"{FIRST}{text}\n\n", require_tree)
    assert f"f.conllu:{line}: " in str(error.value)
    assert message in str(error.value)
    assert "(expected" in str(error.value)


@pytest.mark.parametrize(("line", "text", "message"), BAD_TREES.values(), ids=BAD_TREES.keys())
def test_only_training_data_must_be_trees(read, line: int, text: str, message: str) -> None:
    """Training data that is no tree is refused at its line; a parser's input is not, for what it will overwrite."""
    with pytest.raises(ConlluError) as error:
        read(f"{FIRST}{text}\n\n")
    assert f"f.conllu:{line}: " in str(error.value)
    assert message in str(error.value)
    assert len(read(f"{FIRST}{text}\n\n", require_tree=False)) == 2


@pytest.mark.parametrize("head", ["_", "", "-1", "3", "1", "zero", "0.0"])
def test_a_head_that_cannot_be_is_no_head(read, head: str) -> None:
    """A head that is missing or impossible must not look like a root or like another word's."""
    (sentence,) = read(f"{row(1, head, deprel='_')}\n{row(2, 0)}\n", require_tree=False)
    assert sentence.heads == (-1, 0)
    assert sentence.deprels == ("_", "dep")


@pytest.mark.parametrize(
    "form", ["\u2028", "\u2029", "\x85", "\x1f", "\x0b", "\x0c", "\x1c", "a\rb", "\u3000x", "\ufeff"]
)
def test_a_form_of_any_character_is_one_word(read, tmp_path: Path, form: str) -> None:
    """What other tools take for the end of a line or for nothing is a word."""
    text = f"# sent_id = \u2028{form}x\n{row(1, 0, form, 'root')}\n{row(2, 1, form)}\n\n"
    (sentence,) = read(text)
    assert sentence.words == (form, form)
    write_texts(tmp_path / "copy", [with_columns(text, {HEAD: ["2", "0"], DEPREL: ["dep", "root"]})])
    assert [s.words for s in read_sentences(tmp_path / "copy")] == [(form, form)]


def test_empty_nodes_and_tokens_at_the_start(read) -> None:
    """An empty node before the first word, also inside a multiword token, is not a word."""
    nodes = "0.1\te\t_\t_\t_\t_\t_\t_\t_\t_\n0.2\te\t_\t_\t_\t_\t_\t_\t_\t_"
    text = f"# newpar\n# sent_id = x\n{row('1-2')}\n{nodes}\n{row(1, 0, deprel='root')}\n{row(2, 1)}\n\n"
    (sentence,) = read(text)
    assert (sentence.words, sentence.sent_id) == (("w", "w"), "x")


@settings(deadline=None, max_examples=300)
@given(files(), st.data())
def test_only_two_columns_of_words_change(tmp_path_factory, content: bytes, data: st.DataObject) -> None:
    """In every file that is accepted all else stays byte for byte: line endings, blank lines, a byte order mark."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "in").write_bytes(content)
    found = list(read_texts(folder / "in", require_tree=False))
    assert "".join(text for _, text in found).encode() == content
    new = []
    for sentence, text in found:
        heads = data.draw(
            st.lists(st.integers(0, len(sentence.words)), min_size=(n := len(sentence.words)), max_size=n)
        )
        new.append(with_columns(text, {HEAD: [str(head) for head in heads], DEPREL: ["label"] * n}))
    write_texts(folder / "out", new)
    assert head_and_deprel_away((folder / "out").read_bytes()) == head_and_deprel_away(content)
    assert [s.words for s in read_sentences(folder / "out", False)] == [s.words for s, _ in found]


@pytest.mark.filterwarnings("ignore:no word of the training data is labelled 'root'")
@settings(deadline=None, max_examples=300)
@given(files(trees=True))
def test_what_is_accepted_as_a_tree_can_be_scored(tmp_path_factory, content: bytes) -> None:
    """What is read as a gold standard must not be refused when it is scored, after hours of training."""
    path = tmp_path_factory.mktemp("gold") / "f.conllu"
    path.write_bytes(content)
    try:
        rows = [vars(sentence) for sentence in read_sentences(path)]
    except ConlluError:
        return
    examples = TrigramFeatures(64).encode(rows, Vocabulary.build(rows))
    trees = [(np.array(row["heads"]), list(row["deprels"])) for row in rows]
    assert Parsing(PARSER).score(examples, trees) == {"las": 100, "uas": 100}


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"], ids=["no-bytes", "blank-lines", "spaces"])
def test_a_file_without_sentences_is_refused(read, text: str) -> None:
    """A file without a sentence is an error, not an empty data set."""
    with pytest.raises(ConlluError, match=r"f\.conllu:\d: the file is empty"):
        read(text)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_refused_at_their_line(read, encoding: str) -> None:
    """A file in another encoding is refused, and the error names the line."""
    with pytest.raises(ConlluError, match=r"f\.conllu:\d: byte 0x.. at column \d+ is not UTF-8"):
        read(f"{row(1)}\n{row(2, 1, form='é')}\n\n".encode(encoding))


def test_new_columns_change_nothing_else_of_words() -> None:
    """A new tree changes HEAD and DEPREL of words, and no other annotation."""
    new = with_columns(GOOD, {HEAD: ["2", "0", "2", "3"], DEPREL: ["a", "root", "b:c", "d"]})
    before, after = GOOD.split("\n"), new.split("\n")
    assert len(before) == len(after)
    for old_line, new_line in zip(before, after, strict=True):
        old, columns = old_line.split("\t"), new_line.split("\t")
        if old[0].isdecimal():
            assert columns[:6] + columns[8:] == old[:6] + old[8:]
        else:
            assert new_line == old_line
    assert [line.split("\t")[6:8] for line in after if line[0].isdigit() and line.split("\t")[0].isdecimal()] == [
        ["2", "a"],
        ["0", "root"],
        ["2", "b:c"],
        ["3", "d"],
    ]


@pytest.mark.parametrize(
    ("heads", "deprels", "message"),
    [
        ([0, 1, 1], ["a"] * 4, "3 values of HEAD for a sentence of 4 words"),
        ([0, 1, 1, 1], ["a"] * 3, "3 values of DEPREL for a sentence of 4 words"),
        ([0, 1, 1, 5], ["a"] * 4, "head 5 of word 4 is out of range"),
        ([0, 1, 1, -1], ["a"] * 4, "head -1 of word 4 is out of range"),
        ([0, 1, 1, 1], ["a", "b\tc", "d", "e"], "DEPREL 'b\\tc' of word 2"),
        ([0, 1, 1, 1], ["a", "", "d", "e"], "DEPREL '' of word 2"),
    ],
    ids=["heads", "length", "range", "negative", "tab", "empty"],
)
def test_columns_that_would_break_the_file_are_refused(heads: list[int], deprels: list[str], message: str) -> None:
    """Nothing is written that no reader would accept."""
    with pytest.raises(ValueError, match=re.escape(message)):
        with_columns(GOOD, {HEAD: [str(head) for head in heads], DEPREL: deprels})


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Under the final name is the old file or the whole new one."""
    path = tmp_path / "out.conllu"
    assert write_texts(path, [GOOD + "\n\n"]) == 1

    def broken():
        yield "# half"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_texts(path, broken())
    assert path.read_bytes() == (GOOD + "\n\n").encode()
    assert list(tmp_path.iterdir()) == [path]


def test_real_treebanks_come_back_byte_for_byte(ud_dir: Path, tmp_path: Path) -> None:
    """Real data, read and written with its own trees, is unchanged."""
    paths = sorted(ud_dir.glob("UD_*/*.conllu"))
    assert paths
    for path in paths:
        texts = [
            with_columns(text, {HEAD: [str(head) for head in s.heads], DEPREL: s.deprels})
            for s, text in read_texts(path)
        ]
        write_texts(tmp_path / "copy.conllu", texts)
        assert (tmp_path / "copy.conllu").read_bytes() == path.read_bytes(), path
