"""The network of one language by itself: what it has and costs, and as a plain model.

`summary` counts, `merge` multiplies its masks into a copy, `extract` also leaves out what is dead.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models.attach import Attached, attached, detach, owner_of
from fastmask.models.experts import AttachedExperts
from fastmask.models.layers import AttachedLinear
from fastmask.models.structure import UnitGroup, is_conv1d, kept_of, structure_of


@dataclass(frozen=True)
class Part:
    """What is live of some masked weights, in one language.

    Attributes:
        parameters: live weights and biases.
        all_parameters: those of the full network.
        flops: floating-point operations of their products for one token, forward; of experts, of as many as the config
            says a token goes to.
        n_bytes: of the live parameters in memory.
    """

    parameters: int = 0
    all_parameters: int = 0
    flops: int = 0
    n_bytes: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Summary:
    """What `summary` found; prints as a table.

    Attributes:
        languages: {language: live part of everything masked}.
        layers: {module name: {language: live part}} of every masked layer.
        unmasked: parameters that no mask touches (embeddings, norms, heads of tasks); each language uses them all.
        trainable: parameters that require gradients, masked or not.
        unpacked: {place: why} where units cannot be packed (see `attach`).
    """

    languages: dict[str, Part]
    layers: dict[str, dict[str, Part]]
    unmasked: int
    trainable: int
    unpacked: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = _table("language", self.languages)
        lines.append(f"unmasked, in every language: {self.unmasked:,}; trainable in all: {self.trainable:,}")
        lines += [f"not packed: {place} ({why})" for place, why in self.unpacked.items()]
        return "\n".join(lines)

    def by_layer(self) -> str:
        """The same table for every masked layer, each language in a line."""
        parts = {f"{layer} {name}": part for layer, of in self.layers.items() for name, part in of.items()}
        return "\n".join(_table("layer", parts))


def _table(head: str, parts: dict[str, Part]) -> list[str]:
    width = max(len(head), *(len(name) for name in parts))
    return [
        f"{head:<{width}} {'live parameters':>16} {'share':>6} {'MFLOP/token':>12} {'MB':>9}",
        *(
            f"{name:<{width}} {part.parameters:>16,} {part.parameters / max(1, part.all_parameters):>6.1%} "
            f"{part.flops / 1e6:>12.3f} {part.n_bytes / 1e6:>9.3f}"
            for name, part in parts.items()
        ),
    ]


def summary(model: nn.Module) -> Summary:
    """Live parameters, operations and bytes of each language's network.

    Args:
        model: with subnetworks attached.

    Raises:
        ValueError: no subnetworks are attached, or masks are put around adapters or quantised layers.
    """
    state, owner = attached(model), owner_of(model)
    if state.around:
        raise ValueError(f"cannot count what is live in {next(iter(state.around))!r}, an adapter or a quantised layer")
    layers: dict[str, dict[str, Part]] = {}
    masked: set[int] = set()
    for name, layer in owner.named_modules():
        if isinstance(layer, AttachedExperts):
            layers[name] = _of_experts(layer, state.subnets.languages, owner)
            masked |= {id(getattr(layer, stacked.name)) for stacked in layer.stacked}
        if not isinstance(layer, AttachedLinear):
            continue
        weight, bias, mask = layer.weight, layer.bias, layer.mask
        masked |= {id(weight), id(bias)}
        biases = 0 if bias is None else bias.numel()
        of_each = [biases] * mask.n_languages if mask.kind != "rows" or not biases else mask.live_counts()
        layers[name] = {
            language: Part(live + own, weight.numel() + biases, 2 * live, (live + own) * weight.element_size())
            for language, live, own in zip(state.subnets.languages, mask.live.tolist(), of_each, strict=True)
        }
    parameters = list(owner.parameters())
    return Summary(
        {language: sum((of[language] for of in layers.values()), Part()) for language in state.subnets.languages},
        layers,
        sum(p.numel() for p in parameters if id(p) not in masked),
        sum(p.numel() for p in parameters if p.requires_grad),
        dict(state.unpacked),
    )


def _of_experts(layer: AttachedExperts, languages: tuple[str, ...], model: Any) -> dict[str, Part]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    per_token = getattr(text, "num_experts_per_tok", None)
    parameters: list[Any] = [getattr(layer, stacked.name) for stacked in layer.stacked]
    experts, size, neurons = len(parameters[0]), parameters[0].element_size(), layer.mask.in_features
    every, weights = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.ndim == 3]))
    found = {}
    for language, live in zip(languages, layer.mask.live_counts(), strict=True):
        count, products = every * live // neurons, weights * live // neurons
        found[language] = Part(count, every, 2 * products * (per_token or experts) // experts, count * size)
    return found


SIZES = "_fastmask_sizes"  # of an extracted model: {module name: (out_features, in_features)}
_HEADS = ("num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads")
_NEURONS = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "n_inner",
    "moe_intermediate_size",
)  # fmt: skip


@torch.no_grad()
def merge(model: nn.Module, language: str) -> Any:
    """A plain copy of an attached model whose weights are zero where they are dead in one language.

    It is a model of the same class and config, which loads anywhere and gives what the attached one does in that
    language, at dense cost. The attached model stays as it is.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: no subnetworks are attached, or with `forward="full"`; a masked weight is shared with a module
            without that mask (tied embeddings), which would change, too.
    """
    state, owner = attached(model), owner_of(model)
    row = state.subnets.index(language)
    if state.router.full_forward:
        raise ValueError('attached with forward="full", every language runs the full network: fastmask.detach has it')
    if state.around:
        raise ValueError(
            f"cannot multiply a mask into {next(iter(state.around))!r}, an adapter or a quantised layer: merge "
            "adapters before attach (`merge_and_unload()`), or attach to a model that is not quantised"
        )
    merged = copy.deepcopy(owner)
    uses: Counter[Tensor] = Counter(parameter for _, parameter in merged.named_parameters(remove_duplicate=False))
    for name, layer in merged.named_modules():
        if not isinstance(layer, AttachedLinear | AttachedExperts):
            continue
        if any(uses[parameter] > 1 for parameter in layer.parameters(recurse=False) if parameter.ndim > 1):
            raise ValueError(f"cannot merge: the weight of {name!r} is tied to another module's, which has no mask")
        if isinstance(layer, AttachedExperts):
            layer.clear(row)
            continue
        # Filled and not multiplied: a dead weight is never read, and may be anything.
        layer.weight.masked_fill_(~layer.stored_mask.select([row]).to_dense()[0], 0)
        if layer.mask.kind == "rows" and layer.bias is not None:
            layer.bias.masked_fill_(~layer.mask.select([row]).to_dense()[0, :, 0], 0)
    return detach(merged)


@torch.no_grad()
def extract(model: nn.Module, language: str) -> Any:
    """One language's subnetwork as a plain, physically smaller model.

    Heads and neurons that are dead are gone from its weights, so it is as small and fast as its density says, needs no
    fastmask to run, and gives what the attached model does in that language. Where every layer keeps equally many, and
    the config can say so, it is an ordinary Hugging Face model with a config of its own. Otherwise its layers have
    sizes of their own: `fastmask.save_pretrained` and `from_pretrained` know how to keep them. Units that cannot be
    packed in this model (see `attach`) and single weights are zeros instead. A layer without live units keeps one,
    which is zero.

    Raises:
        KeyError: not a language of the attached subnetworks.
        ValueError: as for `merge`.
    """
    state = attached(model)
    row, small = state.subnets.index(language), merge(model, language)
    sizes: dict[str, tuple[int, int]] = dict(getattr(small, SIZES, {}))  # of a model that was extracted before
    for _, group, keeps in state.structure.masked(state.subnets):
        if group.place in state.unpacked:
            continue
        keep = keeps[row].clone()
        keep[0] |= ~keep.any()
        if group.stacked:
            sizes[group.name] = _cut_experts(small, group, keep.nonzero().flatten())
            continue
        for name, unit in group.projections.items():
            linear, of_rows = small.get_submodule(name), name in group.rows
            index = kept_of(keep, unit).nonzero().flatten().to(linear.weight.device)
            weight = linear.weight.index_select(int(of_rows == is_conv1d(linear)), index)
            bias = linear.bias.index_select(0, index) if linear.bias is not None and of_rows else linear.bias
            sizes[name] = _resize(linear, weight, bias)
    ordinary = _ordinary(small, _live(state, "heads", row), _live(state, "neurons", row))
    if ordinary is not None:
        return ordinary
    setattr(small, SIZES, sizes)
    return small


def shrink(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> None:
    """Give linear layers and experts of a plain model other sizes, with weights to be loaded."""
    experts = {group.name: group for group in structure_of(model).ffns if group.stacked} if sizes else {}
    for name, (out, width) in sizes.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise KeyError(f"this {type(model).__name__} has no module {name!r}") from None
        if name in experts:
            _cut_experts(model, experts[name], torch.arange(width))
            continue
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise ValueError(f"expected a linear layer at {name!r}, found {type(linear).__name__}")
        bias = linear.bias.new_empty(out) if linear.bias is not None else None  # type: ignore[operator]
        weight: Any = linear.weight
        _resize(linear, weight.new_empty((width, out) if is_conv1d(linear) else (out, width)), bias)


def _cut_experts(model: nn.Module, group: UnitGroup, live: Tensor) -> tuple[int, int]:
    """Leave some neurons (int64 [live]) of every expert; returns (outputs, neurons)."""
    module = model.get_submodule(group.name)
    for stacked in group.stacked:
        own: Any = getattr(module, stacked.name)
        part = own.index_select(stacked.dim, stacked.entries(live.to(own.device), group.units))
        setattr(module, stacked.name, nn.Parameter(part, requires_grad=own.requires_grad))
        if stacked.read:
            sizes = part.shape[3 - stacked.dim], part.shape[stacked.dim]
    return sizes


def _resize(linear: Any, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Give a linear layer another weight and bias; returns (outputs, inputs)."""
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=linear.bias.requires_grad)
    if is_conv1d(linear):
        linear.nx, linear.nf = weight.shape
        return linear.nf, linear.nx
    linear.out_features, linear.in_features = weight.shape
    return linear.out_features, linear.in_features


def _live(state: Attached, kind: str, row: int) -> tuple[int, int] | None:
    """(units, live units) where every group of a kind has the same; None otherwise, or where none is cut."""
    keeps, groups = getattr(state.subnets, kind), state.structure.groups(kind)
    if keeps is None or any(group.place in state.unpacked for group in groups):
        return None
    found = {(group.units, max(1, int(keeps[row, index].sum()))) for index, group in enumerate(groups)}
    return found.pop() if len(found) == 1 else None


def _ordinary(small: Any, heads: tuple[int, int] | None, neurons: tuple[int, int] | None) -> Any:
    """The same model under a config that says its sizes, or None if there is no such config."""
    config = copy.deepcopy(getattr(small, "config", None))
    if not hasattr(config, "to_dict"):
        return None
    wanted = {name: tensor.shape for name, tensor in small.state_dict().items()}
    try:
        # Attention code that computes a head's size from the number of heads would compute another one.
        if heads is not None and getattr(config, "head_dim", None) is not None:
            for name in _HEADS:
                if isinstance(count := getattr(config, name, None), int):
                    setattr(config, name, count * heads[1] // heads[0])
        if neurons is not None:
            for name in _NEURONS:
                if getattr(config, name, None) == neurons[0]:
                    setattr(config, name, neurons[1])
        with torch.device("meta"):
            given = {name: tensor.shape for name, tensor in type(small)(config).state_dict().items()}
        if given != wanted:
            return None
        with torch.random.fork_rng(devices=[]):  # what it draws is replaced
            model = type(small)(config)
    except Exception:  # a config that its model refuses, or that has a size for each layer
        return None
    first = next(small.parameters())
    model.load_state_dict(small.state_dict(), assign=True)
    model.tie_weights()
    if (generation := getattr(small, "generation_config", None)) is not None:
        model.generation_config = generation
    for own, other in zip(model.parameters(), small.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return model.to(first.device).train(small.training)
