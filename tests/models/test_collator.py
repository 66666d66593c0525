"""A column of languages in a dataset reaches the model, through any collator, `Trainer` and what moves batches."""

from __future__ import annotations

import copy
import pickle

import accelerate.utils
import pytest
import torch
from datasets import Dataset
from tiny_models import batch, tiny
from tokenizers import Tokenizer, models
from torch.distributed.utils import _recursive_to
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import fastmask as fm
from fastmask.models.attach import attached
from fastmask.models.languages import LanguageCounts
from fastmask.models.routing import Route

LANGUAGES = ["de", "fi", "sw"]
COLUMN = ["fi", None, 0, -1, "sw"]
IDS = [1, -1, 0, -1, 2]
SUBNETS = fm.Subnetworks(LANGUAGES, torch.ones(3, 2, 4, dtype=torch.bool))


@pytest.fixture(scope="module")
def tokenizer():
    words = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[MASK]", *[f"w{i}" for i in range(3, 50)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", model_max_length=40
    )


def collators(tokenizer):
    lengths = [3, 5, 2, 4, 1]
    rows = [{"input_ids": list(range(5, 5 + length))} for length in lengths]
    tagged = [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
    choices = [{"input_ids": [row["input_ids"], row["input_ids"][:1]], "label": 0} for row in rows]
    even = [{"input_ids": [5, 6, 7], "label": 1}] * 5
    return {
        "default": (default_data_collator, even),
        "padding": (DataCollatorWithPadding(tokenizer), rows),
        "masked words": (DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0), rows),
        "next words": (DataCollatorForLanguageModeling(tokenizer, mlm=False), rows),
        "tags": (DataCollatorForTokenClassification(tokenizer), tagged),
        "choices": (DataCollatorForMultipleChoice(tokenizer), choices),
    }


@pytest.mark.parametrize("name", ["default", "padding", "masked words", "next words", "tags", "choices"])
def test_around_any_collator(tokenizer, name):
    """The batch is that of the inner collator, with ids; the examples stay as they were."""
    inner, examples = collators(tokenizer)[name]
    torch.manual_seed(0)
    wanted = inner(copy.deepcopy(examples))
    with_column = [{"language": language, **row} for language, row in zip(COLUMN, examples, strict=True)]
    before = copy.deepcopy(with_column)
    torch.manual_seed(0)
    found = fm.LanguageCollator(inner, SUBNETS)(with_column)
    assert with_column == before
    assert found.pop("language_ids").tolist() == IDS
    assert found.pop("language_counts").tolist() == [1, 1, 1, 2]
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key


def test_settings_of_the_inner_collator(tokenizer):
    """Trainers ask a collator for its settings; copies and pickles work."""
    made = fm.LanguageCollator(DataCollatorWithPadding(tokenizer, max_length=7), SUBNETS, column="lang")
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert one.max_length == 7
        assert one([{"lang": "fi", "input_ids": [5]}])["language_ids"].tolist() == [1]
    with pytest.raises(AttributeError):
        _ = made.there_is_none


def test_examples_that_a_batch_has_several_times():
    """Pairs of TRL's preferences: all that were chosen, then all that were rejected."""
    collate = fm.LanguageCollator(lambda examples: {"input_ids": torch.ones(4, 3)}, SUBNETS, times=2)
    assert collate([{"language": "fi"}, {"language": "de"}])["language_ids"].tolist() == [1, 0, 1, 0]


def test_several_texts():
    """Batches of sentence-transformers, which takes them apart by the beginnings of names."""
    collate = fm.LanguageCollator(
        lambda examples: {"a_input_ids": torch.ones(1, 3), "b_input_ids": torch.ones(1, 2)}, SUBNETS
    )
    found = collate([{"language": "fi"}])
    assert {name for name in found if "language" in name} == {
        f"{text}_language_{what}" for text in "ab" for what in ("ids", "counts")
    }


def test_what_a_decoder_reads():
    """Collators for encoder-decoders add its tokens, which are of the same call, and have no languages of their own."""
    from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq

    class Pads:
        padding_side, pad_token_id = "right", 0

        def pad(self, examples, **_):
            return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}

    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8)
    model = BartForConditionalGeneration(config)
    collate = fm.LanguageCollator(DataCollatorForSeq2Seq(Pads(), model), SUBNETS)
    found = collate([{"language": "fi", "input_ids": [4, 5], "labels": [6, 7]}])
    assert found["decoder_input_ids"].shape == (1, 2)
    assert {name for name in found if "language" in name} == {"language_ids", "language_counts"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("examples", "error", "message"),
        [
            ([{"language": "fin"}], KeyError, "unknown language 'fin'; did you mean 'fi'"),
            ([{"languages": "fi"}], KeyError, "unknown column 'language'; did you mean 'languages'"),
            ([{"language": 3}], ValueError, "language id 3 is out of range: expected 0 to 2"),
            ([{"language": 1.5}], ValueError, "expected a language's name or id in 'language', given 1.5"),
            ([["fi"]], ValueError, "expected examples as mappings with a column 'language', given list"),
        ],
    )
    def test_examples(self, examples, error, message):
        with pytest.raises(error, match=message):
            fm.LanguageCollator(lambda rest: {}, SUBNETS)(examples)

    def test_collators(self):
        with pytest.raises(ValueError, match=r"expected a collator that makes a mapping, .* made a list"):
            fm.LanguageCollator(lambda rest: [], SUBNETS)([{"language": "fi"}])
        with pytest.raises(ValueError, match="no subnetworks are attached to this BertModel"):
            fm.LanguageCollator(default_data_collator, tiny("bert"))


# ---- what the host knows of a batch


META = torch.device("meta")
MOVES = {
    "to": lambda told: told["language_counts"].to(META, non_blocking=True),
    "accelerate": lambda told: accelerate.utils.send_to_device(told, META, non_blocking=True)["language_counts"],
    "BatchEncoding": lambda told: BatchEncoding(told).to(META)["language_counts"],
    "DistributedDataParallel": lambda told: _recursive_to(told, META, False)[0]["language_counts"],
    "pickle": lambda told: pickle.loads(pickle.dumps(told))["language_counts"],
    "deepcopy": lambda told: copy.deepcopy(told)["language_counts"],
}


def told():
    return fm.LanguageCollator(lambda rest: {"x": torch.zeros(len(rest))}, SUBNETS)([{"language": c} for c in COLUMN])


@pytest.mark.parametrize("how", MOVES)
def test_counts_stay_on_the_host(how):
    """A device other than the CPU stands for a GPU: the languages present are known there, the full network too."""
    counts = MOVES[how](told())
    assert counts.device.type == "cpu"
    route = Route.of(torch.tensor(IDS).to(META), 3, counts=counts)
    assert route.present == (-1, 0, 1, 2)


def test_what_is_made_of_counts_is_not_taken_for_them():
    """Accelerate joins and cuts batches: then all languages may be there, and that is what is assumed."""
    counts, ids = told()["language_counts"], torch.tensor([0, 1]).to(META)
    made = [
        accelerate.utils.concatenate([{"c": counts}, {"c": counts}])["c"],
        accelerate.utils.slice_tensors({"c": counts}, slice(0, 2))["c"],
        counts[:],
        counts.clone(),
        counts.repeat_interleave(2),
    ]
    assert not [one for one in made if isinstance(one, LanguageCounts)]
    for one in (*made, None, torch.ones(4), fm.LanguageCollator(lambda _: {}, SUBNETS.select(["de"]))([])):
        assert Route.of(ids, 3, counts=one).present is None
    assert Route.of(torch.tensor([0, 1]), 3, counts=counts).present == (0, 1)  # on the CPU the ids themselves tell


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_data_loader(workers):
    """What other processes collate arrives as it was made."""
    rows = [{"language": language} for language in COLUMN[:4]]
    collate = fm.LanguageCollator(lambda rest: {}, SUBNETS)
    found = list(DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=workers))
    assert [one["language_ids"].tolist() for one in found] == [[1, -1], [0, -1]]
    assert [one["language_counts"].present() for one in found] == [(-1, 1), (-1, 0)]


# ---- Trainer


def trained(tmp_path, column, values, tokenizer, **options):
    model = tiny("bert", "tokens").float().train()
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both"))
    rows = {"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]] * 2, column: values * 2}
    rows["labels"] = [[0] * len(row) for row in rows["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = Dataset.from_dict(rows)
    collate = fm.LanguageCollator(DataCollatorForTokenClassification(tokenizer), model, column)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return {"loss": torch.tensor(loss), **{name: p.detach() for name, p in model.named_parameters()}}


def test_trainer(tmp_path, tokenizer):
    """Names, and names collated by workers, train what ids train."""
    wanted = trained(tmp_path, "language_ids", [1, -1, 0, 2], tokenizer)
    names = ["fi", None, "de", "sw"]
    for column, options in (
        ("language", {}),
        ("language", {"dataloader_num_workers": 1}),
        ("lang", {"remove_unused_columns": False}),
    ):
        found = trained(tmp_path, column, names, tokenizer, **options)
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), (column, name)
    full = trained(tmp_path, "language", [None] * 4, tokenizer)
    assert not torch.equal(full["loss"], wanted["loss"])


def test_trainer_that_compiles(tmp_path, tokenizer):
    """What the collator makes goes into a compiled model, too."""
    torch._dynamo.reset()
    names = ["fi", "sw", "de", "sw"]
    wanted = trained(tmp_path, "language", names, tokenizer)
    found = trained(tmp_path, "language", names, tokenizer, torch_compile=True, torch_compile_backend="aot_eager")
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_trainer_drops_a_column_of_another_name(tmp_path, tokenizer):
    """Then the collator says which columns are left."""
    with pytest.raises(KeyError, match=r"unknown column 'lang'.*Known: input_ids, labels"):
        trained(tmp_path, "lang", ["fi"] * 4, tokenizer)


def test_a_model_takes_what_the_collator_makes():
    """A batch is handed on as it is."""
    model = tiny("bert")
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both"))
    made = fm.LanguageCollator(lambda rest: batch(2), model)([{"language": "fi"}, {"language": None}])
    assert torch.equal(model(**made)[0], model(**batch(2), language_ids=torch.tensor([1, -1]))[0])
    assert attached(model).router.running.route is None


def test_a_decoder_beside_what_is_no_text():
    """What a decoder reads is of the same call as sound or pictures: ids are not of the decoder's texts alone."""
    model = fm.attach(tiny("bert"), SUBNETS)

    def collate(rows):
        return {"input_features": torch.zeros(2, 3, 4), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}

    found = fm.LanguageCollator(collate, model)([{"language": "de"}, {"language": "fi"}])
    assert found["language_ids"].tolist() == [0, 1]
    assert "decoder_language_ids" not in found
