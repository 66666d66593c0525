"""What a head and a neuron are in each supported Transformer family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from fastmask.subnetworks.geometry import Geometry

__all__ = ["Family", "LayerParts", "family_of", "layer_parts", "supported_model_types"]


@dataclass(frozen=True)
class Family:
    """Where the projections are: `layers` under the base model, the others under one layer."""

    layers: str
    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    activation: str | None = None  # the module between up and down, where it stands alone


_BERT = Family(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
)
_DISTILBERT = Family(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
    activation="ffn.activation",
)
_LLAMA = Family(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)

_FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}


def supported_model_types() -> list[str]:
    """The `config.model_type`s that `attach` knows."""
    return sorted(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: the model is not of a supported family; the message names them.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _FAMILIES:
        what = type(model).__name__ + (f" (model type {model_type!r})" if model_type else ", which has no config")
        raise ValueError(f"cannot attach to {what}; supported model types: {', '.join(supported_model_types())}")
    return _FAMILIES[model_type]


@dataclass(frozen=True)
class LayerParts:
    """One layer's projections as full module names, and the sizes of a unit in rows or columns.

    `heads_rows` maps the projections that make heads to the rows one unit takes in each (query heads of one key/value
    group are one unit); `heads_columns` is the projection that consumes them. Likewise for neurons, of size 1, with the
    module that computes their activation, if it stands alone.
    """

    heads_rows: dict[str, int]
    heads_columns: tuple[str, int]
    neurons_rows: tuple[str, ...]
    neurons_columns: str
    activation: str | None


def layer_parts(model: nn.Module) -> list[LayerParts]:
    """The parts of each layer of `model` (bare or under a task head), with names relative to `model`."""
    family = family_of(model)
    base = cast(Any, model).base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    groups = Geometry.of(model.config).heads
    parts = []
    for index in range(len(base.get_submodule(family.layers))):
        stem = f"{prefix}{family.layers}.{index}."

        def unit(name: str, side: str, stem: str = stem) -> int:
            size: int = getattr(model.get_submodule(stem + name), side)
            return size // groups

        rows = {stem + name: unit(name, "out_features") for name in (family.query, family.key, family.value)}
        columns = (stem + family.output, unit(family.output, "in_features"))
        activation = None if family.activation is None else stem + family.activation
        parts.append(
            LayerParts(rows, columns, tuple(stem + name for name in family.up), stem + family.down, activation)
        )
    return parts
