"""Which tables the input of an encoder is made of."""

from __future__ import annotations

import pytest
from torch import nn

from fastmask.tasks.pretrained import input_embeddings
from tests.models.tiny_models import tiny

OF_BERT = ["embeddings.position_embeddings", "embeddings.token_type_embeddings", "embeddings.word_embeddings"]


@pytest.mark.parametrize(
    ("model_type", "head", "expected"),
    [
        ("bert", "bare", OF_BERT),
        ("xlm-roberta", "tokens", [f"roberta.{name}" for name in OF_BERT]),
        ("distilbert", "bare", [OF_BERT[0], OF_BERT[2]]),
        ("llama", "causal", ["model.embed_tokens"]),
        ("gpt2", "bare", ["wpe", "wte"]),
        ("t5", "bare", ["decoder.embed_tokens", "encoder.embed_tokens", "shared"]),
    ],
)
def test_of_families(model_type: str, head: str, expected: list[str]) -> None:
    """Pieces, positions and token types are found, under a head too; tables of relative positions are no input."""
    model = tiny(model_type, head)
    tables = set(input_embeddings(model))
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in tables]
    assert sorted(names) == expected


def test_a_model_without_any() -> None:
    """What has no table of pieces is named, and not taken for frozen."""
    with pytest.raises(ValueError, match="Linear has no input embeddings that are known"):
        input_embeddings(nn.Linear(2, 2))
