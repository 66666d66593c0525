"""An encoder on disk so small that a cell of a comparison takes a moment to train and nothing takes long to write."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


def tiny_encoder(folder: Path, text: str, heads: int = 2) -> None:
    """A BERT of two layers that reads letters; a head has eight features, and a layer as many neurons as features."""
    letters = sorted({letter for letter in text if letter.isalpha()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names), hidden_size=8 * heads, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=8 * heads, max_position_embeddings=300, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
