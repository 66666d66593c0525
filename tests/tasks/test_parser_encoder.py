"""Encoders and tokenizers are those that were saved, whole, or an error names what is missing; nothing runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parser_model import batch_of, pretrained_folder
from toy_parser import SENTENCES, small_parser
from transformers import BertConfig, BertForMaskedLM, BertModel

from fastmask.files import FileError
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.parsing.vocabulary import Vocabulary
from fastmask.tasks.pretrained import load_model

VOCABULARY = Vocabulary.build(SENTENCES)


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a saved parser on a pretrained encoder."""
    Parser.pretrained(pretrained_folder(tmp_path / "hub"), VOCABULARY).save(tmp_path / "saved")
    return tmp_path / "saved"


def change(path: Path, name: str, value: torch.Tensor | None) -> None:
    """Put a tensor into a safetensors file, or take it out."""
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, path, {"format": "pt"})


@pytest.mark.parametrize("of", ["pretrained", "small", "base model"])
def test_every_missing_weight_is_named(of, tmp_path, saved) -> None:
    """Transformers fills in random numbers; each weight of the encoder, not only of some kind, must be an error."""
    if of == "small":
        small_parser().save(saved := tmp_path / "small")
    folder = tmp_path / "hub" if of == "base model" else saved / "encoder"
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for name in [name for name in load_file(file) if "pooler" not in name]:
        change(file, name, None)
        with pytest.raises(FileError, match=f"lacks {name} "):
            Parser.pretrained(folder, VOCABULARY) if of == "base model" else Parser.load(saved)
        file.write_bytes(whole)
    Parser.pretrained(folder, VOCABULARY) if of == "base model" else Parser.load(saved)


def test_weights_of_another_shape_or_left_over(saved, tmp_path) -> None:
    """A saved parser has its own weights and no others; a base model may have more, but none of another shape."""
    file, name = saved / "encoder" / "model.safetensors", "encoder.layer.1.output.dense.bias"
    change(file, name, torch.zeros(5))
    with pytest.raises(FileError, match=rf"{name} has shape \[5\] \(expected \[16\]\)"):
        Parser.load(saved)
    change(file, name, torch.zeros(16))
    change(file, "more.weight", torch.zeros(1))
    with pytest.raises(FileError, match=r"has more\.weight in excess"):
        Parser.load(saved)
    change(tmp_path / "hub" / "model.safetensors", "more.weight", torch.zeros(1))
    Parser.pretrained(tmp_path / "hub", VOCABULARY)


@pytest.mark.parametrize("name", ["root", "arcs.bilinear.weight", "labels.forms"])
def test_the_parsers_own_weights_are_whole(saved, name) -> None:
    """So must the layers on top of the encoder be, with the right dtypes."""
    file = saved / "parser.safetensors"
    value = load_file(file)[name]
    for wrong, message in (
        (None, f"lacks \\['{name}'\\]"),
        (value[:1, ...] if value.ndim > 1 else value[:1], f"{name} is .*expected"),
        (value.half(), f"{name} is .* of torch.float16"),
    ):
        change(file, name, wrong)
        with pytest.raises(FileError, match=rf"parser\.safetensors: {message}"):
            Parser.load(saved)


def test_an_encoder_inside_a_language_model(tmp_path) -> None:
    """The weights of a checkpoint with a head are found under their prefix, and are those that run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=60, **sizes))
    model.save_pretrained(tmp_path)
    encoder = load_model("AutoModel", str(tmp_path), add_pooling_layer=False)
    wanted = {name: value for name, value in model.bert.state_dict().items()}
    assert encoder.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "damage", ["cut", "garbage", "empty", "gone", "pickle", "config", "no config", "no type", "file"]
)
def test_a_damaged_encoder_is_named(saved, damage) -> None:
    """Whatever is wrong with the files of an encoder, the message has the folder, and no other error gets out."""
    folder = saved / "encoder"
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"\x10" * 1000)
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage in ("gone", "pickle"):
        if damage == "pickle":  # whose content is what it should be
            torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "no config":
        config.unlink()
    elif damage == "no type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": 7}))
    else:
        shutil.rmtree(folder)
        folder.write_text("x")
    with pytest.raises((FileError, OSError), match=str(folder)):
        Parser.load(saved)


def test_no_code_of_a_model_folder_runs(saved, tmp_path) -> None:
    """A folder that asks for classes of its own gets those of transformers, or is refused; its file is not imported."""
    for folder in (saved / "encoder", saved / "tokenizer", tmp_path / "hub"):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        for file, more in (
            ("config.json", {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}),
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
        ):
            if (folder / file).is_file():
                (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **more}))
    Parser.load(saved)
    Parser.pretrained(tmp_path / "hub", VOCABULARY)
    for kind in ("evil", 7, None):
        for folder in (saved / "encoder", tmp_path / "hub"):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with pytest.raises(FileError):
            Parser.load(saved)
        with pytest.raises(FileError):
            Parser.pretrained(tmp_path / "hub", VOCABULARY)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"])
def test_a_model_without_a_tokenizer_is_refused(kind, tmp_path) -> None:
    """Transformers makes a tokenizer that knows no word; training on nothing but unknown pieces must not begin."""
    folder = pretrained_folder(tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(FileError, match=r"hub: has no tokenizer: .* knows \d pieces"):
        Parser.pretrained(folder, VOCABULARY)
    from fastmask.tasks.pretrained import load_tokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(FileError, match=r"hub: (has no|cannot be read as a) tokenizer"):
        load_tokenizer(str(folder))


def test_a_saved_parser_without_its_tokenizer_is_refused(saved) -> None:
    """The same of a run; and nothing is looked for elsewhere."""
    shutil.move(saved / "tokenizer", saved / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Parser.load(saved)
    (saved / "tokenizer").mkdir()
    with pytest.raises((FileError, OSError), match=str(saved / "tokenizer")):
        Parser.load(saved)
    shutil.copy(saved / "elsewhere" / "tokenizer_config.json", saved / "tokenizer")
    with pytest.raises(FileError, match="tokenizer"):
        Parser.load(saved)
    (saved / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FileError, match="cannot be read as a tokenizer"):
        Parser.load(saved)


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    """A piece that the encoder has no embedding of must not wait for the step in which it occurs."""
    folder = pretrained_folder(tmp_path / "hub")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(folder)
    with pytest.raises(FileError, match=r"pieces up to number \d+ \(expected less than 20"):
        Parser.pretrained(folder, VOCABULARY)


def test_training_words_that_the_tokenizer_does_not_know(tmp_path) -> None:
    """Training is refused if most words of all languages are unknown; for one language there is a warning."""
    import datasets

    task = Parsing(Parser.pretrained(pretrained_folder(tmp_path / "hub"), VOCABULARY))
    strange = [{**row, "words": ["犬"] * len(row["words"])} for row in SENTENCES]
    known, unknown = (task.training_examples(datasets.Dataset.from_list(rows), "xx") for rows in (SENTENCES, strange))
    with pytest.warns(UserWarning, match="zh: 100% of the training words are unknown"):
        task.check({"en": known, "zh": unknown})
    with pytest.raises(ValueError, match=r"zh: 100% of the training words are unknown .* for zh, ja"):
        task.check({"zh": unknown, "ja": unknown})


DAMAGE = [
    "", "[]", "{", "\x00", '{"version": 0}', {"version": 0}, {"version": "1"}, {"sizes": {}, "more": 1},
    {"sizes": {"arc_size": 0}}, {"deprels": []}, {"deprels": ["a b"]}, {"deprels": [""]}, {"deprels": ["a", "a"]},
    {"deprels": [1]}, {"upos": ["X", "X"]}, {"subtypes": "maybe"}, {"max_positions": "9"}, {"max_positions": 1},
    {"max_length": 0}, {"buckets": 0}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_description_is_named(tmp_path, damage) -> None:
    """The JSON file of a saved parser is checked down to its items, and the message has its name."""
    small_parser().save(tmp_path)
    path = tmp_path / "parser.json"
    path.write_text(damage if isinstance(damage, str) else json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(FileError, match=r"parser\.json"):
        Parser.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Parser.load(tmp_path)


def test_a_pretrained_parser_predicts_the_same_after_saving(saved, tmp_path) -> None:
    """Loading strictly must not change what is loaded."""
    parser = Parser.load(saved)
    parser.save(tmp_path / "again")
    again, batch = Parser.load(tmp_path / "again"), batch_of(parser, SENTENCES)
    torch.testing.assert_close(again(batch).arc_scores, parser(batch).arc_scores, rtol=0, atol=0)
