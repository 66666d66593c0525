"""Where the units of known Transformer layouts are: names of projections, as data.

A layout is told by the names of its projections, not by the model's type, so whatever is built in the same way is
known, too. `structure` looks for these names in a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Projections:
    """The projections around the units of an attention or of an FFN, by their names below the module that holds them.

    They are linear layers; in a module of experts, parameters of those names that hold all experts, [experts, ...].

    Args:
        rows: the projections whose output features belong to units: query, key and value of heads, in this order, or
            the one that computes all three; query and key-value of latent attention; gate and up, or up, of neurons.
            The query alone makes every query head a unit of its own, also where several read one key and value; keys
            and values are then nobody's, and always computed.
        columns: the projection that reads the units: the attention's output, the FFN's down projection.
        fused: of a single projection for query, key and value: "parts" where it computes all queries, then all keys,
            then all values; "units" where those of a head lie together. (Gate and up of neurons are told by size.)
        activation: the module between up and down, if it stands alone and nothing but down reads it: its work is then
            done where down is computed.
    """

    rows: tuple[str, ...]
    columns: str
    fused: str = ""
    activation: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, str) or not self.rows or not all(isinstance(name, str) for name in self.rows):
            raise ValueError(f"expected rows as a tuple of module names, given {self.rows!r}")
        if not isinstance(self.columns, str) or not self.columns:
            raise ValueError(f"expected columns as a module name, given {self.columns!r}")
        if self.fused not in ("", "parts", "units"):
            raise ValueError(f"fused must be 'parts' or 'units', or '' for none, given {self.fused!r}")


@dataclass(frozen=True)
class Family:
    """The layouts of a model: of its attentions and of its FFNs (encoder and decoder may have different ones).

    Args:
        attention: layouts that are looked for, the first that fits a module is taken; () if heads cannot be masked.
        ffn: the same for neurons.
    """

    attention: tuple[Projections, ...] = ()
    ffn: tuple[Projections, ...] = ()

    def __post_init__(self) -> None:
        for name in ("attention", "ffn"):
            given = getattr(self, name)
            layouts = (given,) if isinstance(given, Projections) else given
            if not isinstance(layouts, tuple) or not all(isinstance(layout, Projections) for layout in layouts):
                raise ValueError(f"expected {name} as fastmask.Projections, or a tuple of them, given {given!r}")
            object.__setattr__(self, name, layouts)


def _qkv(query: str, key: str, value: str, *outputs: str) -> tuple[Projections, ...]:
    return tuple(Projections((query, key, value), output) for output in outputs)


KNOWN = Family(
    attention=(
        *_qkv("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense", "Wo"),  # Llama, BART, Phi
        *_qkv("self.query", "self.key", "self.value", "output.dense"),  # BERT
        *_qkv("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),  # DeBERTa-v2
        *_qkv("query", "key", "value", "dense"),  # ALBERT
        *_qkv("q", "k", "v", "o"),  # T5, MPNet
        *_qkv("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT, XLM
        *_qkv("linear_q", "linear_k", "linear_v", "linear_out"),  # Conformer
        *_qkv("query_proj", "key_proj", "value_proj", "out_proj"),  # ProphetNet
        *_qkv("attention.query", "attention.key", "attention.value", "output.dense"),  # Q-Former
        *_qkv("Wq", "Wk", "Wv", "dense"),  # CTRL
        *_qkv("project_q", "project_k", "project_v", "attention_out"),  # CPM-Ant
        *_qkv("q_head", "k_head", "v_head", "post_proj"),  # Funnel
        Projections(("Wqkv",), "Wo", "parts"),  # ModernBERT
        Projections(("Wqkv",), "out_proj", "parts"),  # MPT
        Projections(("qkv_proj",), "o_proj", "parts"),  # Phi-3
        Projections(("c_attn",), "c_proj", "parts"),  # GPT-2
        Projections(("query_key_value",), "dense", "units"),  # BLOOM, GPT-NeoX, Falcon
        Projections(("self.in_proj",), "output.dense", "units"),  # DeBERTa
        Projections(("q_b_proj", "kv_b_proj"), "o_proj"),  # latent attention: DeepSeek-V2 and later
        Projections(("q_proj", "kv_b_proj"), "o_proj"),
    ),
    ffn=(
        Projections(("gate_proj", "up_proj"), "down_proj"),  # Llama
        Projections(("gate_up_proj",), "down_proj"),  # Phi-3, GLM
        Projections(("up_proj",), "down_proj"),  # Nemotron
        Projections(("intermediate.dense",), "output.dense", activation="intermediate.intermediate_act_fn"),  # BERT
        Projections(("lin1",), "lin2", activation="activation"),  # DistilBERT, XLM
        Projections(("fc1",), "fc2"),  # BART
        Projections(("wi_0", "wi_1"), "wo"),  # mT5
        Projections(("wi",), "wo"),  # T5
        Projections(("Wi",), "Wo"),  # ModernBERT
        Projections(("c_fc_0", "c_fc_1"), "c_proj"),  # EXAONE
        Projections(("c_fc",), "c_proj"),  # GPT-2
        Projections(("dense_h_to_4h",), "dense_4h_to_h"),  # BLOOM, GPT-NeoX, Falcon
        Projections(("intermediate_dense",), "output_dense"),  # wav2vec 2.0
        Projections(("fc_in",), "fc_out"),  # GPT-J
        Projections(("w1", "w3"), "w2"),  # LFM2
        Projections(("linear1",), "linear2"),  # Conformer
        Projections(("linear_1",), "linear_2"),  # Funnel
        Projections(("layer_1",), "layer_2"),  # XLNet
        Projections(("intermediate",), "output"),  # ProphetNet
        Projections(("intermediate_query.dense",), "output_query.dense"),  # Q-Former
        Projections(("ffn",), "ffn_output"),  # ALBERT
        Projections(("ffn.0",), "ffn.2"),  # CTRL
        Projections(("w_in.w_0", "w_in.w_1"), "w_out"),  # CPM-Ant
        Projections(("proj_up_gate", "proj_up"), "proj_down"),  # xLSTM
        Projections(("input_linear",), "output_linear"),  # Granite's shared experts
    ),
)
"""All layouts that are looked for."""

_registered: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Have `attach` look for the layouts of `family` first in models of a type; the known ones come after them.

    Args:
        model_type: `config.model_type` of a Hugging Face model.
        family: where its heads and neurons are.

    Raises:
        ValueError: something else is given.
    """
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"expected model_type as a non-empty string, given {model_type!r}")
    if not isinstance(family, Family):
        raise ValueError(f"expected a fastmask.Family, given {type(family).__name__}")
    _registered[model_type] = family


def family_of(model: nn.Module) -> Family:
    """The layouts to look for in a model, in this order: those registered for its type, and all known ones."""
    own = _registered.get(getattr(getattr(model, "config", None), "model_type", None) or "", Family())
    return Family(own.attention + KNOWN.attention, own.ffn + KNOWN.ffn)
