"""Scores: the numbers are the official scorer's, and every refusal names the sentence."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path

import pytest
from udtools.udeval import evaluate, load_conllu

from fastmask.tasks.data.conllu import read_sentences, with_tree
from fastmask.tasks.parsing.scores import Gold, Scores


def block(heads: list[int], deprels: list[str], forms: str = "abcdefgh", sent_id: str = "s") -> str:
    rows = zip(forms, heads, deprels, strict=False)
    lines = [f"{i}\t{form}\t_\tX\t_\t_\t{head}\t{deprel}\t_\t_" for i, (form, head, deprel) in enumerate(rows, start=1)]
    return "\n".join([f"# sent_id = {sent_id}", *lines])


GOLD = block([2, 0, 2, 5, 2], ["nsubj", "root", "acl:relcl", "case", "obl"])


def test_perfect_prediction_scores_100() -> None:
    """The gold trees score 100."""
    assert Gold([GOLD, GOLD]).score([GOLD, GOLD]) == Scores(las=100.0, uas=100.0, clas=100.0, words=10)


def test_scores_by_hand() -> None:
    """Heads, labels, subtypes and function words are counted as CoNLL-18 counts them."""
    predicted = block([2, 0, 2, 2, 2], ["obj", "root", "acl", "case", "obl"])  # one wrong label, one wrong head
    scores = Gold([GOLD]).score([predicted])
    assert scores.uas == pytest.approx(80.0)
    assert scores.las == pytest.approx(60.0)
    assert scores.clas == pytest.approx(75.0)  # the case marker is no content word
    assert scores.words == 5


def test_same_numbers_as_the_scorer_on_real_text(ud_dir: Path) -> None:
    """What is blanked before scoring (lemmas, features, DEPS) does not change the attachment scores."""
    for name in ("UD_Italian-PUD", "UD_Arabic-PUD", "UD_Finnish-TDT"):
        sentences = [s for s, _ in zip(read_sentences(ud_dir / name / "test.conllu"), range(60), strict=False)]
        gold = [s.conllu for s in sentences]
        predicted = [with_tree(s.conllu, [0, *range(1, len(s.words))], s.deprels) for s in sentences]  # chains
        official = evaluate(
            *(load_conllu(StringIO("".join(b + "\n\n" for b in blocks)), "", {}) for blocks in (gold, predicted))
        )
        scores = Gold(gold).score(predicted)
        assert 0 < scores.las < 100
        for metric in ("LAS", "UAS", "CLAS"):
            assert getattr(scores, metric.lower()) == pytest.approx(100 * official[metric].f1, abs=1e-12)
        assert scores.words == sum(len(s.words) for s in sentences)


def test_500_sentences_are_scored_quickly(ud_dir: Path) -> None:
    """Scoring 500 sentences takes about 0.3 s, so that it can be done after every epoch."""
    gold = [s.conllu for s in read_sentences(ud_dir / "UD_English-PUD" / "test.conllu")]
    start = time.process_time()
    assert Gold(gold).score(gold).las == 100.0
    assert time.process_time() - start < 2.0


def test_words_that_differ_name_the_sentence() -> None:
    """Predictions for other sentences are refused, and the error names the first."""
    other = block([2, 0, 2, 5, 2], ["x"] * 5, forms="abXde", sent_id="s")
    with pytest.raises(ValueError, match=r"sentence 2 \(s\): gold has '3 c', the prediction has '3 X'"):
        Gold([GOLD, GOLD]).score([GOLD, other])
    with pytest.raises(ValueError, match=r"sentence 1 \(s\): gold has '5 e', the prediction has 'nothing'"):
        Gold([GOLD]).score([block([2, 0, 2, 2], ["x"] * 4)])


BAD = {
    "roots": [0, 0, 2, 5, 2],
    "cycle": [2, 0, 2, 5, 4],
    "out-of-range": [2, 0, 2, 5, 9],
}


@pytest.mark.parametrize("heads", BAD.values(), ids=BAD.keys())
def test_trees_the_scorer_refuses_name_side_and_sentence(heads: list[int]) -> None:
    """The error says which sentence is no tree, and on which side."""
    bad = block(heads, ["x"] * 5, sent_id="bad")
    with pytest.raises(ValueError, match=r"^gold sentence 2 \(bad\): the official scorer refuses it: "):
        Gold([GOLD, bad]).score([GOLD, GOLD])
    with pytest.raises(ValueError, match=r"^predicted sentence 2 \(s\): the official scorer refuses it: "):
        Gold([GOLD, GOLD]).score([GOLD, bad])


def test_a_missing_head_names_the_sentence() -> None:
    """Unparsed text is refused by its sentence, inside a multiword token, too."""
    unparsed = GOLD.replace("\t2\tobl", "\t_\t_")
    with pytest.raises(ValueError, match="predicted sentence 1"):
        Gold([GOLD]).score([unparsed])
    token = "4-5\tde" + "\t_" * 8 + "\n4\t"
    with pytest.raises(ValueError, match="predicted sentence 1"):
        Gold([GOLD.replace("4\t", token)]).score([unparsed.replace("4\t", token)])


def test_very_long_chains_are_scored() -> None:
    """A sentence of 3000 words is scored, although the scorer recurses along heads."""
    chain = block([*range(2, 3001), 0], ["x"] * 3000, forms="a" * 3000)
    assert Gold([chain]).score([chain]).uas == 100.0


def test_nothing_to_score_is_an_error() -> None:
    """An empty test set is an error, not a score of 0 or 100."""
    with pytest.raises(ValueError, match="no sentences"):
        Gold([]).score([])
    with pytest.raises(ValueError, match="1 predicted sentences for 2 gold"):
        Gold([GOLD, GOLD]).score([GOLD])


def test_gold_that_is_scored_against_again() -> None:
    """What the scorer holds of gold sentences is not changed by scoring: the second time gives what the first gave."""
    gold, other = [block([2, 0], ["nsubj", "root"])], [block([0, 1], ["root", "obj"])]
    kept = Gold(gold)
    for predicted in (other, gold, other):
        assert kept.score(predicted) == Gold(gold).score(predicted)
    assert kept.score(gold).las == 100
