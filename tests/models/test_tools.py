"""Other people's trainers and evaluators, which are no requirements: skipped where they are not installed."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from tiny_models import multiplied, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

import fastmask as fm
from fastmask.models.attach import attached

LANGUAGES = ["de", "fi", "sw"]
COLUMN = ["de", "fi"] * 4
OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def tokenizer():
    words = {name: i for i, name in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", *[f"w{i}" for i in range(4, 50)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", bos_token="<s>"
    )


@pytest.fixture
def decoder(tmp_path, tokenizer):
    """A decoder that lies in a folder, where trainers look for its tokenizer."""
    model = tiny("llama", "causal").float()
    model.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "decoder")
    return fm.attach(model.train(), subnetworks(model))


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def languages_of_calls(model, monkeypatch):
    """A list that grows by the languages of every call of a model."""
    router, found = attached(model).router, []
    resolve = router.resolve

    def noted(*args):
        route = resolve(*args)
        ids = route.language_ids
        found.append(ids if isinstance(ids, int) else ids.tolist())
        return route

    monkeypatch.setattr(router, "resolve", noted)
    return found


@pytest.fixture(params=["fm.language", "fm.set_language"])
def in_finnish(request):
    """A function that runs another one in one language, said around it or of the model."""

    def run(model, function):
        if request.param == "fm.language":
            with fm.language(model, "fi"):
                return function()
        fm.set_language(model, "fi")
        return function()

    return run


# ---- TRL


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(params=["chunked_nll", "nll"])
def sft(trl, request, tmp_path, tokenizer, decoder):
    def make(**options):
        columns = {"text": ["w5 w6 w7", "w8 w9"] * 4, "language": COLUMN}
        arguments = trl.SFTConfig(
            str(tmp_path), max_length=16, bf16=False, loss_type=request.param, **OPTIONS, **options
        )
        data = Dataset.from_dict(columns)
        return trl.SFTTrainer(decoder, arguments, train_dataset=data, processing_class=tokenizer)

    return make


def test_sft_with_a_column(sft, decoder, monkeypatch):
    """The column goes through the trainer's own collator; `remove_unused_columns` would drop it, and then says so."""
    found = languages_of_calls(decoder, monkeypatch)
    before = copy.deepcopy(decoder.state_dict())
    trainer = sft(remove_unused_columns=False)
    trainer.data_collator = fm.LanguageCollator(trainer.data_collator, decoder)
    trainer.train()
    assert [len(ids) for ids in found] == [2, 2]
    assert {language for ids in found for language in ids} <= {0, 1}
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (decoder.state_dict()[name] != before[name]).any(1)
    neurons = attached(decoder).subnets.neurons
    assert not moved[~(neurons[0, 0] | neurons[1, 0])].any()
    assert moved.any()
    trainer = sft()
    trainer.data_collator = fm.LanguageCollator(trainer.data_collator, decoder)
    with pytest.raises(KeyError, match="unknown column 'language'"):
        trainer.train()


def test_sft_that_packs(sft, decoder, in_finnish, monkeypatch):
    """Packed rows have lost the column, which is an error; one language for all still works."""
    packed = {"packing": True, "packing_strategy": "wrapped", "remove_unused_columns": False}
    trainer = sft(**packed)
    trainer.data_collator = fm.LanguageCollator(trainer.data_collator, decoder)
    with pytest.raises(KeyError, match="unknown column 'language'"):
        trainer.train()
    found = languages_of_calls(decoder, monkeypatch)
    in_finnish(decoder, sft(**packed).train)
    assert set(found) == {1}


def test_sft_in_one_language(sft, decoder, in_finnish, monkeypatch):
    found = languages_of_calls(decoder, monkeypatch)
    in_finnish(decoder, lambda: sft().train())
    assert found == [1, 1]


def test_sft_without_a_language(sft):
    """A column that nothing takes is not ignored in silence."""
    with pytest.raises(ValueError, match="no language was given"):
        sft().train()


@pytest.fixture
def dpo(trl, tmp_path, tokenizer, decoder):
    def make(reference=None, **options):
        rows = {"prompt": ["w5 w6", "w8"] * 4, "chosen": ["w7", "w9"] * 4, "rejected": ["w10", "w11"] * 4}
        data = Dataset.from_dict({**rows, "language": COLUMN})
        arguments = trl.DPOConfig(str(tmp_path), bf16=False, **OPTIONS, **options)
        return trl.DPOTrainer(decoder, reference, args=arguments, train_dataset=data, processing_class=tokenizer)

    return make


def test_dpo_with_a_column(dpo, decoder, monkeypatch):
    """Chosen and rejected texts have the languages of their rows; a reference model has masks if it was given some."""
    reference = copy.deepcopy(decoder)
    found = [languages_of_calls(model, monkeypatch) for model in (decoder, reference)]
    trainer = dpo(reference, remove_unused_columns=False)
    trainer.data_collator = fm.LanguageCollator(trainer.data_collator, decoder, times=2)
    trainer.train()
    assert len(found[0]) == 2
    assert found[0] == found[1]
    for ids in found[0]:
        assert ids[:2] == ids[2:]
        assert set(ids) <= {0, 1}


def test_dpo_in_one_language(dpo, decoder, in_finnish, monkeypatch):
    found = languages_of_calls(decoder, monkeypatch)
    in_finnish(decoder, lambda: dpo().train())
    assert found == [1, 1]


def test_grpo(trl, tmp_path, tokenizer, decoder, in_finnish, monkeypatch):
    """Completions are sampled, and scored, in one language; a column does not reach the model."""

    def train():
        data = Dataset.from_dict({"prompt": ["w5 w6", "w8"] * 4, "language": COLUMN})
        arguments = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=3, bf16=False, **OPTIONS)

        def reward(completions, **_):
            return [float(len(text)) for text in completions]

        trl.GRPOTrainer(decoder, reward, args=arguments, train_dataset=data, processing_class=tokenizer).train()

    with pytest.raises(ValueError, match="no language was given"):
        train()
    found = languages_of_calls(decoder, monkeypatch)
    in_finnish(decoder, train)
    assert set(found) == {1}


# ---- sentence-transformers


@pytest.fixture
def sentences(tmp_path, tokenizer):
    """A sentence encoder of a masked BERT, the BERT, and the same without masks."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    plain = tiny("bert")
    plain.save_pretrained(tmp_path / "encoder")
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(tmp_path / "encoder")
    made = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu").double()
    inner = next(module for module in made.modules() if type(module).__name__ == "BertModel")
    return made, fm.attach(inner, subnetworks(inner)), plain


def test_encode(sentences, tokenizer, in_finnish):
    """Sentences are encoded in the language around `encode`."""
    made, inner, plain = sentences
    texts = ["w5 w6 w7", "w8 w9 w10"]
    found = torch.as_tensor(in_finnish(inner, lambda: made.encode(texts, convert_to_tensor=True)))
    inputs = dict(tokenizer(texts, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    wanted = multiplied(plain, subnetworks(plain), inputs, [1, 1]).mean(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def sentence_trainer(made, tmp_path, cached, **columns):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    rows = {"anchor": ["w5 w6", "w7"] * 4, "positive": ["w8", "w9 w10"] * 4, **columns}
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), **OPTIONS)
    loss = losses.MultipleNegativesRankingLoss(made)
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(made, mini_batch_size=1)
    return SentenceTransformerTrainer(made.float(), arguments, train_dataset=Dataset.from_dict(rows), loss=loss)


@pytest.mark.parametrize("cached", [False, True])
def test_sentences_with_a_column(sentences, tmp_path, cached, monkeypatch):
    """Each text of a row has the row's language, also where a loss runs the model again in the backward pass."""
    made, inner, _ = sentences
    found = languages_of_calls(inner, monkeypatch)
    trainer = sentence_trainer(made, tmp_path, cached, language=COLUMN)
    trainer.data_collator = fm.LanguageCollator(trainer.data_collator, inner)
    trainer.train()
    assert {language for ids in found for language in ids} == {0, 1}
    assert [len(ids) for ids in found] == ([1] * 16 if cached else [2] * 4)


def test_sentences_in_one_language(sentences, tmp_path, in_finnish, monkeypatch):
    made, inner, _ = sentences
    found = languages_of_calls(inner, monkeypatch)
    in_finnish(inner, sentence_trainer(made, tmp_path, False).train)
    assert found == [1] * 4


def test_a_loss_that_runs_the_model_again_in_the_backward_pass(sentences, tmp_path, in_finnish):
    """The language of the forward pass is not known there unless the batch says it; it is an error, and no guess."""
    made, inner, _ = sentences
    with pytest.raises(ValueError, match="called in a backward pass, and no language was given"):
        in_finnish(inner, sentence_trainer(made, tmp_path, True).train)


# ---- lm-eval


def test_lm_eval(decoder, tokenizer, in_finnish):
    """Likelihoods and texts are those of the language around the evaluation."""
    library = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    judge = library.HFLM(pretrained=decoder.eval(), tokenizer=tokenizer, device="cpu")
    scored = [Instance("loglikelihood", {}, ("w5 w6", " w7 w8"), 0)]
    asked = [Instance("generate_until", {}, ("w5 w6", {"until": ["w0"], "max_gen_toks": 3}), 0)]
    score = in_finnish(decoder, lambda: judge.loglikelihood(scored, disable_tqdm=True))[0][0]
    text = in_finnish(decoder, lambda: judge.generate_until(asked, disable_tqdm=True))[0]
    fm.set_language(decoder)
    prompt = torch.tensor([tokenizer("w5 w6 w7 w8")["input_ids"]])
    logs = decoder(input_ids=prompt, language="fi").logits.log_softmax(-1)
    wanted = logs[0, 1, prompt[0, 2]] + logs[0, 2, prompt[0, 3]]
    assert score == pytest.approx(wanted.item(), abs=1e-4)
    made = decoder.generate(prompt[:, :2], language="fi", max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.split() == tokenizer.decode(made[0, 2:]).split()


def test_auto_model_is_untouched():
    """Attaching to one model does not change the classes that others are made of."""
    model = tiny("bert")
    before = type(model)
    fm.attach(model, subnetworks(model))
    assert type(AutoModel.from_config(model.config)) is before
