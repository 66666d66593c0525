"""Tiny random models on disk, and tiny data, for each task: what `fastmask train --task` needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartModel, BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from fastmask.training.config import TrainConfig

LANGUAGES = ("aa", "bb", "cc")
UNSEEN = "dd"
SIZES = {"train": 24, "dev": 6, "test": 6}
WORDS = [f"{language}{number}" for language in (*LANGUAGES, UNSEEN) for number in range(8)]
TAGS = ("NOUN", "VERB", "ADJ")
SPANS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
LABELS = ("upos", "ner", "label", "gold", "target")


def save_tokenizer(folder: Path, around: bool = True) -> int:
    """A tokenizer of whole words (between two special pieces if `around`); returns how many pieces it has."""
    names = [*SPECIAL.values(), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = SPECIAL if around else {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    extra = {"eos_token": "[SEP]", "bos_token": "[CLS]"} if around else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **extra).save_pretrained(folder)
    return len(names)


def save_bert(folder: Path) -> None:
    """Two layers of two heads, without a pooling layer, as encoders often come."""
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def save_gpt2(folder: Path) -> None:
    """A decoder whose tokenizer has nothing to pad with."""
    size = save_tokenizer(folder, around=False)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    GPT2Model(config).save_pretrained(folder)


def save_bart(folder: Path) -> None:
    """An encoder and a decoder."""
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, dropout=0.1,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    BartModel(config).save_pretrained(folder)


@dataclass
class Case:
    """A task on tiny data.

    Attributes:
        task: its name.
        save: writes the model.
        columns: of the data, made of the words of a sentence and a generator.
        options: the task's settings.
        needs: a package that its score needs.
    """

    task: str
    save: Any
    columns: Any
    options: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None


def tags(words: list[str], random: np.random.Generator, names: tuple[str, ...]) -> list[str]:
    """A tag that depends on the word, with some noise."""
    return [names[(int(word[2:]) + (random.random() < 0.1)) % len(names)] for word in words]


CASES = {
    "tagging": Case("tagging", save_bert, lambda w, r: {"words": w, "upos": tags(w, r, TAGS)}),
    "spans": Case(
        "tagging",
        save_bert,
        lambda w, r: {"tokens": w, "ner": tags(w, r, SPANS)},
        {"text_column": "tokens", "label_column": "ner"},
        "seqeval",
    ),
    "classification": Case("classification", save_bert, lambda w, r: {"text": " ".join(w), "label": int(w[0][2:]) % 3}),
    "pairs": Case(
        "classification",
        save_bert,
        lambda w, r: {"premise": " ".join(w), "hypothesis": w[-1], "gold": ("no", "yes")[int(w[0][2:]) % 2]},
        {"text_column": "premise", "pair_column": "hypothesis", "label_column": "gold"},
    ),
    "masked": Case("lm", save_bert, lambda w, r: {"text": " ".join(w)}, {"mask_share": 0.3}),
    "causal": Case("lm", save_gpt2, lambda w, r: {"text": w}),
    "translation": Case(
        "translation",
        save_bart,
        lambda w, r: {"source": " ".join(w), "target": " ".join(reversed(w))},
        {"max_new_tokens": 6},
        "sacrebleu",
    ),
}


def rows_of(case: Case, language: str, split: str) -> list[dict[str, Any]]:
    """Rows of one language."""
    random = np.random.default_rng([ord(language[0]), len(split)])
    rows = []
    for _ in range(SIZES[split]):
        words = [f"{language}{number}" for number in random.integers(8, size=random.integers(2, 8))]
        rows.append({"language": language, **case.columns(words, random)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(name: str, folder: Path) -> Path:
    """Write data and model of a case below `folder`, once."""
    case = CASES[name]
    if case.needs:
        pytest.importorskip(case.needs)
    place = folder / name
    if not place.is_dir():
        for split in SIZES:
            rows = [row for language in (*LANGUAGES, UNSEEN) for row in rows_of(case, language, split)]
            write_rows(place / "data" / f"{split}.jsonl", rows)
        (place / "model").mkdir()
        case.save(place / "model")
    return place


def config_of(name: str, place: Path, out: Path, **changes: Any) -> TrainConfig:
    """Six steps of a case, with subnetworks from the third on."""
    given: dict[str, Any] = {
        "task": CASES[name].task, "task_options": CASES[name].options, "data": str(place / "data"),
        "languages": ",".join(LANGUAGES), "model": str(place / "model"), "out": str(out), "steps": 6, "batch_size": 6,
        "discover_at": 0.34, "density": 0.5, "score_sentences": 4, "dev_sentences": 3, "eval_every": 0, "log_every": 1,
        "checkpoint_every": 2, "update_every": 2, "update_sentences": 2, "threads": 1, "lr": 1e-2, "encoder_lr": 3e-3,
        "inner_steps": 1, "support_sentences": 2, "query_sentences": 2,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})
