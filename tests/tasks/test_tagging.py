"""Tags of words: at first pieces, of every word of a long sentence, into CoNLL-U, and scored over words or spans."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from tiny_tasks import CASES, SPANS, config_of, rows_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from toy_parser import SENTENCES, conllu
from transformers import PreTrainedTokenizerFast

from fastmask.settings import ConfigError
from fastmask.tasks.data.conllu import UPOS, with_columns
from fastmask.tasks.pretrained import WordPieces
from fastmask.tasks.tagging import Tagging
from fastmask.tasks.transformers_task import Examples


@pytest.fixture
def tagger(tiny, tmp_path):
    """A tagger with a new head."""

    def build(name="tagging", **changes):
        config = config_of(name, tiny(name), tmp_path / "run", **changes)
        return Tagging.build(config, Tagging.load(config.data, config.languages, config.task_settings))

    return build


def test_a_word_has_its_tag_at_its_first_piece(tagger):
    """Labels are at first pieces; unknown tags and ``_`` are not learnt."""
    task = tagger()
    assert task.labels == ["ADJ", "NOUN", "VERB"]
    task.pieces.units_of = lambda words: [np.array([5, 6, 7][: 1 + len(word)]) for word in words]
    row = {"words": ["a", "bb", "c", "d"], "upos": ["VERB", "NOUN", "_", "NEW"]}
    (found,) = task.examples([row])
    assert found["input_ids"] == [2, 5, 6, 5, 6, 7, 5, 6, 5, 6, 3]
    assert found["labels"] == [-100, 2, -100, 1, -100, -100, -100, -100, -100, -100, -100]
    assert "labels" not in task.examples([{"words": ["a"]}]).features[0]


def test_a_long_sentence_is_tagged_whole(tagger):
    """Each word of a long sentence gets its own tag, from windows without gaps."""
    task = tagger(max_length=8)
    words = rows_of(CASES["tagging"], "aa", "train")[0]["words"][:2] * 10
    with pytest.warns(UserWarning, match="1 of 1 sentences have more than 8 pieces"):
        examples = task.examples([{"words": words, "upos": ["NOUN"] * 20}])
    (tags,) = task.predict(examples)
    parts = [words[first : first + 6] for first in range(0, 20, 6)]
    apart = task.predict(task.examples([{"words": part} for part in parts]))
    assert tags == [tag for part in apart for tag in part]
    assert len(examples.features[0]["input_ids"]) == 8


def byte_pairs(pieces):
    """As RoBERTa's and ModernBERT's, read as no class of its own: a space in front is part of a word."""
    tokenizer = Tokenizer(models.WordLevel({piece.replace("_", "Ġ"): i for i, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def marked(pieces):
    """As Gemma's: spaces become a mark before a text is cut."""
    tokenizer = Tokenizer(models.WordLevel({piece.replace("_", "▁"): i for i, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return tokenizer


def plain(pieces):
    """As BERT's: spaces are gone."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("make", [byte_pairs, marked, plain])
def test_words_have_the_pieces_that_they_have_in_a_text(make):
    """Words one by one are those of a text, whatever a tokenizer makes of spaces."""
    tokenizer = make(["[UNK]", "a", "_a", "the", "_the", "dogs", "_dogs"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [UNK]", special_tokens=[("[UNK]", 0)])
    pieces = WordPieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]"))
    whole = pieces.tokenizer("a the dogs", add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in pieces.units_of(["the", "dogs"])] == [[number] for number in whole[1:]]
    assert 0 not in whole
    assert (pieces.prefix.tolist(), pieces.suffix.tolist()) == ([], [0])


def test_accuracy_is_over_words_with_a_tag(tagger):
    """Accuracy is over all words with a tag, and without any there is no score."""
    task = tagger()
    rows = [{"words": ["a", "b", "c"], "upos": ["NOUN", "_", "VERB"]}, {"words": ["a"], "upos": ["NEW"]}]
    examples = Examples([{"input_ids": [1]}] * 2, rows)
    with pytest.warns(UserWarning, match=r"does not know count as wrong: NEW \(1\)"):
        found = task.score(examples, [["NOUN", "ADJ", "NOUN"], ["NOUN"]])
    assert found == {"accuracy": pytest.approx(100 / 3)}
    with pytest.raises(ValueError, match="no word has a tag to score against"):
        task.score(Examples([{"input_ids": [1]}], [{"words": ["a"]}]), [["NOUN"]])


def spans_of(tags):
    """Literal conlleval: a span begins at B-, or at I- after another type or outside."""
    found, begin, kind = set(), None, None
    for place, tag in enumerate([*tags, "O"]):
        head, _, now = tag.partition("-")
        if kind is not None and (head != "I" or now != kind):
            found.add((begin, place, kind))
            kind = None
        if head in ("B", "I") and kind is None:
            begin, kind = place, now
    return found


def test_f1_is_over_whole_spans(tagger):
    """F1 is that of spans, over all sentences."""
    task = tagger("spans")
    assert task.metric == "f1"
    random = np.random.default_rng(0)
    sides = [[random.choice(SPANS, size=n).tolist() for n in (5, 9, 3, 12)] for _ in range(2)]
    gold, guesses = ([(i, *span) for i, tags in enumerate(side) for span in spans_of(tags)] for side in sides)
    right = len({*gold} & {*guesses})
    assert right
    rows = [{"tokens": ["x"] * len(tags), "ner": tags} for tags in sides[0]]
    found = task.score(Examples([{"input_ids": [1]}] * 4, rows), sides[1])
    assert found["precision"] == pytest.approx(100 * right / len(guesses))
    assert found["recall"] == pytest.approx(100 * right / len(gold))
    assert found["f1"] == pytest.approx(200 * right / (len(guesses) + len(gold)))
    strict = tagger("spans", task_options={**CASES["spans"].options, "scheme": "IOB2"})
    assert strict.score(Examples([{"input_ids": [1]}] * 4, rows), sides[1])["f1"] != found["f1"]


def test_a_word_without_a_tag_ends_a_span(tagger):
    """What stands around a word without a tag is two spans, and what is predicted for the word does not count."""
    task = tagger("spans")
    rows = [{"tokens": ["x"] * 4, "ner": ["B-PER", "_", "I-PER", "O"]}]
    examples = Examples([{"input_ids": [1]}], rows)
    assert task.score(examples, [["B-PER", "I-PER", "I-PER", "O"]]) == {"f1": 100, "precision": 100, "recall": 100}
    found = task.score(examples, [["B-PER", "B-LOC", "O", "O"]])
    assert (found["precision"], found["recall"]) == (100, 50)


def test_predictions_of_treebanks_change_upos_only(tagger, tmp_path):
    """Other columns, comments and line endings stay as they are."""
    task = tagger()
    blocks = "\n\n".join(conllu(sentence) for sentence in SENTENCES)
    text = f"# sent_id = 1\r\n{blocks}\n\n\n".replace("barks\t", "barks \t")
    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_bytes(text.encode())
    assert task.predict_file(str(source), str(target)) == 3
    tags = task.predict(task.examples(SENTENCES))
    found = target.read_bytes().decode()
    assert re.sub(r"(?m)^((?:[^\t\n]*\t){3})[^\t]*", r"\1_", found) == re.sub(
        r"(?m)^((?:[^\t\n]*\t){3})[^\t]*", r"\1_", text
    )
    assert re.findall(r"(?m)^\d(?:\t[^\t]*){2}\t([^\t]*)", found) == [tag for of in tags for tag in of]
    with pytest.raises(ValueError, match="1 values of UPOS for a sentence of 4 words"):
        with_columns(conllu(SENTENCES[0]), {UPOS: ["X"]})
    with pytest.raises(ValueError, match="holds white space"):
        with_columns(conllu(SENTENCES[1]), {UPOS: ["a b"]})


def test_unknown_tags_of_a_support_set(tagger):
    """Unknown tags are listed; ignoring them keeps the sentence and its other tags."""
    task = tagger()
    rows = [{"words": ["a", "b"], "upos": ["NOUN", "XX"]}, {"words": ["a"], "upos": ["XX"]}]
    with pytest.raises(ValueError, match=r"not trained on: XX \(2\)\. It knows ADJ, NOUN, VERB"):
        task.known_labels(rows)
    with pytest.raises(KeyError, match="way of dealing with unknown labels"):
        task.known_labels(rows, "drop")
    with pytest.warns(UserWarning, match=r"left out: XX \(2\)"):
        kept = task.known_labels(rows, "ignore")
    assert [row["upos"] for row in kept] == [["NOUN", None], [None]]
    with pytest.warns(UserWarning, match="^aa: 1 of 2 support sentences have no labels and are left out$"):
        assert len(task.training_examples(kept, "aa", "support")) == 1
    assert rows[0]["upos"] == ["NOUN", "XX"]


def test_rows_that_do_not_fit_are_named(tagger):
    """A row with too few tags, with text instead of words, or without words is named."""
    task = tagger()
    with pytest.raises(ValueError, match=r"2 words with 1 tags: a b"):
        task.examples([{"words": ["a", "b"], "upos": ["NOUN"]}])
    with pytest.raises(ValueError, match="expected a list of words"):
        task.examples([{"words": "a b"}])
    with pytest.raises(KeyError, match="unknown column 'words'; did you mean 'word'"):
        task.examples([{"word": ["a"]}])
    with pytest.raises(ValueError, match="language 'aa' has no training sentences with labels"):
        task.training_examples([{"words": ["a"]}], "aa")


def test_profile_is_there_where_trees_are(tagger):
    """Languages can be compared by their trees where rows have trees, and only there."""
    task = tagger()
    assert task.profile(rows_of(CASES["tagging"], "aa", "train")) is None
    profile = task.profile(SENTENCES)
    assert profile["amod"] == [1, 0]
    assert task.similarity(profile, {"aa": profile, "bb": {"amod": [0, 1]}})["aa"] == 1.0


def test_settings_are_checked(tagger):
    """Settings that contradict each other are refused."""
    task = tagger("spans", task_options={**CASES["spans"].options, "scheme": "words"})
    assert (task.metric, Tagging.metric) == ("accuracy", "accuracy")
    with pytest.raises(ValueError, match="scheme is 'iob'"):
        dataclasses.replace(task.options, scheme="iob")
    assert torch.is_tensor(task.logits(task.collate(task.examples([{"tokens": ["aa1"]}]))))


def test_tags_that_are_no_list_are_named(tagger):
    """A number, or text, whose letters would be tags."""
    for wrong in (1, "NV", "NOUN VERB"):
        with pytest.raises(ValueError, match=r"upos is .* \(expected a list of tags, one for each word\)"):
            tagger().examples([{"words": ["a", "b"], "upos": wrong}])


def test_a_scheme_that_the_tags_do_not_follow_is_said_before_training(tagger):
    """Not when the first dev set is scored."""
    with pytest.raises(ConfigError, match=r"scheme is 'IOE2', which is not that of B-LOC, B-PER, I-LOC, I-PER, O"):
        tagger("spans", task_options={**CASES["spans"].options, "scheme": "IOE2"})
