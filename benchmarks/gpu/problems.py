"""What the gate checks: sizes, masks, dtypes and models; the tests run them, and `launched` says what they launch."""

from __future__ import annotations

import torch

__all__ = [
    "ACTIVATIONS", "CASES", "DTYPES", "KINDS", "PACKED", "PROJECTIONS", "SHALLOW", "cases", "sides", "tiny_models",
]  # fmt: skip

KINDS = {"rows": ("rows", 1), "columns": ("columns", 1), "blocks64": ("blocks", 64), "blocks16": ("blocks", 16)}
KINDS["weights"] = ("weights", 1)
KINDS |= {"heads": ("rows", 64), "columns of heads": ("columns", 64)}
DTYPES = {  # of activations, of the weight
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),  # with PyTorch's switch for products turned on
    "master": (torch.bfloat16, torch.float32),
}
MIXED = [2, 0, 0, -1, 1, 2, 0]  # scattered; 1 owns nothing, 2 everything
# (languages, ids, tokens, N, K); blocks round N and K up to whole blocks
CASES = {
    "one of everything": (1, [0], 1, 1, 1),
    "tiny": (3, MIXED, 5, 7, 33),
    "narrow": (8, [7, 3, 3, 5, -1], 7, 33, 1),  # five languages are absent
    "odd": (3, MIXED, 33, 130, 515),
    "wide": (8, [6, 0, 7, 3, 0, 5, 4], 130, 515, 130),
    "aligned": (8, [7, 6, 5, 4, 3, 0, 0, 1], 128, 3072, 768),
    "alone": (1, [0, 0, 0, 0], 128, 768, 3072),
    # Large enough for every tile of the tables, and for what is only worth while where languages have many tokens.
    "modest": (2, [1, 0], 128, 192, 256),
    "large and odd": (2, [1, 0], 300, 1701, 1301),
    "short": (8, [7, 6, 5, 4, 3, 0, 0, 1], 16, 3072, 768),
    "middling": (2, [1, 0], 64, 1152, 1152),
    "half long": (2, [1, 0], 512, 2304, 2304),
    "long": (2, [1, 0], 1024, 2304, 2304),
    "turns": (8, [3, 1, 0, 2, 7, 5, 6, 4], 1024, 1024, 1024),
}
HEADS = ("odd", "aligned", "turns")
SHALLOW = ("one of everything", "tiny", "narrow")
PACKED = ("odd", "aligned")  # those that also run packed
ACTIVATIONS = ("gelu", "relu")  # of the input of packed columns
PROJECTIONS = ("wide", {1: (515, 320, 77), 64: (512, 320, 128)}, 130)  # a case's batch, rows by unit, columns


def cases() -> list[tuple[str, str]]:
    """What is checked: each kind of mask with its cases. Heads differ from other rows in their dW alone."""
    return [(kind, case) for kind in KINDS for case in CASES if "heads" not in kind or case in HEADS]


def sides(kind: str, N: int, K: int) -> tuple[int, int]:
    """N and K rounded up to whole units."""
    what, unit = KINDS[kind]
    return (N if what == "columns" else -(-N // unit) * unit), (K if what == "rows" else -(-K // unit) * unit)


def tiny_models() -> dict[str, object]:
    """Configurations of a BERT, and of a Llama with grouped-query attention."""
    from transformers import BertConfig, LlamaConfig

    return {
        "bert": BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        "llama": LlamaConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            head_dim=8, intermediate_size=40,
        ),
    }  # fmt: skip
