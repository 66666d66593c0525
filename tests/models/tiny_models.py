"""Tiny Hugging Face models of every supported family, and the oracle for attached models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from fastmask import Subnetworks

ENCODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "attention_dropout": 0.0,
}
DISTIL = {
    "vocab_size": 50,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 20,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def tiny(model_type: str, head: str = "bare", attention: str = "sdpa", **changes: object):  # type: ignore[no-untyped-def]
    """A randomly initialised model, in float64 and eval mode."""
    options = DISTIL if model_type == "distilbert" else DECODER if model_type in DECODERS else ENCODER
    config = AutoConfig.for_model(model_type, **{**options, **changes})
    if model_type == "electra":
        config.embedding_size = 24
    auto = {"bare": AutoModel, "tokens": AutoModelForTokenClassification, "causal": AutoModelForCausalLM}[head]
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # biases start at zero and would hide a bias that is not gated
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch(size: int, length: int = 7) -> dict[str, Tensor]:
    """Random tokens with padding at the end of every second example."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def unit_masks(model, subnets: Subnetworks, language: int) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """{parameter name: 0/1 multiplier} of one language, written down by hand for each family."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    model_type = model.config.model_type
    multipliers: dict[str, Tensor] = {}
    layers = subnets.heads.shape[1] if subnets.heads is not None else subnets.neurons.shape[1]
    for layer in range(layers):
        if model_type == "distilbert":
            stem, qkv, out = f"transformer.layer.{layer}.", ("q_lin", "k_lin", "v_lin"), "attention.out_lin"
            qkv, up, down = [f"attention.{n}" for n in qkv], ["ffn.lin1"], "ffn.lin2"
        elif model_type in DECODERS:
            stem, out = f"layers.{layer}.", "self_attn.o_proj"
            qkv = [f"self_attn.{n}_proj" for n in "qkv"]
            up, down = ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"
        else:
            stem, out = f"encoder.layer.{layer}.", "attention.output.dense"
            qkv = [f"attention.self.{n}" for n in ("query", "key", "value")]
            up, down = ["intermediate.dense"], "output.dense"
        groups = []
        if subnets.heads is not None:
            groups.append((qkv, out, subnets.heads[language, layer]))
        if subnets.neurons is not None:
            groups.append((up, down, subnets.neurons[language, layer]))
        for makers, consumer, keep in groups:
            for name in makers:
                linear = model.get_submodule(prefix + stem + name)
                rows = keep.repeat_interleave(linear.out_features // len(keep)).double()
                multipliers[f"{prefix}{stem}{name}.weight"] = rows[:, None]
                if linear.bias is not None:
                    multipliers[f"{prefix}{stem}{name}.bias"] = rows
            linear = model.get_submodule(prefix + stem + consumer)
            columns = keep.repeat_interleave(linear.in_features // len(keep)).double()
            multipliers[f"{prefix}{stem}{consumer}.weight"] = columns[None, :]
    return multipliers


def multiplied(model, subnets: Subnetworks, inputs: dict[str, Tensor], ids: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
    """First output [B, ...] of the plain model, one example at a time, with its parameters multiplied by masks."""
    outputs = []
    for position, language in enumerate(ids):
        multipliers = unit_masks(model, subnets, language) if language >= 0 else {}
        parameters = {n: p * multipliers[n] if n in multipliers else p for n, p in model.named_parameters()}
        example = {name: value[position : position + 1] for name, value in inputs.items()}
        outputs.append(functional_call(model, parameters, (), example)[0])
    return torch.cat(outputs)
