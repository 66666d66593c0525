"""Scores: words are counted, and the numbers are the official scorer's."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from toy_parser import small_parser
from udtools.udeval import evaluate, load_conllu

from fastmask.tasks.data.conllu import DEPREL, HEAD, read_texts, with_columns
from fastmask.tasks.parsing.biaffine import maximum_spanning_trees
from fastmask.tasks.parsing.features import TrigramFeatures
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import Vocabulary

GOLD = {
    "words": list("abcde"),
    "upos": ["X"] * 5,
    "heads": [2, 0, 2, 5, 2],
    "deprels": ["nsubj", "root", "acl:relcl", "case", "obl"],
}
TREE = (np.array(GOLD["heads"]), GOLD["deprels"])


def scores_of(sentences, trees, subtypes="drop"):
    vocabulary = Vocabulary.build(sentences, subtypes)
    return Parsing(small_parser()).score(TrigramFeatures(64).encode(sentences, vocabulary), trees)


@pytest.mark.parametrize("subtypes", ["drop", "keep"])
def test_scores_by_hand(subtypes) -> None:
    """The gold trees score 100; a wrong label, a wrong head and a missing subtype are counted as CoNLL-18 does."""
    assert scores_of([GOLD, GOLD], [TREE, TREE], subtypes) == {"las": 100, "uas": 100}
    predicted = (np.array([2, 0, 2, 2, 2]), ["obj", "root", "acl", "case", "obl"])
    assert scores_of([GOLD], [predicted], subtypes) == {"las": pytest.approx(60), "uas": pytest.approx(80)}
    both = {"las": pytest.approx(80), "uas": pytest.approx(90)}
    assert scores_of([GOLD, GOLD], [predicted, TREE], subtypes) == both


def test_a_relation_that_the_model_does_not_know_is_wrong() -> None:
    """It is no label to learn, and is there to be scored against."""
    examples = TrigramFeatures(64).encode([GOLD], Vocabulary(["root", "obl"], ["X"]))
    found = Parsing(small_parser()).score(examples, [(TREE[0], ["obl", "root", "obl", "obl", "obl"])])
    assert found == {"las": pytest.approx(40), "uas": 100}


def test_nothing_to_score_is_an_error() -> None:
    """An empty test set is an error, not a score of 0 or 100; so are trees of other sentences."""
    examples = TrigramFeatures(64).encode([], Vocabulary.build([GOLD]))
    with pytest.raises(ValueError, match="no sentences to score"):
        Parsing(small_parser()).score(examples, [])
    with pytest.raises(ValueError, match="shape"):
        scores_of([GOLD, GOLD], [TREE])


def worse(sentence, labels, random):
    """A tree with one root that has most of the heads, and labels of which some are others or have other subtypes."""
    n = len(sentence.words)
    arcs = random.normal(size=(1, n, n + 1))
    arcs[0, np.arange(n), sentence.heads] += 2.5
    (heads,) = maximum_spanning_trees(arcs, [n])
    names = [
        random.choice(labels) if draw < 0.2 else label.partition(":")[0] + ":x" * (draw < 0.3) if draw < 0.4 else label
        for label, draw in zip(sentence.deprels, random.random(n).tolist(), strict=True)
    ]
    return heads, names


@pytest.mark.parametrize("subtypes", ["drop", "keep"])
def test_the_numbers_are_those_of_the_official_scorer(ud_dir: Path, subtypes: str) -> None:
    """On real sentences with multiword tokens, empty nodes and forms with spaces, whatever is wrong with the trees."""
    files, random = sorted(ud_dir.glob("UD_*/test.conllu"))[:: 3 if subtypes == "drop" else 5], np.random.default_rng(0)
    assert len(files) > 5
    for path in files:
        sentences, texts = zip(*itertools.islice(read_texts(path), 60), strict=True)
        labels = sorted({label for sentence in sentences for label in sentence.deprels})
        trees = [worse(sentence, labels, random) for sentence in sentences]
        if subtypes == "drop":  # as a parser without subtypes predicts
            trees = [(heads, [name.partition(":")[0] for name in names]) for heads, names in trees]
        predicted = [
            with_columns(text, {HEAD: [str(head) for head in heads], DEPREL: names})
            for text, (heads, names) in zip(texts, trees, strict=True)
        ]
        official = evaluate(*(load_conllu(StringIO("".join(side)), "", {}) for side in (texts, predicted)))
        found = scores_of([vars(sentence) for sentence in sentences], trees, subtypes)
        assert 20 < found["las"] < found["uas"] < 100
        for metric, score in found.items():
            assert score == pytest.approx(100 * official[metric.upper()].f1, abs=1e-9), path
