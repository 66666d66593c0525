"""What `make gpu` checks, and what it measures, in the order of what it is worth; and what must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases.op import PARTS
from benchmarks.row import BLOCKS, Job, Setting
from benchmarks.targets import BOTH_WAYS, Target

GRAPH, HOST = f"{BOTH_WAYS} graph", f"{BOTH_WAYS} host-time"
RIVALS = ("fastmask", "packed", "loop", "gating")  # packed: the vendor's grouped product over each language's live rows
_COMMON: dict[str, Any] = {"present": 8, "dtype": "bfloat16-parameters"}
_SMALL: dict[str, Any] = {"shape": "small", "batch": 8, "tokens": 8}  # so small that only the host's time counts


def _op(unit: str, *parts: str, names: tuple[str, ...] = RIVALS, peaks: bool = False, **more: Any) -> Job:
    """One weight of 4096 x 4096 on 16,384 tokens of eight languages."""
    sizes = _COMMON | {"shape": "square", "batch": 32, "tokens": 512} | more
    return Job(Setting("op", unit=unit, **sizes), names, parts or (BOTH_WAYS,), peaks)


def _encoder(*parts: str, names: tuple[str, ...] = RIVALS, peaks: bool = False, **more: Any) -> Job:
    """BERT-base layers on 8,192 tokens of eight languages."""
    return Job(Setting("encoder", **(_COMMON | {"batch": 64} | more)), names, parts, peaks)


_ROWS_AND_COLUMNS = ("neurons", "neuron-inputs", "heads", "head-inputs")
UNITS = {unit: _op(unit, *(PARTS if unit == "neurons" else ())) for unit in _ROWS_AND_COLUMNS}
LAYERS = _encoder(BOTH_WAYS, GRAPH, peaks=True)
BLOCKS_LEFT = {density: _op("blocks64", *PARTS[:3], density=density, present=1) for density in (0.9, 0.7, 0.5, 0.3)}
BITS = {n: _op("weights", *PARTS, names=("fastmask", "multiply", "loop"), peaks=True, present=n) for n in (1, 8)}
LAUNCHES = [
    _encoder(HOST, layers=1, **_SMALL),
    *(_op(unit, HOST, **_SMALL) for unit in (*_ROWS_AND_COLUMNS, "blocks64", "weights")),
]
SECTIONS: dict[str, list[Job]] = {
    "units": list(UNITS.values()),
    "encoder": [LAYERS],
    "blocks": list(BLOCKS_LEFT.values()),
    "bits": list(BITS.values()),
    "launches": LAUNCHES,
    "compiled": [
        _encoder(BOTH_WAYS, names=("fastmask", name), layers=1, compiled=True) for name in ("packed", "gating", "loop")
    ],
}
TARGETS: list[Target] = [
    *(Target(job, "over dense", 1.7) for job in UNITS.values()),
    *(Target(LAYERS, "over dense", 1.4, part) for part in (BOTH_WAYS, GRAPH)),
    *(Target(LAYERS, "speed", bound, against=(name,)) for name, bound in (("packed", 1), ("loop", 2), ("gating", 1))),
    *(Target(BLOCKS_LEFT[0.7], "over dense", 1.0, part) for part in ("forward", "dW")),
    *(Target(BITS[present], "over dense", 1 / time) for present, time in ((1, 1.15), (8, 1.25))),
    # y and dX of 128 MiB each, dW of 32 MiB, and one more copy of the weight.
    *(Target(job, "peak", 320 / 288) for job in BITS.values()),
    *(Target(job, "over dense", 0.5, HOST) for job in LAUNCHES),
]


def tiny(job: Job) -> Job:
    """A job to try the code out with, in Triton's interpreter on a CPU, which has no graphs."""
    sizes: dict[str, Any] = {"shape": "toy", "layers": 1, "languages": 2, "batch": 2, "tokens": 4, "dtype": "float32"}
    setting = replace(job.setting, **sizes, present=min(job.setting.present, 2), compiled=False)
    if setting.unit in BLOCKS:
        setting = replace(setting, unit="blocks32")
    return replace(job, setting=setting, parts=tuple(part for part in job.parts if part != GRAPH))


# ---- what the gate checks: masks, dtypes, sizes and models

KINDS = {
    "rows": ("rows", 1),
    "columns": ("columns", 1),
    "blocks64": ("blocks", 64),
    "blocks16": ("blocks", 16),
    "blocks128": ("blocks", 128),
    "weights": ("weights", 1),
    "heads": ("rows", 64),
    "columns of heads": ("columns", 64),
}
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
FEW, IN_FEW = ("heads", "columns of heads", "blocks128"), ("odd", "aligned", "turns")  # kinds in these cases only
SHALLOW = ("one of everything", "tiny", "narrow")
PACKED = ("odd", "aligned")  # those that also run packed
ACTIVATIONS = ("gelu", "relu")  # of the input of packed columns
PROJECTIONS = ("wide", {1: (515, 320, 77), 64: (512, 320, 128)}, 130)  # a case's batch, rows by unit, columns


def cases() -> list[tuple[str, str]]:
    """What is checked: each kind of mask with its cases.

    Heads differ from other rows in their dW alone, and blocks of 128 from those of 64 in their tiles.
    """
    return [(kind, case) for kind in KINDS for case in CASES if kind not in FEW or case in IN_FEW]


def sides(kind: str, N: int, K: int) -> tuple[int, int]:
    """N and K rounded up to whole units."""
    what, unit = KINDS[kind]
    return (N if what == "columns" else -(-N // unit) * unit), (K if what == "rows" else -(-K // unit) * unit)


def tiny_models() -> dict[str, object]:
    """Configurations of a BERT, and of a Llama with grouped-query attention."""
    from transformers import BertConfig, LlamaConfig

    common = {"vocab_size": 50, "num_hidden_layers": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertConfig(**common, **dropout, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return {"bert": bert, "llama": LlamaConfig(**common, **heads, hidden_size=48, intermediate_size=40)}
