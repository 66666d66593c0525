"""Whole data sets and files: order restored, official scores, everything but the tree untouched."""

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conllu_files import files, head_and_deprel_away
from hypothesis import given, settings
from toy_parser import SENTENCES, rows, small_parser
from udtools.validator import Validator

from fastmask.tasks.data.conllu import ConlluError, read_sentences
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import Vocabulary

BLOCK = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\tKeep=Yes
1\tvamos\tir\tVERB\t_\tMood=Imp\t_\t_\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t_\t_\t0:root|1:x\t_
2.1\tempty\t_\t_\t_\t_\t_\t_\t1:conj\t_
3\tmar\tmar\tNOUN\t_\t_\t_\t_\t_\tSpaceAfter=No"""


def test_order_is_restored_whatever_the_batches() -> None:
    """Trees come back in the order of their sentences, whatever the batches."""
    parser = small_parser().eval()
    data = Parsing(parser).examples(rows() * 3)
    singles = [Parsing(parser).predict(Parsing(parser).examples([row]))[0] for row in rows() * 3]
    for size in (1, 2, 64):
        found = Parsing(parser).predict(data, batch_size=size)
        assert [(h.tolist(), d) for h, d in found] == [(h.tolist(), d) for h, d in singles]


def test_evaluation_scores_and_leaves_the_training_alone() -> None:
    """Evaluating scores the parser's own trees and leaves training as it was."""
    parser = small_parser(dropout=0.5).train()
    before = torch.get_rng_state()
    task = Parsing(parser)
    examples = task.examples(rows())
    scores = task.score(examples, task.predict(examples))
    assert torch.equal(before, torch.get_rng_state())
    assert parser.training
    assert all(module.training for module in parser.modules())
    trees = Parsing(parser).predict(Parsing(parser).examples(rows()))
    right = sum(
        int(h == g)
        for (heads, _), row in zip(trees, rows(), strict=True)
        for h, g in zip(heads, row["heads"], strict=True)
    )
    assert list(scores) == ["las", "uas"]
    assert scores["uas"] == pytest.approx(100 * right / 8)


def test_predict_file_changes_heads_and_labels_only(tmp_path) -> None:
    """Multiword tokens, empty nodes, comments and other columns survive prediction."""
    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_text("\n\n".join([BLOCK] * 700) + "\n\n", encoding="utf-8")  # more than one chunk
    assert Parsing(small_parser()).predict_file(source, target) == 700
    found = target.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(found) == 700
    for before, after in zip(BLOCK.split("\n"), found[-1].split("\n"), strict=True):
        old, new = before.split("\t"), after.split("\t")
        if old[0].isdecimal():
            assert new[6].isdecimal()
            assert new[7] in small_parser().vocabulary.deprels
            new[6:8] = old[6:8]
        assert new == old


def test_predict_file_says_what_is_wrong(tmp_path) -> None:
    """Bad input is refused and leaves no output; missing tags are warned of."""
    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_text(BLOCK + "\n\n1\tbroken\n\n", encoding="utf-8")
    with pytest.raises(ConlluError, match="columns"):
        Parsing(small_parser()).predict_file(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.conllu"]
    source.write_text(BLOCK.replace("NOUN", "_") + "\n\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 words have no UPOS"):
        Parsing(small_parser()).predict_file(source, target)
    with pytest.raises(ValueError, match="no subnetworks attached"), Parsing(small_parser()).reading("en"):
        pass


ANY_PARSER = small_parser()


@pytest.mark.filterwarnings("ignore:.*have no UPOS")
@settings(deadline=None, max_examples=60)
@given(files())
def test_predict_changes_nothing_else_in_any_file(tmp_path_factory, content: bytes) -> None:
    """All but HEAD and DEPREL of words stays byte for byte, and the trees that are written are trees."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "in").write_bytes(content)
    Parsing(ANY_PARSER).predict_file(folder / "in", folder / "out")
    written = (folder / "out").read_bytes()
    assert head_and_deprel_away(written) == head_and_deprel_away(content)
    for before, after in zip(read_sentences(folder / "in", False), read_sentences(folder / "out", False), strict=True):
        assert (before.words, before.upos, before.sent_id) == (after.words, after.upos, after.sent_id)
        assert [head == 0 for head in after.heads] == [label == "root" for label in after.deprels]
        assert after.heads.count(0) == 1


@pytest.mark.filterwarnings("ignore:.*have no UPOS")
def test_an_input_is_not_refused_for_what_is_overwritten(tmp_path) -> None:
    """HEAD and DEPREL of the input may hold anything, in any sentence."""
    source, target = tmp_path / "in", tmp_path / "out"
    heads = ["_", "", "-1", "1", "3", "99999999999", "x", "0.5", "0", " "]
    text = "".join(f"1\ta\t_\tNOUN\t_\t_\t{head}\t{head}\t_\t_\n2\tb" + "\t_" * 8 + "\n\n" for head in heads)
    source.write_text(text)
    assert Parsing(small_parser()).predict_file(source, target) == len(heads)
    assert len({sentence.heads for sentence in read_sentences(target)}) == 1  # and makes no difference


@pytest.mark.parametrize(
    "labels",
    [("obj", "root", "root:x", "det"), ("obj", "det"), ("root",), ("ROOT", "obj")],
    ids=["two-roots", "no-root", "only-root", "another-root"],
)
@pytest.mark.parametrize("seed", range(5))
def test_only_the_root_is_labelled_root(labels, seed) -> None:
    """Universal Dependencies: DEPREL is `root`, or a subtype of it, if and only if HEAD is 0."""
    torch.manual_seed(seed)
    parser = Parser.small(Vocabulary(labels, ["NOUN"], "keep"), 1, 2, 8, 32, buckets=64, max_positions=32)
    torch.nn.init.normal_(parser.arcs.bilinear.weight)
    torch.nn.init.normal_(parser.labels.forms)
    for sentence, (heads, names) in zip(
        SENTENCES, Parsing(parser).predict(Parsing(parser).examples(rows())), strict=True
    ):
        assert [name.partition(":")[0] == "root" for name in names] == [head == 0 for head in heads]
        assert set(names) <= {*labels, "root", "dep"}
        assert len(names) == len(sentence["words"])


def test_labels_are_the_best_of_those_that_are_allowed() -> None:
    """A label may differ from the best of all only where that one is not allowed."""
    parser = small_parser(seed=3).eval()
    batch = parser.features.collate(Parsing(parser).examples(rows()))
    heads, names = parser.predict(batch)
    states = parser.encode(batch)
    changed = 0
    for row, sentence in enumerate(SENTENCES):
        for word in range(len(sentence["words"])):
            arc = torch.tensor([row]), torch.tensor([word + 1]), torch.tensor([int(heads[row][word])])
            order = [parser.vocabulary.deprels[i] for i in parser.labels(states, *arc)[0].argsort(descending=True)]
            expected = "root" if heads[row][word] == 0 else next(label for label in order if label != "root")
            assert names[row][word] == expected
            changed += expected != order[0]
    assert changed  # or the test says nothing


def test_real_treebanks_stay_valid(ud_dir, tmp_path) -> None:
    """The official validator finds no fault in a parsed treebank that the treebank did not have: trees and roots."""
    files = sorted(ud_dir.glob("UD_*/test.conllu"))[::6]
    assert files
    for path in files:
        text = "\n\n".join(path.read_text(encoding="utf-8").split("\n\n")[:40]) + "\n\n"
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_text(text, encoding="utf-8")
        vocabulary = Vocabulary.build([vars(sentence) for sentence in read_sentences(source)])
        parser = Parser.small(vocabulary, 1, 2, 8, 32, buckets=64)
        torch.nn.init.normal_(parser.arcs.bilinear.weight)
        torch.nn.init.normal_(parser.labels.forms)
        Parsing(parser).predict_file(source, target)
        assert faults(target) <= faults(source), path


def faults(path: Path) -> set[str]:
    """Faults of levels 1 and 2 (format, trees), and those of level 3 that are about roots."""
    state = Validator(level=3, output=None).validate_files([str(path)])
    roots = ("0-is-not-root", "root-is-not-0")
    return {fault.testid for fault in state.error_tracker if fault.level < 3 or fault.testid in roots}


@pytest.mark.parametrize("out", ["fifo", "link", "itself", "device"])
def test_where_predictions_are_written(tmp_path, out: str) -> None:
    """What is no regular file is written into and stays, a link's target is replaced, the input may be the output."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n\n".join(row["conllu"] for row in rows()) + "\n\n")
    Parsing(small_parser()).predict_file(source, tmp_path / "expected")
    expected = (tmp_path / "expected").read_bytes()
    if out == "fifo":
        os.mkfifo(target)
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(target.read_bytes()), daemon=True)
        reader.start()
        Parsing(small_parser()).predict_file(source, target)
        reader.join(60)
        assert read == [expected]
        assert target.is_fifo()
    elif out == "link":
        (tmp_path / "kept").write_text("old")
        target.symlink_to("kept")
        Parsing(small_parser()).predict_file(source, target)
        assert target.is_symlink()
        assert (tmp_path / "kept").read_bytes() == expected
    elif out == "itself":
        Parsing(small_parser()).predict_file(source, source)
        assert source.read_bytes() == expected
    else:
        try:  # one of our own: a fault must not cost the machine its /dev/null
            os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root can make devices")
        Parsing(small_parser()).predict_file(source, target)
        assert target.is_char_device()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_input_that_is_missing_is_not_called_an_output(tmp_path) -> None:
    """The message must name the file that cannot be read."""
    with pytest.raises(FileNotFoundError) as error:
        Parsing(small_parser()).predict_file(tmp_path / "nowhere", tmp_path / "out")
    assert error.value.filename == str(tmp_path / "nowhere")
    assert "cannot write" not in str(error.value)


def test_a_treebank_from_the_collection(ud_dir) -> None:
    """Real treebanks can be encoded, parsed and scored."""
    from fastmask.tasks.data.treebanks import load_treebanks

    data = load_treebanks(ud_dir, "UD_Faroese-OFT", ["test"])["fo"]["test"].select(range(20))
    parser = small_parser()
    parser.vocabulary = Vocabulary.build(data)
    task = Parsing(Parser.small(parser.vocabulary, 1, 2, 8, 32, buckets=64))
    examples = task.examples(data)
    scores = task.score(examples, task.predict(examples))
    assert 0 <= scores["las"] <= scores["uas"] < 60


def test_each_language_is_parsed_by_its_own_subnetwork(tmp_path) -> None:
    """A language is scored and predicted with its own masks."""
    import fastmask as fm

    parser = small_parser().eval()
    full = parser(parser.features.collate(Parsing(parser).examples(rows()))).arc_scores
    heads = torch.tensor([[[True, False], [True, True]], [[False, True], [False, True]]])
    fm.attach(parser.encoder, fm.Subnetworks(["de", "en"], heads=heads))
    batch = parser.features.collate(Parsing(parser).examples(rows()))
    mixed = parser(replace(batch, language_ids=torch.tensor([-1, 0, 1]))).arc_scores
    torch.testing.assert_close(mixed[0], full[0], rtol=1e-5, atol=1e-5)
    for row, code in ((1, "de"), (2, "en")):
        with fm.language(parser.encoder, code):
            alone = parser(batch).arc_scores[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, full[row], atol=1e-3)
    source = tmp_path / "in.conllu"
    source.write_text("\n\n".join(row["conllu"] for row in rows()) + "\n\n", encoding="utf-8")
    task = Parsing(parser)
    with task.reading("en"):
        task.predict_file(str(source), str(tmp_path / "en.conllu"))
        trees = Parsing(parser).predict(Parsing(parser).examples(rows()))
    lines = [line.split("\t") for line in (tmp_path / "en.conllu").read_text().splitlines() if line]
    assert [int(line[6]) for line in lines] == [int(head) for heads, _ in trees for head in heads]
    with pytest.raises(KeyError, match="'enn'"), task.reading("enn"):
        pass
    with pytest.raises(ValueError, match="no language was given"):
        Parsing(parser).predict(Parsing(parser).examples(rows()))
