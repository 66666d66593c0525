"""Tiny models of every model type of the installed transformers, and whether subnetworks on them are right.

`python tests/models/every_model.py` prints the table of docs/models.md.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

import fastmask as fm
from fastmask.models.attach import attached
from fastmask.models.proof import ProofError, short, working_inputs
from fastmask.models.structure import Structure, is_conv1d, kept_of, structure_of

KINDS = {
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
}
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_feat_extract_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 24),
    **dict.fromkeys(("hidden_dim", "ffn_hidden_size", "d_inner", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "num_conv_pos_embeddings"), 4),
    **dict.fromkeys(("num_mel_bins", "input_feat_per_channel"), 8),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id", "sep_token_id"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_conv_pos_embedding_groups", "eos_token_id", "num_key_value_heads", "type_vocab_size"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "vocab_size": 60,
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "apply_spec_augment": False,
}  # fmt: skip
LANGUAGES = ["aa", "bb", "cc"]
MODELS = [
    ("bert", "BertForMaskedLM"),
    ("llama", "LlamaForCausalLM"),
    ("modernbert", "ModernBertForMaskedLM"),
    ("mbart", "MBartForConditionalGeneration"),
    ("mt5", "MT5ForConditionalGeneration"),
    ("gpt2", "GPT2LMHeadModel"),
    ("phi3", "Phi3ForCausalLM"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"),
]
"""One of each sort, for tests that every sort must pass."""
IDS = [1, 0, -1]
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-3}  # many models compute norms in float32, whatever their dtype


def all_types() -> Iterator[tuple[str, str, str]]:
    """(model type, what for, class name) of every language and speech model."""
    for what, name in KINDS.items():
        for model_type, classes in getattr(modeling_auto, name).items():
            yield model_type, what, classes if isinstance(classes, str) else classes[0]


def tiny_model(model_type: str, class_name: str, **changes: Any) -> Any:
    """A random model of some thousand parameters, float64, in evaluation mode.

    Raises whatever the type's own code raises for sizes that are like those of other types.
    """
    kind = CONFIG_MAPPING[model_type]
    names = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    aliases = getattr(kind, "attribute_map", {})
    given: dict[str, Any] = {}
    for name, value in {**SIZES, **changes}.items():
        if name in names or name in aliases:
            given.setdefault(aliases.get(name, name), value)
    try:
        config = kind(**given)
    except Exception:
        config = kind()
    _shrink(config)
    for name, value in changes.items():
        setattr(config, name, value)
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        part._experts_implementation = "eager"  # the grouped products take no float64
    if getattr(config, "qk_rope_head_dim", None):  # latent attention shares no keys
        config.num_key_value_heads, config.head_dim = config.num_attention_heads, config.qk_rope_head_dim
    if getattr(config, "rotary_dim", None):
        config.rotary_dim = 4
    if model_type == "xmod":
        config.languages, config.default_language = ["en_XX"], "en_XX"
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > 20_000_000:
        raise ValueError(f"{size} parameters: its sizes have names of their own")
    torch.manual_seed(0)
    model = cls(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def _shrink(config: Any) -> None:
    for name, value in SIZES.items():
        name = config.attribute_map.get(name, name)
        if name in vars(config) and not isinstance(vars(config)[name], list | dict | PretrainedConfig):
            try:
                setattr(config, name, value)
            except Exception:
                continue
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif "layer" in name and isinstance(value, list) and len(value) > 2:
            setattr(config, name, value[:2])


def made(names: tuple[str, str] = MODELS[0], density: float = 0.5, seed: int = 3) -> Any:
    """A tiny model, random subnetworks of all its units, and arguments that it runs with."""
    model = tiny_model(*names)
    inputs, _ = working_inputs(model)
    units = units_of(structure_of(model))
    return model, fm.Subnetworks.random(model, LANGUAGES, density, seed=seed, units=units), inputs


def units_of(structure: Structure) -> str:
    """What can be masked of a model."""
    return "both" if structure.attentions and structure.ffns else "heads" if structure.attentions else "neurons"


def masked_parameters(model: Any, subnets: fm.Subnetworks, language: int) -> dict[str, Tensor]:
    """The parameters of a plain model, by name, multiplied by one language's masks; all of -1, the full network."""
    parameters = dict(model.named_parameters())
    dtype = next(model.parameters()).dtype
    for _, group, keep in structure_of(model).masked(subnets) if language >= 0 else ():
        if group.stacked:
            parameters |= _of_experts(model, group.name, keep[language], parameters)
            continue
        for name, unit in group.projections.items():
            flags = kept_of(keep[language], unit).to(dtype)
            by_rows = (name in group.rows) != is_conv1d(model.get_submodule(name))
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] * (flags[:, None] if by_rows else flags)
            if name in group.rows and f"{name}.bias" in parameters:
                parameters[f"{name}.bias"] = parameters[f"{name}.bias"] * flags
    return parameters


def _of_experts(model: Any, name: str, keep: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of experts, multiplied by a mask over their neurons: what is known of them, by hand."""
    turns = model.config.model_type == "gpt_oss"  # gate 0, up 0, gate 1, up 1, ...
    transposed = model.config.model_type in ("gpt_oss", "aria_text", "openai_privacy_filter")  # [experts, in, out]
    twice = keep.repeat_interleave(2) if turns else keep.repeat(2)
    of_outputs, of_inputs = ((-1,), (-1, 1)) if transposed else ((-1, 1), (-1,))
    flags = {
        "up_proj": keep.view(of_outputs),
        "gate_up_proj": twice.view(of_outputs),
        "gate_up_proj_bias": twice,
        "down_proj": keep.view(of_inputs),
    }
    names = {f"{name}.{part}": flag for part, flag in flags.items() if f"{name}.{part}" in parameters}
    return {part: parameters[part] * flag for part, flag in names.items()}


@torch.no_grad()
def times_masks(model: Any, subnets: fm.Subnetworks, language: int) -> Any:
    """A copy of a plain model with one language's masks multiplied into its weights."""
    plain = copy.deepcopy(model)
    masked = masked_parameters(model, subnets, language)
    for name, parameter in plain.named_parameters():
        parameter.copy_(masked[name])
    return plain


def multiplied(model: Any, subnets: fm.Subnetworks, inputs: dict[str, Any], ids: list[int]) -> list[Tensor]:
    """The first output of each example, from the plain model with its parameters multiplied by masks."""
    outputs = []
    for row, language in enumerate(ids):
        example = {n: v[row : row + 1] if isinstance(v, Tensor) else v for n, v in inputs.items()}
        parameters = masked_parameters(model, subnets, language)
        outputs.append(first_of(functional_call(model, parameters, (), example)))
    return outputs


def quiet(call: Any, *args: Any, **options: Any) -> Any:
    """Call it, and let it warn of what is not packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **options)


def first_of(output: Any) -> Tensor:
    """The first floating-point tensor of a model's output."""
    values = output.values() if hasattr(output, "values") else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Outputs of the same weights: equal in float64 to rounding, as MKL may sum by where a weight lies in memory."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@dataclass
class Verdict:
    """What became of one model type: right (how its units run), refused (why), wrong (by how much), or not built."""

    word: str
    detail: str


def verdict(model_type: str, class_name: str, **changes: Any) -> Verdict:
    """Try a mixed batch on a tiny model: outputs and every gradient."""
    try:
        model = tiny_model(model_type, class_name, **changes)
    except Exception as error:
        return Verdict("not built", short(error))
    inputs, failure = working_inputs(model)
    if inputs is None:  # some have constants that fit float32 only
        inputs, _ = working_inputs(model.float())
    if inputs is None:
        return Verdict("not run", failure)
    try:
        structure = structure_of(model)
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units=units_of(structure))
        fm.detach(fm.attach(model, subnets))
    except ProofError as error:
        return Verdict("refused", str(error).split(": ", 1)[1])
    except ValueError as error:
        return Verdict("refused", str(error).split(". Say where")[0].split("): ")[-1].split(": quantised")[0])
    expected = multiplied(model, subnets, inputs, IDS)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(e.shape, generator=generator, dtype=e.dtype) for e in expected]
    sum((e * u).sum() for e, u in zip(expected, upstream, strict=True)).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    fm.attach(model, subnets)
    got = first_of(model(**inputs, language_ids=torch.tensor(IDS)))
    got = got.reshape(len(IDS), -1)
    rows = [e.reshape(-1) for e in expected]
    (got * torch.stack([u.reshape(-1) for u in upstream])).sum().backward()
    error = max(float((g - r).abs().max() / r.abs().max()) for g, r in zip(got, rows, strict=True))
    worst = error
    for name, parameter in model.named_parameters():
        want = wanted[name]
        if want is None or parameter.grad is None or not parameter.numel():
            other = want if want is not None else parameter.grad
            worst = max(worst, 0.0 if other is None or not other.numel() else float(other.abs().max()))
        else:
            worst = max(worst, float((parameter.grad - want).abs().max() / want.abs().max().clamp(min=1e-3)))
    if not worst < TOLERANCE[got.dtype]:
        return Verdict("WRONG", f"output off by {error:.1e}, gradients by {worst:.1e}")
    unpacked = attached(model).unpacked
    experts = [group for group in structure.ffns if group.stacked]
    there = {"heads": structure.attentions, "neurons": len(structure.ffns) > len(experts), "experts": experts}
    names = " and ".join(", ".join(name for name in there if there[name]).rsplit(", ", 1))
    places = {group.place for kind in ("heads", "neurons") for group in structure.groups(kind)}
    how = "packed" if not unpacked else "unpacked" if set(unpacked) == places else "partly packed"
    return Verdict(how, names if how != "partly packed" else f"{names}; not packed: {', '.join(unpacked)}")


def main() -> None:
    """Print what becomes of every type as the page docs/models.md, or of those given, a line each."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sharing: dict[str, list[tuple[str, str]]] = {}  # class -> its types, and what for
    for model_type, what, class_name in sorted(all_types()):
        sharing.setdefault(class_name, []).append((model_type, what))
    found: dict[str, tuple[str, str, Verdict]] = {}
    for class_name, types in sharing.items():
        model_type, what = next((of for of in types if of[0] in sys.argv[1:]), types[0])
        if sys.argv[1:] and model_type not in sys.argv[1:]:
            continue
        try:
            of = verdict(model_type, class_name)
        except Exception as error:
            of = Verdict("CRASH", short(error))
        names = ", ".join(dict.fromkeys(f"`{name}`" for name, _ in types))
        found[class_name] = names, what, of
        print(f"{model_type}: {class_name}: {of.word}: {of.detail}", file=sys.stderr, flush=True)
    if sys.argv[1:]:
        return
    words = [of.word for _, _, of in found.values()]
    right = sum(words.count(word) for word in ("packed", "partly packed", "unpacked"))
    experts = sum("experts" in of.detail.split(";")[0] for _, _, of in found.values())
    types = len({model_type for of in sharing.values() for model_type, _ in of})
    about = {"version": transformers.__version__, "tried": len(words), "right": right, "experts": experts}
    about["types"] = types
    print(PAGE.format(**about, **_counts(words)))
    for names, what, of in found.values():
        if of.word not in ("not built", "not run"):
            print(f"| {names} | {what} | {of.word} | {of.detail.replace('|', '/')} |")
    missing = dict.fromkeys(names for names, _, of in found.values() if of.word in ("not built", "not run"))
    print(f"\nNot tried, because no small model of them could be built or run here: {', '.join(missing)}.")


def _counts(words: list[str]) -> dict[str, int]:
    names = ("packed", "partly packed", "unpacked", "refused", "WRONG", "CRASH")
    return {name.replace(" ", "_").lower(): words.count(name) for name in names}


PAGE = """# Models

`fastmask.attach` finds heads and neurons by the names and shapes of modules, and checks on a tiny batch that its layers
give what weights multiplied by masks would. This page is generated
(`python tests/models/every_model.py > docs/models.md`). It tries the {tried} classes that transformers {version} has
for its {types} types of language and speech models: a tiny random model runs a batch of three languages (one of them
the full network), and the output and the gradient of every parameter are checked.

- **packed** ({packed}): dead heads and neurons are not computed, but in mixed batches on a CPU that are multiplied
  faster whole.
- **partly packed** ({partly_packed}): some places are not packed, mostly attention code that requires a fixed
  number of heads. There, projections skip dead units, which are then zeros; results are just as correct.
- **unpacked** ({unpacked}): nothing is packed.
- **refused** ({refused}): `attach` says why. **Wrong: {wrong}.** Crashed: {crash}.

{right} of {tried} are right; those that could not be tried are listed at the end. `heads` are attention
heads, or key/value groups under grouped-query attention. `experts` ({experts} classes) are neurons of routed
experts: a language owns the same ones in every expert of a layer. Shared experts are separate FFNs.

| model type | as | units | what |
|---|---|---|---|"""


if __name__ == "__main__":
    main()
