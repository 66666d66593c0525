"""Scores: the numbers are the official scorer's, and every refusal names the sentence."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path

import pytest
from udtools.udeval import evaluate, load_conllu

from fastmask.tasks.data.conllu import read_sentences, with_tree
from fastmask.tasks.parsing.scores import Gold, Scores, score


def block(heads: list[int], deprels: list[str], forms: str = "abcdefgh", sent_id: str = "s") -> str:
    rows = zip(forms, heads, deprels, strict=False)
    lines = [f"{i}\t{form}\t_\tX\t_\t_\t{head}\t{deprel}\t_\t_" for i, (form, head, deprel) in enumerate(rows, start=1)]
    return "\n".join([f"# sent_id = {sent_id}", *lines])


GOLD = block([2, 0, 2, 5, 2], ["nsubj", "root", "acl:relcl", "case", "obl"])


def test_perfect_prediction_scores_100() -> None:
    """If this fails, no number of an evaluation can be trusted."""
    assert score([GOLD, GOLD], [GOLD, GOLD]) == Scores(las=100.0, uas=100.0, clas=100.0, words=10)


def test_scores_by_hand() -> None:
    """If this fails, head, label, subtype or function word is counted other than CoNLL-18 does."""
    predicted = block([2, 0, 2, 2, 2], ["obj", "root", "acl", "case", "obl"])  # one wrong label, one wrong head
    scores = score([GOLD], [predicted])
    assert scores.uas == pytest.approx(80.0)
    assert scores.las == pytest.approx(60.0)
    assert scores.clas == pytest.approx(75.0)  # the case marker is no content word
    assert scores.words == 5


def test_same_numbers_as_the_scorer_on_real_text(ud_dir: Path) -> None:
    """If this fails, what is blanked before scoring (lemmas, features, DEPS) changes the attachment scores."""
    for name in ("UD_Italian-PUD", "UD_Arabic-PUD", "UD_Finnish-TDT"):
        sentences = [s for s, _ in zip(read_sentences(ud_dir / name / "test.conllu"), range(60), strict=False)]
        gold = [s.conllu for s in sentences]
        predicted = [with_tree(s.conllu, [0, *range(1, len(s.words))], s.deprels) for s in sentences]  # chains
        official = evaluate(
            *(load_conllu(StringIO("".join(b + "\n\n" for b in blocks)), "", {}) for blocks in (gold, predicted))
        )
        scores = score(gold, predicted)
        assert 0 < scores.las < 100
        for metric in ("LAS", "UAS", "CLAS"):
            assert getattr(scores, metric.lower()) == pytest.approx(100 * official[metric].f1, abs=1e-12)
        assert scores.words == sum(len(s.words) for s in sentences)


def test_500_sentences_are_scored_quickly(ud_dir: Path) -> None:
    """If this fails, evaluation after every epoch becomes the bottleneck (normally about 0.3 s)."""
    gold = [s.conllu for s in read_sentences(ud_dir / "UD_English-PUD" / "test.conllu")]
    start = time.process_time()
    assert score(gold, gold).las == 100.0
    assert time.process_time() - start < 2.0


def test_words_that_differ_name_the_sentence() -> None:
    """If this fails, predictions for other sentences are scored, or the user searches for the place by hand."""
    other = block([2, 0, 2, 5, 2], ["x"] * 5, forms="abXde", sent_id="s")
    with pytest.raises(ValueError, match=r"sentence 2 \(s\): gold has '3 c', the prediction has '3 X'"):
        score([GOLD, GOLD], [GOLD, other])
    with pytest.raises(ValueError, match=r"sentence 1 \(s\): gold has '5 e', the prediction has 'nothing'"):
        score([GOLD], [block([2, 0, 2, 2], ["x"] * 4)])


BAD = {
    "roots": [0, 0, 2, 5, 2],
    "cycle": [2, 0, 2, 5, 4],
    "out-of-range": [2, 0, 2, 5, 9],
}


@pytest.mark.parametrize("heads", BAD.values(), ids=BAD.keys())
def test_trees_the_scorer_refuses_name_side_and_sentence(heads: list[int]) -> None:
    """If this fails, one bad tree among thousands ends in a message with a line number of no file."""
    bad = block(heads, ["x"] * 5, sent_id="bad")
    with pytest.raises(ValueError, match=r"^gold sentence 2 \(bad\): the official scorer refuses it: "):
        score([GOLD, bad], [GOLD, GOLD])
    with pytest.raises(ValueError, match=r"^predicted sentence 2 \(s\): the official scorer refuses it: "):
        score([GOLD, GOLD], [GOLD, bad])


def test_a_missing_head_names_the_sentence() -> None:
    """If this fails, unparsed text given as a prediction ends in an obscure error; also inside a multiword token."""
    unparsed = GOLD.replace("\t2\tobl", "\t_\t_")
    with pytest.raises(ValueError, match="predicted sentence 1"):
        score([GOLD], [unparsed])
    token = "4-5\tde" + "\t_" * 8 + "\n4\t"
    with pytest.raises(ValueError, match="predicted sentence 1"):
        score([GOLD.replace("4\t", token)], [unparsed.replace("4\t", token)])


def test_very_long_chains_are_scored() -> None:
    """If this fails, one sentence of 3000 words stops an evaluation: the scorer recurses along heads."""
    chain = block([*range(2, 3001), 0], ["x"] * 3000, forms="a" * 3000)
    assert score([chain], [chain]).uas == 100.0


def test_nothing_to_score_is_an_error() -> None:
    """If this fails, an empty test set scores 0 (or 100) and goes into a table."""
    with pytest.raises(ValueError, match="no sentences"):
        score([], [])
    with pytest.raises(ValueError, match="1 predicted sentences for 2 gold"):
        score([GOLD, GOLD], [GOLD])


def test_gold_that_is_scored_against_again() -> None:
    """What the scorer holds of gold sentences is not changed by scoring: the second time gives what the first gave."""
    gold, other = [block([2, 0], ["nsubj", "root"])], [block([0, 1], ["root", "obj"])]
    kept = Gold(gold)
    for predicted in (other, gold, other):
        assert kept.score(predicted) == score(gold, predicted)
    assert kept.score(gold).las == 100
