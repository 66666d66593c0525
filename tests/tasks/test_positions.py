"""How many positions a model takes, where its tokenizer does not say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from fastmask.tasks.pretrained import positions_of

ROWS = 18
SIZES = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": ROWS, "pad_token_id": 1, "mask_token_id": 2,
}  # fmt: skip
OTHERS = {
    "esm": {"position_embedding_type": "absolute"},
    "longformer": {"attention_window": [4]},
    "luke": {"entity_vocab_size": 5, "entity_emb_size": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
AFTER_THE_PADDING = [
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["bert", "electra", *AFTER_THE_PADDING])
def test_an_input_of_all_positions(model_type: str) -> None:
    """As many pieces as are said to fit do, and one more does not."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **OTHERS.get(model_type, {}))
    model = AutoModel.from_config(config).eval()
    room = positions_of(model, SimpleNamespace(model_max_length=int(1e30)))
    assert room == (ROWS - 2 if model_type in AFTER_THE_PADDING else ROWS)
    assert positions_of(model, SimpleNamespace(model_max_length=7)) == 7
    pieces = torch.randint(3, 30, (2, room + 1))
    with torch.no_grad():
        assert model(pieces[:, :room]).last_hidden_state.shape[1] == room
        with pytest.raises((IndexError, RuntimeError)):
            model(pieces)


def test_rotary_positions_have_no_padding() -> None:
    """ESM-2 has no table of positions, so nothing is taken off."""
    model = AutoModel.from_config(AutoConfig.for_model("esm", **SIZES, position_embedding_type="rotary"))
    assert positions_of(model, SimpleNamespace(model_max_length=int(1e30))) == ROWS


def test_without_a_table_as_many_as_the_tokenizer_says() -> None:
    """ALiBi and relative positions have no end; a config of parts says it in its part for text."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    bloom = AutoModel.from_config(AutoConfig.for_model("bloom", **sizes))
    assert positions_of(bloom, SimpleNamespace(model_max_length=1024)) == 1024
    assert bloom(torch.randint(30, (1, 700))).last_hidden_state.shape[1] == 700
    xlnet = AutoModel.from_config(
        AutoConfig.for_model("xlnet", vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    )
    assert xlnet.config.max_position_embeddings == -1
    assert positions_of(xlnet, SimpleNamespace(model_max_length=1024)) == 1024
