"""Whole data sets and files: order restored, official scores, everything but the tree untouched."""

import pytest
import torch
from toy_parser import rows, small_parser

from fastmask.parsing.conllu import ConlluError
from fastmask.parsing.evaluation import evaluate, parse, predict_file, prepare
from fastmask.parsing.features import SentenceTooLongError
from fastmask.parsing.vocabulary import Vocabulary

BLOCK = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\tKeep=Yes
1\tvamos\tir\tVERB\t_\tMood=Imp\t_\t_\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t_\t_\t0:root|1:x\t_
2.1\tempty\t_\t_\t_\t_\t_\t_\t1:conj\t_
3\tmar\tmar\tNOUN\t_\t_\t_\t_\t_\tSpaceAfter=No"""


def test_order_is_restored_whatever_the_batches() -> None:
    """If this fails, sentences get each other's trees."""
    parser = small_parser().eval()
    data = prepare(parser, rows() * 3)
    singles = [parse(parser, prepare(parser, [row]).encoded)[0] for row in rows() * 3]
    for size in (1, 2, 64):
        found = parse(parser, data.encoded, batch_size=size)
        assert [(h.tolist(), d) for h, d in found] == [(h.tolist(), d) for h, d in singles]


def test_evaluation_scores_and_leaves_the_training_alone() -> None:
    """If this fails, evaluating changes the training that follows, or scores another tree than the parser's."""
    parser = small_parser(dropout=0.5).train()
    before = torch.get_rng_state()
    result = evaluate(parser, {"en": rows()})["en"]
    assert torch.equal(before, torch.get_rng_state())
    assert parser.training
    assert all(module.training for module in parser.modules())
    trees = parse(parser, prepare(parser, rows()).encoded)
    right = sum(
        int(h == g)
        for (heads, _), row in zip(trees, rows(), strict=True)
        for h, g in zip(heads, row["heads"], strict=True)
    )
    assert result.uas == pytest.approx(100 * right / 8)
    assert result.words_per_second > 0
    assert result.scores.words == 8


def test_predict_file_changes_heads_and_labels_only(tmp_path) -> None:
    """If this fails, multiword tokens, empty nodes, comments or other columns do not survive prediction."""
    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_text("\n\n".join([BLOCK] * 700) + "\n\n", encoding="utf-8")  # more than one chunk
    assert predict_file(small_parser(), source, target) == 700
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
    """If this fails, a bad input leaves half an output, or missing tags go unnoticed."""
    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_text(BLOCK + "\n\n1\tbroken\n\n", encoding="utf-8")
    with pytest.raises(ConlluError, match="columns"):
        predict_file(small_parser(), source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.conllu"]
    source.write_text(BLOCK.replace("NOUN", "_") + "\n\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 words have no UPOS"):
        predict_file(small_parser(), source, target)
    long = "\n".join(f"{i}\tw\t_\tX\t_\t_\t_\t_\t_\t_" for i in range(1, 41))
    source.write_text((BLOCK + "\n\n") * 600 + f"# sent_id = long\n{long}\n\n", encoding="utf-8")
    with pytest.raises(SentenceTooLongError, match=r"sentence 601 \(long\) has 40 words \(expected at most 31"):
        predict_file(small_parser(), source, target)
    with pytest.raises(ValueError, match="no subnetworks attached"):
        predict_file(small_parser(), source, target, language="en")


def test_a_treebank_from_the_collection(ud_dir) -> None:
    """If this fails, real treebanks cannot be encoded, parsed and scored."""
    from fastmask.parsing.treebanks import load_treebanks

    data = load_treebanks(ud_dir, "UD_Faroese-OFT", ["test"])["fo"]["test"].select(range(20))
    parser = small_parser()
    parser.vocabulary = Vocabulary.build(data)
    from fastmask.parsing.parser import Parser

    result = evaluate(Parser.small(parser.vocabulary, 1, 2, 8, 32, buckets=64), {"fo": data})
    assert 0 <= result["fo"].las <= result["fo"].uas < 60


def test_each_language_is_parsed_by_its_own_subnetwork(tmp_path) -> None:
    """If this fails, a language is scored or predicted with another one's masks, or with the full network."""
    import fastmask as fm

    parser = small_parser().eval()
    full = parser(parser.features.collate(prepare(parser, rows()).encoded)).arc_scores
    heads = torch.tensor([[[True, False], [True, True]], [[False, True], [False, True]]])
    fm.attach(parser.encoder, fm.Subnetworks(["de", "en"], heads=heads))
    batch = parser.features.collate(prepare(parser, rows()).encoded)
    mixed = parser(batch, torch.tensor([-1, 0, 1])).arc_scores
    torch.testing.assert_close(mixed[0], full[0], rtol=1e-5, atol=1e-5)
    for row, code in ((1, "de"), (2, "en")):
        with fm.language(parser.encoder, code):
            alone = parser(batch).arc_scores[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone, full[row], atol=1e-3)
    source = tmp_path / "in.conllu"
    source.write_text("\n\n".join(row["conllu"] for row in rows()) + "\n\n", encoding="utf-8")
    predict_file(parser, source, tmp_path / "en.conllu", language="en")
    trees = parse(parser, prepare(parser, rows()).encoded, language_id=1)
    lines = [line.split("\t") for line in (tmp_path / "en.conllu").read_text().splitlines() if line]
    assert [int(line[6]) for line in lines] == [int(head) for heads, _ in trees for head in heads]
    with pytest.raises(KeyError, match="'enn'"):
        predict_file(parser, source, tmp_path / "x.conllu", language="enn")
    with pytest.raises(ValueError, match="no language was given"):
        evaluate(parser, {"en": rows()})
