"""Translation: what the decoder reads, codes of languages, and chrF."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_tasks import CASES, config_of, rows_of
from transformers import (
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

from fastmask.settings import ConfigError
from fastmask.tasks.transformers_task import Examples

pytest.importorskip("sacrebleu")
from fastmask.tasks.translation import Translation, TranslationSettings


@pytest.fixture
def translator(tiny, tmp_path):
    """A translator that has learnt nothing."""
    config = config_of("translation", tiny("translation"), tmp_path / "run")
    return Translation.build(config, Translation.load(config.data, config.languages, config.task_settings))


def test_the_decoder_reads_the_target_shifted_by_one(translator):
    """The decoder reads the target shifted by one, and padding does not count."""
    rows = [{"source": "aa1", "target": "aa2 aa3"}, {"source": "aa1 aa2", "target": "aa4"}]
    batch = translator.collate(translator.examples(rows))
    a2, a3, a4 = translator.tokenizer.convert_tokens_to_ids(["aa2", "aa3", "aa4"])
    assert batch["labels"].tolist() == [[2, a2, a3, 3], [2, a4, 3, -100]]
    assert batch["decoder_input_ids"].tolist() == [[3, 2, a2, a3], [3, 2, a4, 3]]
    assert torch.equal(batch["decoder_input_ids"], _literal_shift(batch["labels"]))


def _literal_shift(labels):
    return torch.tensor([[3, *(0 if label == -100 else label for label in row[:-1])] for row in labels.tolist()])


def test_models_without_a_shift_of_their_own_get_one(translator):
    """A model that does not shift its labels itself gets them shifted."""

    class Bare:
        def __init__(self, model):
            self.config, self.training = model.config, False

    labels = torch.tensor([[2, 9, 3, -100], [2, 9, 9, 3]])
    bare = Translation(translator.model, translator.tokenizer, translator.options)
    bare.model = Bare(translator.model)
    assert torch.equal(bare._shifted(labels), _literal_shift(labels))


def test_chrf_is_over_all_rows_with_a_translation(translator):
    """The chrF score is of the whole corpus, without rows that have no translation."""
    from sacrebleu.metrics import CHRF

    rows = [{"source": "a", "target": "one two"}, {"source": "a"}, {"source": "a", "target": "three"}]
    found = translator.score(Examples([{"input_ids": [1]}] * 3, rows), ["one to", "nothing", "three"])
    assert found == {"chrf": pytest.approx(CHRF().corpus_score(["one to", "three"], [["one two", "three"]]).score)}
    assert 0 < found["chrf"] < 100
    as_lists = [{**row, "target": row["target"].split()} if "target" in row else row for row in rows]
    assert translator.score(Examples([{"input_ids": [1]}] * 3, as_lists), ["one to", "nothing", "three"]) == found
    with pytest.raises(ValueError, match="no row has a translation to score against"):
        translator.score(Examples([{"input_ids": [1]}], [{"source": "a"}]), ["x"])


def test_generation_follows_the_settings(translator):
    """Translations do not depend on the order of rows, and are no longer than asked for."""
    examples = translator.examples(rows_of(CASES["translation"], "aa", "test"))
    translator.model.config.forced_eos_token_id = translator.model.generation_config.forced_eos_token_id = None
    found = translator.predict(examples)
    assert found == translator.predict(examples, batch_size=1)
    assert max(len(text.split()) for text in found) <= 6


@pytest.mark.parametrize("cls", [MBartTokenizer, MBart50Tokenizer, NllbTokenizer])
def test_codes_of_languages(cls, tmp_path):
    """Codes from settings or columns reach the tokenizer, and a translation begins with its code."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b", "▁", *"abcdefghij"]
    if cls is NllbTokenizer:
        merges = [("▁", "a"), ("▁", "b")]
        tokenizer = cls(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
        source, *targets = "eng_Latn", "fra_Latn", "deu_Latn"
    else:
        tokenizer = cls(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
        source, *targets = "en_XX", "fr_XX", "de_DE"
    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=len(tokenizer) + 10, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    options = TranslationSettings(source_code=source, target_code="to", max_new_tokens=4)
    written = Translation(MBartForConditionalGeneration(config).eval(), tokenizer, options)
    written.save(tmp_path)
    task = Translation.open(tmp_path)

    rows = [{"source": "a b", "target": "b", "to": to} for to in (targets[0], targets[1], targets[0])]
    examples = task.examples(rows)
    number = dict(zip([source, *targets], task.tokenizer.convert_tokens_to_ids([source, *targets]), strict=True))
    last = cls is MBartTokenizer
    assert [item["input_ids"][-1 if last else 0] for item in examples] == [number[source]] * 3
    assert [item["labels"][-1 if last else 0] for item in examples] == [number[row["to"]] for row in rows]
    batch = task.collate(examples)
    first = batch["decoder_input_ids"][:, :2].tolist()
    end = task.tokenizer.eos_token_id
    assert [ids[0] for ids in first] == [number[row["to"]] if last else end for row in rows]
    assert [ids[1] for ids in first] == [batch["labels"][i, 0].item() for i in range(3)]

    began: list[Any] = []
    generate = task.model.generate

    def watched(**given: Any) -> Any:
        made = generate(**given)
        began.append((len(made), made[0, : 1 if last else 2].tolist()))
        return made

    task.model.generate = watched
    assert len(task.predict(examples)) == 3
    begins = [[number[to]] if last else [config.decoder_start_token_id or end, number[to]] for to in targets]
    assert [count for count, _ in began] == [2, 1]
    assert [ids[-1] for _, ids in began] == [ids[-1] for ids in begins]
    with pytest.raises(ValueError, match="to says nothing of the language of"):
        task.examples([rows[1], {**rows[1], "to": None}])
    with pytest.raises(ValueError, match="'qq_QQ' is neither a column nor a language code"):
        task.examples([{**rows[0], "to": "qq_QQ"}])


def test_codes_need_a_tokenizer_that_knows_some(translator):
    """Codes are refused where the tokenizer does not know any."""
    with pytest.raises(ConfigError, match="knows no language codes"):
        Translation(translator.model, translator.tokenizer, TranslationSettings(target_code="de_DE"))


@pytest.mark.parametrize("codes", [("eng", "fra_Latn"), ("eng_Latn", "en"), ("eng_Latn", "code")])
def test_a_piece_is_no_code(codes):
    """Any piece of the vocabulary would be taken for a language, and stand in front of every sentence."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "en", "eng", "code"]
    tokenizer = NllbTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **sizes, **heads))
    options = TranslationSettings(source_code=codes[0], target_code=codes[1])
    with pytest.raises(ValueError, match=r"is neither a column nor a language code"):
        Translation(model, tokenizer, options).examples([{"source": "a b", "target": "b"}])


def test_long_targets_are_cut_with_a_warning(translator):
    """As long sources are."""
    with pytest.warns(UserWarning, match=r"1 of 1 .* may be cut"):
        (found,) = translator.examples([{"source": "aa1", "target": " ".join(["aa2"] * 100)}])
    assert len(found["labels"]) == 64
