"""CoNLL-U with something wrong in it: what is read is what a few plain lines of code read, and trees are trees."""

from __future__ import annotations

import pytest
from mutations import mutants
from typed_command import errors_of
from verdicts import Verdicts

from fastmask.cli import main
from fastmask.tasks.data.conllu import read_sentences

TEXT = """\
# newdoc id = a
# sent_id = a-1
# text = Don't  go, 日本!
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
1\tDo\tdo\tAUX\tVBP\tMood=Imp\t3\taux\t3:aux\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t3:advmod\t_
3\tgo\tgo\tVERB\tVB\t_\t0\troot\t0:root\tSpaceAfter=No
3.1\tgone\tgo\tVERB\tVBN\t_\t_\t_\t3:conj\t_
4\t,\t,\tPUNCT\t,\t_\t5\tpunct\t5:punct\t_
5\t日本 語\t_\tPROPN\t_\t_\t3\tvocative:x\t_\tA=b|C=d
6\t!\t!\tPUNCT\t.\t_\t3\tpunct\t_\t_

# sent_id = a-2
1\tNej\tnej\tINTJ\t_\t_\t0\troot\t_\t_

# sent_id = a-3
# text = They went home early today
1\tThey\tthey\tPRON\t_\t_\t2\tnsubj\t_\t_
2\twent\tgo\tVERB\t_\t_\t0\troot\t_\t_
3\thome\thome\tADV\t_\t_\t2\tadvmod\t_\t_
4\tearly\tearly\tADV\t_\t_\t5\tadvmod\t_\t_
5\ttoday\ttoday\tNOUN\t_\t_\t2\tobl:tmod\t_\t_

"""


def blocks_of(content):
    """The lines of every sentence, without their endings."""
    text = content.decode("utf-8")
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    blocks = [[]]
    for line in lines:
        if line.strip(" "):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def words_of(block):
    """The columns of every word of a sentence, whose numbers must be 1, 2, 3, ..."""
    rows = [line.split("\t") for line in block if not line.startswith("#")]
    assert all(len(row) == 10 for row in rows)
    words = [row for row in rows if "-" not in row[0] and "." not in row[0]]
    assert [row[0] for row in words] == [str(number + 1) for number in range(len(words))]
    return words


def is_tree(heads):
    """Whether each word comes to the one root by its heads."""
    if heads.count(0) != 1 or not all(0 <= head <= len(heads) for head in heads):
        return False
    for word in range(1, len(heads) + 1):
        steps = 0
        while word and steps <= len(heads):
            word, steps = heads[word - 1], steps + 1
        if word:
            return False
    return True


def plainly(content, trees):
    """Words, tags and, of trees, heads and labels, by splitting at line ends and tabs."""
    found = []
    for block in blocks_of(content):
        words = words_of(block)
        sentence = [[row[1] for row in words], [row[3] or "_" for row in words]]
        if trees:
            heads = [int(row[6]) for row in words]
            assert is_tree(heads)
            assert all(row[7] not in ("", "_") for row in words)
            sentence += [heads, [row[7] for row in words]]
        found.append(sentence)
    return found


def read(path, trees):
    found = []
    for sentence in read_sentences(path, require_tree=trees):
        row = [list(sentence.words), list(sentence.upos)]
        if trees:
            row += [list(sentence.heads), list(sentence.deprels)]
        found.append(row)
    return found


@pytest.mark.parametrize("trees", [True, False])
def test_reading(count, trees, tmp_path):
    """1,000 damaged files: an error that names file and line, or the words, heads and labels that stand there."""
    path, verdicts = tmp_path / "a.conllu", Verdicts()
    for what, content in mutants(TEXT.encode(), "text", count, f"conllu {trees}"):
        path.write_bytes(content)
        verdicts.reading(what, lambda: read(path, trees), lambda text=content: plainly(text, trees), f"{path}:")
    verdicts.check(least=count // 4)


def only_trees_differ(before, after):
    """Whether two files are the same to the byte but for columns 7 and 8 of words."""
    lines, others = before.split(b"\n"), after.split(b"\n")
    if len(lines) != len(others):
        return False
    for line, other in zip(lines, others, strict=True):
        columns, changed = line.split(b"\t"), other.split(b"\t")
        if len(columns) == 10 and columns[0].removeprefix(b"\xef\xbb\xbf").isdigit():
            columns[6:8] = changed[6:8]
        if columns != changed:
            return False
    return True


def test_predict(count, small_run, tmp_path, capsys):
    """1,000 damaged files: `fastmask predict` says what is wrong where, or changes nothing but heads and labels."""
    path, out, verdicts = tmp_path / "a.conllu", tmp_path / "out.conllu", Verdicts()
    command = ["predict", str(small_run), str(path), str(out), "--language", "qac"]
    for what, content in mutants(TEXT.encode(), "text", count, "predict"):
        path.write_bytes(content)
        out.unlink(missing_ok=True)

        def run(content=content):
            capsys.readouterr()
            code = main(command)
            if code != 0:
                raise ValueError("\n".join(errors_of(capsys.readouterr().err)))
            assert code == 0
            blocks = [words_of(block) for block in blocks_of(out.read_bytes())]
            trees = [is_tree([int(row[6]) for row in words]) for words in blocks]
            roots = [(row[6] == "0") == (row[7] == "root") for words in blocks for row in words]
            return only_trees_differ(content, out.read_bytes()), all(trees), all(roots)

        verdicts.reading(what, run, lambda: (True, True, True), f"{path}:")
    verdicts.check(least=count // 8)


test_predict.few = 24
