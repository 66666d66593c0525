"""Reading and writing CoNLL-U: wrong files must be refused at the right line, right ones come back unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmask.parsing.conllu import ConlluError, Sentence, read_sentences, with_tree, write_blocks


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
    """If this fails, the parser is trained on multiword tokens or empty nodes as if they were words."""
    (sentence,) = read(GOOD + "\n\n")
    assert sentence.words == ("da", "me", "lo", "ya  no")
    assert sentence.upos == ("VERB", "PRON", "PRON", "_")
    assert sentence.heads == (0, 1, 1, 1)
    assert sentence.deprels == ("root", "iobj", "obj:x", "advmod")
    assert sentence.sent_id == "s-1"
    assert sentence.conllu == GOOD


@pytest.mark.parametrize(
    "text",
    [GOOD, GOOD + "\n", "\n\n" + GOOD + "\n\n\n\n", "\ufeff" + GOOD + "\n\n", GOOD.replace("\n", "\r\n") + "\r\n\r\n"],
    ids=["no-newline", "no-blank-line", "many-blank-lines", "bom", "crlf"],
)
def test_harmless_variants_read_the_same(read, text: str) -> None:
    """If this fails, files written on another system or by another tool are refused or read differently."""
    (sentence,) = read(text)
    assert sentence.conllu == GOOD


def test_sentences_stream(tmp_path: Path) -> None:
    """If this fails, a large file is read as a whole before its first sentence is out."""
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
    "head-word": (4, row(1, "root"), "HEAD 'root' is not a whole number"),
    "head-fraction": (4, row(1, "0.0"), "HEAD '0.0' is not a whole number"),
    "head-negative": (4, row(1, -1), "HEAD -1 is out of range"),
    "head-large": (5, f"{row(1)}\n{row(2, 3)}", "HEAD 3 is out of range (expected 0..2)"),
    "head-self": (5, f"{row(1)}\n{row(2, 2)}", "HEAD 2 is the word itself"),
    "form-empty": (4, row(1, form=""), "FORM is empty"),
    "form-blank": (4, row(1, form="\u00a0"), "FORM is empty"),
    "comment-inside": (5, f"{row(1)}\n# text = b\n{row(1)}", "comment inside a sentence"),
    "comments-only": (4, "# text = b\n# nothing", "a sentence without words"),
}
BAD_TREES = {
    "head-missing": (4, row(1, "_"), "HEAD is missing"),
    "deprel-missing": (4, row(1, deprel="_"), "DEPREL is missing"),
    "no-root": (4, f"{row(1, 2)}\n{row(2, 1)}", "no root"),
    "two-roots": (5, f"{row(1)}\n{row(2)}", "several roots, words 1, 2"),
    "cycle": (5, f"{row(1)}\n{row(2, 3)}\n{row(3, 2)}\n{row(4, 3)}", "cycle through words 2, 3"),
}


@pytest.mark.parametrize(("line", "text", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("require_tree", [True, False], ids=["tree", "no-tree"])
def test_malformed_files_are_refused_at_their_line(
    read, line: int, text: str, message: str, require_tree: bool
) -> None:
    """If this fails, a broken file is read as something it is not, or its author looks at the wrong line."""
    with pytest.raises(ConlluError) as error:
        read(f"{FIRST}{text}\n\n", require_tree)
    assert f"f.conllu:{line}: " in str(error.value)
    assert message in str(error.value)
    assert "(expected" in str(error.value)


@pytest.mark.parametrize(("line", "text", "message"), BAD_TREES.values(), ids=BAD_TREES.keys())
def test_only_training_data_must_be_trees(read, line: int, text: str, message: str) -> None:
    """If this fails, training accepts what is no tree, or prediction refuses unparsed text."""
    with pytest.raises(ConlluError) as error:
        read(f"{FIRST}{text}\n\n")
    assert f"f.conllu:{line}: " in str(error.value)
    assert message in str(error.value)
    assert len(read(f"{FIRST}{text}\n\n", require_tree=False)) == 2


def test_unparsed_input_has_no_heads(read) -> None:
    """If this fails, an unknown head looks like a root."""
    (sentence,) = read(f"{row(1, '_', deprel='_')}\n{row(2, '_', deprel='_')}\n", require_tree=False)
    assert sentence.heads == (-1, -1)
    assert sentence.deprels == ("_", "_")


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"], ids=["no-bytes", "blank-lines", "spaces"])
def test_a_file_without_sentences_is_refused(read, text: str) -> None:
    """If this fails, an empty file quietly becomes an empty data set."""
    with pytest.raises(ConlluError, match=r"f\.conllu:\d: the file is empty"):
        read(text)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_refused_at_their_line(read, encoding: str) -> None:
    """If this fails, a file in another encoding ends in a bare UnicodeDecodeError or in wrong letters."""
    with pytest.raises(ConlluError, match=r"f\.conllu:\d: byte 0x.. at column \d+ is not UTF-8"):
        read(f"{row(1)}\n{row(2, 1, form='é')}\n\n".encode(encoding))


def test_with_tree_changes_two_columns_of_words_only() -> None:
    """If this fails, predictions overwrite other people's annotation."""
    new = with_tree(GOOD, [2, 0, 2, 3], ["a", "root", "b:c", "d"])
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
        ([0, 1, 1], ["a"] * 4, "3 heads and 4 deprels for a sentence of 4 words"),
        ([0, 1, 1, 5], ["a"] * 4, "head 5 of word 4 is out of range"),
        ([0, 1, 1, -1], ["a"] * 4, "head -1 of word 4 is out of range"),
        ([0, 1, 1, 1], ["a", "b\tc", "d", "e"], "deprel 'b\\tc' of word 2"),
        ([0, 1, 1, 1], ["a", "", "d", "e"], "deprel '' of word 2"),
    ],
    ids=["length", "range", "negative", "tab", "empty"],
)
def test_with_tree_refuses_what_would_break_the_file(heads: list[int], deprels: list[str], message: str) -> None:
    """If this fails, a file is written that no reader accepts."""
    with pytest.raises(ValueError, match=re.escape(message)):
        with_tree(GOOD, heads, deprels)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    """If this fails, a run that dies while writing leaves half a file under the final name."""
    path = tmp_path / "out.conllu"
    assert write_blocks(path, [GOOD]) == 1

    def broken():
        yield "# half"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_blocks(path, broken())
    assert path.read_bytes() == (GOOD + "\n\n").encode()
    assert list(tmp_path.iterdir()) == [path]


def test_real_treebanks_come_back_byte_for_byte(ud_dir: Path, tmp_path: Path) -> None:
    """If this fails, reading real data and writing its own trees back changes it."""
    paths = sorted(ud_dir.glob("UD_*/*.conllu"))
    assert paths
    for path in paths:
        blocks = [with_tree(s.conllu, s.heads, s.deprels) for s in read_sentences(path)]
        write_blocks(tmp_path / "copy.conllu", blocks)
        assert (tmp_path / "copy.conllu").read_bytes() == path.read_bytes(), path
