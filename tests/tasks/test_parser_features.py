"""Sentences as tensors: labels never change into others, words never change places, batches equal their rows."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from toy_parser import SENTENCES
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from fastmask.tasks.parsing.features import (
    Encoded,
    PieceFeatures,
    TrigramFeatures,
    trigrams,
)
from fastmask.tasks.parsing.vocabulary import IGNORE, UNKNOWN_UPOS, Vocabulary


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Train a small tokenizer of one of the families in use."""
    text = ["the old dog barks and she was seen running", "run runs running dogs"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=special, unk_token="[UNK]")
    else:
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    made.train_from_iterator(text, trainer)
    from tokenizers.processors import TemplateProcessing

    names = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def test_unseen_labels_are_ignored_not_replaced() -> None:
    """A label that the parser does not know is left out of training."""
    vocabulary = Vocabulary.build(SENTENCES)
    assert vocabulary.deprel_ids(["root", "never-seen", "_"]).tolist() == [
        vocabulary.deprels.index("root"),
        IGNORE,
        IGNORE,
    ]
    assert vocabulary.upos_ids(["VERB", "X", "_"]).tolist()[1:] == [UNKNOWN_UPOS, UNKNOWN_UPOS]
    assert UNKNOWN_UPOS not in vocabulary.upos_ids(list(vocabulary.upos))


def test_subtypes_are_dropped_or_kept() -> None:
    """`subtypes` keeps the part of a label after its colon; without it, labels that differ there are one."""
    dropped, kept = Vocabulary.build(SENTENCES), Vocabulary.build(SENTENCES, subtypes="keep")
    assert "nsubj" in dropped.deprels
    assert not any(":" in label for label in dropped.deprels)
    assert dropped.deprel_ids(["nsubj:pass"]) == dropped.deprel_ids(["nsubj"])
    assert kept.deprel_ids(["nsubj:pass"]) != kept.deprel_ids(["nsubj"])
    with pytest.raises(ValueError, match=r"maybe.*drop, keep"):
        Vocabulary.build(SENTENCES, subtypes="maybe")


def test_trigrams_do_not_depend_on_the_process() -> None:
    """A saved model reads the same embeddings in every process, which Python's own hash would not."""
    code = "from fastmask.tasks.parsing.features import trigrams; print(trigrams('straße', 16384))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(trigrams("straße", 16384)) == other.strip()


@given(st.text(max_size=12))
def test_every_word_has_trigrams_within_range(word: str) -> None:
    """Every word has at least one feature, and each is a row of the table."""
    units = trigrams(word, 97)
    assert units
    assert all(0 <= unit < 97 for unit in units)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.sampled_from(["trigrams", "wordpiece"]))
def test_select_and_join_equal_encoding_the_same_sentences(rows: list[int], kind: str) -> None:
    """A mixed batch holds the words, heads and labels of its sentences."""
    vocabulary = Vocabulary.build(SENTENCES)
    features = TrigramFeatures(64) if kind == "trigrams" else PieceFeatures(tokenizer(kind))
    wanted = features.encode([SENTENCES[i] for i in rows], vocabulary)
    joined = Encoded.join([features.encode([sentence], vocabulary) for sentence in SENTENCES])
    found = joined.select(np.array(rows))
    assert found.lengths.tolist() == wanted.lengths.tolist()
    for name in ("counts", "units", "upos", "heads", "deprels", "relations"):
        np.testing.assert_array_equal(found.flat(name), wanted.flat(name), err_msg=name)


def test_trigram_batch_points_every_word_at_its_own_trigrams() -> None:
    """Each word is embedded by its own trigrams, and padding by none."""
    vocabulary = Vocabulary.build(SENTENCES)
    features = TrigramFeatures(64)
    batch = features.collate(features.encode(SENTENCES, vocabulary))
    assert batch.upos.shape == (3, 4)
    ends = torch.cat([batch.places[1:], torch.tensor([len(batch.units)])])
    for row, sentence in enumerate(SENTENCES):
        for column in range(4):
            cell = row * 4 + column
            units = batch.units[batch.places[cell] : ends[cell]].tolist()
            words = sentence["words"]
            assert units == (trigrams(words[column], 64) if column < len(words) else [])
    assert batch.heads.tolist() == [[3, 3, 4, 0], [0, IGNORE, IGNORE, IGNORE], [3, 3, 0, IGNORE]]
    assert batch.n_words == 8


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytes"])
def test_piece_batch_equals_the_tokenizers_own(kind: str) -> None:
    """A pretrained model reads the pieces of its own tokenizer, and each word is pooled over its own."""
    made = tokenizer(kind)
    vocabulary = Vocabulary.build(SENTENCES)
    features = PieceFeatures(made)
    batch = features.collate(features.encode(SENTENCES, vocabulary))
    for row, sentence in enumerate(SENTENCES):
        wanted = made(sentence["words"], is_split_into_words=True)
        n = len(wanted["input_ids"])
        assert batch.units[row, :n].tolist() == wanted["input_ids"]
        assert set(batch.units[row, n:].tolist()) <= {made.pad_token_id}
        assert int(batch.unit_lengths[row]) == n
        first = [wanted.word_ids().index(i) for i in range(len(sentence["words"]))]
        assert batch.places[row, : len(first)].tolist() == first


def test_a_word_without_pieces_becomes_the_unknown_piece() -> None:
    """Such a word keeps its place, so the words after it keep theirs."""
    features = PieceFeatures(tokenizer("wordpiece"))
    sentence = {"words": ["dog", " ", "dog"], "upos": ["NOUN"] * 3, "heads": [0, 1, 1], "deprels": ["root"] * 3}
    batch = features.collate(features.encode([sentence], Vocabulary.build(SENTENCES)))
    places = batch.places[0].tolist()
    assert int(batch.units[0, places[1]]) == features.tokenizer.unk_token_id
    assert int(batch.units[0, places[0]]) == int(batch.units[0, places[2]]) != features.tokenizer.unk_token_id


def test_a_word_that_is_longer_than_the_encoder_is_cut() -> None:
    """A word of thousands of pieces must take no more positions than there are, and no other word's."""
    features = PieceFeatures(tokenizer("unigram"), max_positions=10)
    sentence = {"words": ["run", "run" * 900], "upos": ["X"] * 2, "heads": [0, 1], "deprels": ["root", "dep"]}
    encoded = features.encode([sentence], Vocabulary.build(SENTENCES))
    whole = features.tokenizer("run" * 900, add_special_tokens=False)["input_ids"]
    counts = features.word_positions(encoded[0])
    assert len(whole) > 8
    assert counts[1] == 8
    assert encoded[0].units[counts[0] :].tolist() == whole[:8]
    assert features.positions(encoded).tolist() == [counts.sum() + 2]


def test_words_that_a_tokenizer_does_not_know() -> None:
    """A word of unknown pieces only must be told from one that is known in part; trigrams know every word."""
    sentence = {"words": ["dog", "犬", "dog犬"], "upos": ["X"] * 3, "heads": [0, 1, 1], "deprels": ["root"] * 3}
    vocabulary = Vocabulary.build(SENTENCES)
    for kind, unknown in (("wordpiece", [False, True, True]), ("unigram", [False, False, False])):
        features = PieceFeatures(tokenizer(kind))
        known = [set(features.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in sentence["words"]]
        assert [ids == {features.tokenizer.unk_token_id} for ids in known] == unknown
        assert features.unknown(features.encode([sentence], vocabulary)).tolist() == unknown
    assert not TrigramFeatures().unknown(TrigramFeatures().encode([sentence], vocabulary)).any()


@pytest.mark.parametrize("kind", [RobertaTokenizer, GPT2Tokenizer])
def test_words_of_byte_pairs_have_a_space_in_front(kind, tmp_path) -> None:
    """The pieces of words are those inside a text, whether the tokenizer adds the space itself or not."""
    texts = [
        "the cat sat on the mat",
        "кошка на ковре",
        "قط على الحصيرة",
        "猫 は 上",
        "बिल्ली चटाई पर",
        "don't, straße 3.14",
    ]
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts * 20, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_model(str(tmp_path))
    files = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    kind(**files).save_pretrained(tmp_path / "model")
    words = [word for text in [*texts, "new wörds 🙂"] for word in text.split()]
    apart, told = (
        PieceFeatures(AutoTokenizer.from_pretrained(tmp_path / "model", **more))
        for more in ({}, {"add_prefix_space": True})
    )
    assert [found.tolist() for found in apart.units_of(words)] == [found.tolist() for found in told.units_of(words)]
    whole = apart.tokenizer(" " + " ".join(words), add_special_tokens=False)["input_ids"]
    assert np.concatenate(apart.units_of(words)).tolist() == whole
