"""Sentences that are longer than the encoder: cut into windows that fit, parsed, joined into one tree, or left out."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_parser import SENTENCES, small_parser

from fastmask.tasks.data.conllu import read_sentences
from fastmask.tasks.parsing.features import TrigramFeatures, cut, join
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary
from fastmask.tasks.predicting import CHUNK


class CountedFeatures(TrigramFeatures):
    """A word of n letters takes n positions, as pieces do."""

    def word_positions(self, sentence):
        """Two units fewer than trigrams and the whole word."""
        return sentence.counts - (sentence.counts > 1)


def sentence_of(words: list[str]) -> dict:
    n = len(words)
    return {"words": words, "upos": ["NOUN"] * n, "heads": [0, *range(1, n)], "deprels": ["root"] + ["obj"] * (n - 1)}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=30), max_size=5))
def test_windows_hold_the_most_words_that_fit(sizes: list[list[int]]) -> None:
    """No window may be longer than the encoder, shorter than it must be, or lose, repeat or move a word."""
    features, vocabulary = CountedFeatures(64, max_positions=8), Vocabulary.build(SENTENCES)
    encoded = features.encode([sentence_of(["x" * size for size in words]) for words in sizes], vocabulary)
    parts, first = cut(features, encoded)
    assert first[0] == 0
    assert first[-1] == len(parts)
    for row, words in enumerate(sizes):
        windows = parts[first[row] : first[row + 1]]
        taken = [features.word_positions(window).tolist() for window in windows]
        assert list(itertools.chain(*taken)) == words
        assert all(sum(found) <= 7 for found in taken)
        assert all(sum(found) + after[0] > 7 for found, after in itertools.pairwise(taken))
        whole = encoded[row]
        assert np.concatenate([window.units for window in windows]).tolist() == whole.units.tolist()
        if len(windows) == 1:
            assert windows[0].heads.tolist() == whole.heads.tolist()
        else:
            assert {head for window in windows for head in window.heads.tolist()} == {IGNORE}
    assert features.too_long(encoded).tolist() == [row for row, words in enumerate(sizes) if sum(words) > 7]


def test_trees_of_windows_become_one_tree() -> None:
    """Arcs inside windows must be kept, and the roots of later windows hang from the first one's root."""
    trees = [
        (np.array([2, 0]), ["nsubj", "root"]),
        (np.array([0]), ["root"]),
        (np.array([3, 1, 0]), ["det", "obj", "root"]),
        (np.array([0, 1]), ["root", "dep"]),
    ]
    (heads, labels), (alone, own) = join(trees, np.array([0, 3, 4]), "parataxis")
    assert heads.tolist() == [2, 0, 2, 6, 4, 2]
    assert labels == ["nsubj", "root", "parataxis", "det", "obj", "parataxis"]
    assert (alone.tolist(), own) == ([0, 1], ["root", "dep"])
    assert trees[0][1] == ["nsubj", "root"]  # nobody's list is changed


@pytest.mark.parametrize(
    ("labels", "loose"),
    [
        (["root", "obj", "dep", "parataxis"], "parataxis"),
        (["root", "obj", "dep"], "dep"),
        (["root:x", "root", "obj", "det"], "obj"),
        (["root"], "dep"),
    ],
)
def test_the_label_between_windows(labels: list[str], loose: str) -> None:
    """It is one that the model knows, as unspecific as there is, and never that of a root."""
    assert Vocabulary(labels, []).loose == loose


def test_a_long_sentence_is_parsed_as_its_windows_and_disturbs_no_other() -> None:
    """The tree is that of the windows, wherever in a data set the sentence is."""
    parser = small_parser().eval()
    long = [f"w{i}" for i in range(70)]
    rows = [sentence_of(words) for words in (["a", "b"], long, ["c"], long[:31])]
    with pytest.warns(UserWarning, match=r"1 of 4 sentences do not fit .* 32 positions .* sentence 2 with 70 words"):
        data = Parsing(parser).examples(rows)
    found = Parsing(parser).predict(data, batch_size=2)
    windows = [sentence_of(long[first : first + 31]) for first in (0, 31, 62)]
    trees = Parsing(parser).predict(Parsing(parser).examples(windows))
    (heads, labels), *others = join(trees, np.array([0, 3]), "nsubj")  # the label that is most frequent
    assert not others
    assert found[1][0].tolist() == heads.tolist()
    assert found[1][1] == labels
    assert parser.vocabulary.loose == "nsubj"
    for row in (0, 2, 3):
        (alone,) = Parsing(parser).predict(Parsing(parser).examples([rows[row]]))
        assert (found[row][0].tolist(), found[row][1]) == (alone[0].tolist(), alone[1])
    gold = [label for row in rows for label in row["deprels"]]
    right = [
        head == wanted
        for (heads, _), row in zip(found, rows, strict=True)
        for head, wanted in zip(heads, row["heads"], strict=True)
    ]
    assert len(right) == len(gold) == 2 + 70 + 1 + 31
    assert Parsing(parser).score(data, found)["uas"] == pytest.approx(100 * np.mean(right))


def test_a_long_sentence_loses_no_file_and_is_named_once(tmp_path) -> None:
    """Every sentence of the file must get a tree, and one warning count those that are too long and name the first."""
    long = "".join(f"{i}\tw\t_\tNOUN\t_\t_\t_\t_\t_\t_\n" for i in range(1, 601))
    text = f"# sent_id = first\n{long}\n" + "1\ta\t_\tNOUN\t_\t_\t_\t_\t_\t_\n\n" * CHUNK  # long ones in two chunks
    (tmp_path / "in").write_text(text + long)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert Parsing(small_parser()).predict_file(tmp_path / "in", tmp_path / "out") == CHUNK + 2
    assert [str(warning.message) for warning in given] == [
        f"2 of {CHUNK + 2} sentences do not fit into the encoder's 32 positions and are parsed in parts; the first is "
        "sentence 1 (first) with 600 words"
    ]
    assert [len(sentence.words) for sentence in read_sentences(tmp_path / "out")] == [600, *[1] * CHUNK, 600]


def test_sentences_to_learn_from_are_left_out_if_they_are_too_long() -> None:
    """A sentence cannot be learnt in parts; the others are, and an error says that there are none."""
    rows = [sentence_of(["a"] * n) for n in (2, 4, 3, 5, 40)]
    task = Parsing(small_parser(), max_length=100)  # its encoder has 32 positions
    with pytest.warns(UserWarning, match="de: 1 of 5 support sentences are left out: they need more than 32 positions"):
        assert task.training_examples(rows, "de", "support").lengths.tolist() == [2, 4, 3, 5]
    task = Parsing(small_parser(), max_length=4)
    with pytest.warns(UserWarning, match="de: 3 of 5 .* 4 positions"):
        assert task.training_examples(rows, "de", "support").lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="de: none of the 2 support sentences fits into 4 positions"):
        task.training_examples([rows[1], rows[3]], "de", "support")
    with pytest.raises(ValueError, match="language 'de' has no support sentences"):
        task.training_examples([], "de", "support")


def test_an_opened_parser_leaves_out_what_its_run_did(tmp_path) -> None:
    """The limit of a run is saved with its parser: `adapt` trains on no longer support sentences."""
    task = Parsing(small_parser(), max_length=4)
    task.save(tmp_path)
    for found in (task, Parsing.open(tmp_path)):
        with pytest.warns(
            UserWarning, match="de: 1 of 2 support sentences are left out: they need more than 4 positions"
        ):
            assert len(found.training_examples([sentence_of(["a"] * n) for n in (3, 4)], "de", "support")) == 1
