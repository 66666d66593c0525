"""The base of tasks on models of transformers: batches, losses without labels, folders that are damaged."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tasks import CASES, config_of, rows_of, save_gpt2, save_tokenizer, write_rows
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaModel

from fastmask.files import FileError
from fastmask.tasks.classification import Classification
from fastmask.tasks.transformers_task import Examples, _by_number, cross_entropy, name_of
from fastmask.tasks.translation import Translation


@pytest.fixture
def classifier(tiny, tmp_path):
    """A classifier with a new head."""

    def build(**changes):
        config = config_of("classification", tiny("classification"), tmp_path / "run", **changes)
        data = Classification.load(config.data, config.languages, config.task_settings)
        return Classification.build(config, data)

    return build


def test_examples_are_selected_and_joined():
    """Rows and their features stay together."""
    part = Examples([{"input_ids": [0] * n, "labels": n} for n in (1, 2, 3)], [{"row": n} for n in (1, 2, 3)])
    found = Examples.join([part, part.select(np.array([2, 0]))]).select(np.array([3, 1]))
    assert (found.rows, found.lengths.tolist(), len(found)) == ([{"row": 3}, {"row": 2}], [3, 2], 2)
    assert [item["labels"] for item in found] == [3, 2]


def test_numbers_that_are_written_in_two_ways_have_one_order():
    """Labels are numbered alike in every process, whose sets of text have orders of their own: 1 and 01 are two."""
    names = ["10", "9", "1", "01", "b", "a", "001"]
    for turned in (names, names[::-1]):
        assert sorted(turned, key=_by_number) == ["001", "01", "1", "9", "10", "a", "b"]


def test_a_loss_without_labels_is_zero_with_a_gradient():
    """The loss of a batch without labels is zero, not 0 / 0, and has a gradient."""
    logits = torch.randn(2, 3, 4, requires_grad=True)
    found = cross_entropy(logits, torch.full((2, 3), -100))
    found.mean.backward()
    assert (found.mean.item(), found.each.tolist(), found.weight) == (0, [0, 0], 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_batch_without_labels_has_no_loss(classifier):
    """Rows without a class have no loss, and are not trained on."""
    task = classifier()
    rows = [*rows_of(CASES["classification"], "aa", "train")[:2], {"text": "aa1"}]
    with pytest.raises(ValueError, match="some of the examples have no labels"):
        task.loss(task.collate(task.examples(rows)))
    with pytest.warns(UserWarning, match="^aa: 1 of 3 training examples have no labels and are left out$"):
        assert len(task.training_examples(rows, "aa")) == 2


def test_long_texts_are_cut_with_a_warning(classifier):
    """A text that is too long is truncated, with a warning."""
    task = classifier(max_length=6)
    with pytest.warns(UserWarning, match="1 of 2 examples may be cut: they fill the 6 tokens"):
        examples = task.examples([{"text": "aa1 " * 20}, {"text": "aa1"}])
    assert examples.lengths.tolist() == [6, 3]
    assert classifier(max_length=10_000).max_length == 64  # what the model has


def test_text_that_the_tokenizer_does_not_know_is_said(classifier):
    """Text in a script that the tokenizer does not know is warned of, or refused."""
    task = classifier()
    known, other = (
        task.training_examples([{"text": text, "label": 0}], "aa") for text in ("aa1 aa2 aa3", "x y z u v w")
    )
    task.check({"aa": known})
    with pytest.warns(UserWarning, match="bb: 75% of the training text is unknown to the model's tokenizer"):
        task.check({"aa": known, "bb": other})
    with pytest.raises(ValueError, match=r"is unknown .* \(expected a model and a tokenizer for bb\)"):
        task.check({"bb": other})


def test_the_seed_decides_the_head(classifier):
    """The head depends on the seed; the encoder does not."""
    first, again, other = (classifier(seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first[name], other[name])


def test_predictions_do_not_depend_on_batches_or_touch_random_numbers(classifier):
    """Predictions come in order, without dropout and without drawing random numbers."""
    task = classifier()
    task.model.train()
    examples = task.examples(rows_of(CASES["classification"], "aa", "train"))
    state = torch.get_rng_state()
    found = [task.predict(examples, batch_size) for batch_size in (1, 5, 64)]
    assert found[0] == found[1] == found[2]
    assert torch.equal(state, torch.get_rng_state())
    assert task.model.training
    task.model.base_model.eval()  # as a user keeps what is frozen
    task.predict(examples)
    assert task.model.training
    assert not task.model.base_model.training


def test_scores_of_classes(classifier):
    """Accuracy and F1 are those computed by hand, and an unknown class counts as wrong."""
    task = classifier()
    rows = [{"text": "", "label": label} for label in (0, 0, 1, "new", None)]
    examples = Examples([{"input_ids": [1]}] * 5, rows)
    with pytest.warns(UserWarning, match=r"does not know count as wrong: new \(1\)"):
        found = task.score(examples, ["0", "1", "1", "1", "0"])
    # Class 0: precision 1, recall 1/2; class 1: precision 1/3, recall 1; class new: never found.
    assert found == pytest.approx({"accuracy": 50, "macro_f1": 100 * (2 / 3 + 1 / 2 + 0) / 3})
    with pytest.raises(ValueError, match="no row has a class to score against"):
        task.score(Examples([{"input_ids": [1]}], [{"text": ""}]), ["0"])


def test_unknown_classes_of_a_support_set(classifier):
    """Unknown classes are listed, or their rows are left out."""
    task = classifier()
    rows = [{"text": "aa1", "label": label} for label in (0, 7, 7)]
    with pytest.raises(ValueError, match=r"not trained on: 7 \(2\)\. It knows 0, 1, 2"):
        task.known_labels(rows)
    with pytest.warns(UserWarning, match="left out"):
        assert task.known_labels(rows, "ignore") == rows[:1]


def test_damaged_folders_are_named(classifier, tmp_path, capfd):
    """A damaged folder is refused by name, and never loaded with random weights."""
    task = classifier()
    whole = tmp_path / "whole"
    whole.mkdir()
    task.save(whole)
    capfd.readouterr()

    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises((FileError, FileNotFoundError)) as error:
            Classification.open(folder)
        assert str(folder) in str(error.value)
        return str(error.value)

    def weights(change):
        def apply(folder):
            found = load_file(folder / "model.safetensors")
            change(found)
            save_file(found, folder / "model.safetensors", {"format": "pt"})

        return apply

    def settings(**changes):
        def apply(folder):
            saved = json.loads((folder / "task.json").read_text())
            (folder / "task.json").write_text(json.dumps({**saved, **changes}))

        return apply

    assert "lacks classifier.bias" in broken(weights(lambda found: found.pop("classifier.bias")))
    assert "has extra in excess" in broken(weights(lambda found: found.update(extra=torch.zeros(1))))
    assert "classifier.bias has shape [5] (expected [3])" in broken(
        weights(lambda found: found.update({"classifier.bias": torch.zeros(5)}))
    )
    assert "no saved task" in broken(lambda folder: (folder / "task.json").unlink())
    assert "tokenizer" in broken(lambda folder: (folder / "tokenizer.json").unlink())
    assert "is of task 'tagging'" in broken(settings(task="tagging"))
    assert "has version 9" in broken(settings(version=9))
    assert "cannot be read as a model" in broken(lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100))
    assert capfd.readouterr() == ("", "")


def test_a_model_below_the_head_must_be_whole(classifier, tiny, tmp_path):
    """An encoder with a missing weight is refused."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("classification") / "model", folder)
    found = load_file(folder / "model.safetensors")
    del found["encoder.layer.0.attention.self.query.weight"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match=r"model: lacks bert\.encoder\.layer\.0\.attention\.self\.query\.weight"):
        classifier(model=str(folder))
    with pytest.raises(FileNotFoundError, match="no folder of a model at"):
        classifier(model=str(tmp_path / "nothing"))


def test_rows_without_text_are_left_out(tiny, tmp_path):
    """An empty cell of a CSV file is said with its place, and does not end the run."""
    (tmp_path / "train.csv").write_text("language,text,label\naa,aa1,0\naa,,1\nbb,bb1,0\naa,aa3,1\n", encoding="utf-8")
    options = Classification.settings()
    with pytest.warns(UserWarning, match=r"aa train: 1 of 3 rows have no text and are left out; the first is row 2"):
        found = Classification.load(tmp_path / "train.csv", "aa,bb", options, ["train"])
    assert {name: list(of["train"]["text"]) for name, of in found.items()} == {"aa": ["aa1", "aa3"], "bb": ["bb1"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Classification.load(tmp_path / "train.csv", "bb", options, ["train"])["bb"]["train"]) == 1


def test_what_makes_examples_the_same_also_of_lists_of_words():
    """A text may be a list of words: a support example is found among test examples however it is written."""
    for task, column in ((Classification, "text"), (Translation, "source")):
        options = task.settings()
        as_list, as_text = ({column: text} for text in (["a", "word"], "a word"))
        assert task.words_of(as_list, options) == task.words_of(as_text, options)
        assert hash(task.words_of(as_list, options))


def test_a_decoder_classifies_by_its_last_piece_whatever_it_calls_padding(tiny, tmp_path):
    """Where the config knows another padding piece than the tokenizer, logits still do not depend on the batch."""
    place = tmp_path / "llama"
    size = save_tokenizer(place, around=False)  # padded with [SEP], which ends a text
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaModel(LlamaConfig(vocab_size=size, pad_token_id=0, eos_token_id=3, **sizes)).save_pretrained(place)
    config = config_of("classification", tiny("classification"), tmp_path / "run", model=str(place))
    task = Classification.build(config, Classification.load(config.data, config.languages, config.task_settings))
    task.model.double()
    examples = task.examples([{"text": "aa1 aa2"}, {"text": "aa3 aa4 aa5 aa6 aa7"}])
    with torch.no_grad():
        alone = task.logits(task.collate(examples.select(np.array([0]))))[0]
        torch.testing.assert_close(task.logits(task.collate(examples))[0], alone)


def test_a_head_keeps_its_classes(tiny, tmp_path):
    """The rows of a head that a model brings mean what they meant, in whatever order the labels are found."""
    place = tmp_path / "bert"
    size = save_tokenizer(place)
    names = {0: "2", 1: "0", 2: "1"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=size, pad_token_id=0, id2label=names, **sizes)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(place)
    config = config_of("classification", tiny("classification"), tmp_path / "run", model=str(place))
    task = Classification.build(config, Classification.load(config.data, config.languages, config.task_settings))
    assert task.labels == ["2", "0", "1"]
    assert torch.equal(task.model.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("label", "name"), [(1, "1"), (1.0, "1"), (0.5, "0.5"), (float("nan"), None), (None, None), ("_", None), ("1", "1")]
)
def test_names_of_labels(label, name):
    """A number is one class, also where a hole in the column made it a float; NaN is the hole."""
    assert name_of(label) == name


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}])
def test_labels_that_are_none(label):
    """Several labels of one text are no name of a class."""
    with pytest.raises(ValueError, match=r"expected a name or a number"):
        name_of(label)


def test_an_empty_text_alone(tiny, tmp_path):
    """A tokenizer without special pieces makes nothing of an empty text, which has a prediction all the same."""
    place = tmp_path / "gpt2"
    save_gpt2(place)
    config = config_of("classification", tiny("classification"), tmp_path / "run", model=str(place))
    task = Classification.build(config, Classification.load(config.data, config.languages, config.task_settings))
    (alone,) = task.predict(task.examples([{"text": ""}]))
    assert [alone, *task.predict(task.examples([{"text": "aa1"}]))] == task.predict(
        task.examples([{"text": ""}, {"text": "aa1"}])
    )


def test_a_test_set_needs_no_column_of_labels(tmp_path):
    """Only training needs labels; in a row that lacks something, its number counts all rows of the file."""
    write_rows(tmp_path / "train.jsonl", [{"language": "en", "text": t, "label": t} for t in "ab"])
    write_rows(tmp_path / "test.jsonl", [{"language": "en", "text": "x"}])
    loaded = Classification.load(tmp_path, "en", Classification.settings(), ["train", "test"])
    assert len(loaded["en"]["test"]) == 1
    (tmp_path / "pairs").mkdir()
    file = tmp_path / "pairs" / "train.csv"
    file.write_text("language,premise,hypothesis,label\nen,,h1,0\nen,p2,h2,1\nen,p3,,1\nen,p4,h4,0\n")
    settings = Classification.settings(text_column="premise", pair_column="hypothesis")
    with pytest.warns(UserWarning, match="have no") as warned:
        Classification.load(file, "en", settings, ["train"])
    assert [str(warning.message).rpartition(" ")[2] for warning in warned] == ["1", "3"]
