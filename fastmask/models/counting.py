"""`summary`: what each language's network has and costs, language by language and layer by layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from torch import nn

from fastmask.models.attach import attached, owner_of
from fastmask.models.expert_layer import AttachedExperts
from fastmask.models.layers import AttachedLinear

__all__ = ["Part", "Summary", "summary"]


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
        width = max(len("language"), *(len(name) for name in self.languages))
        head = f"{'language':<{width}} {'live of masked':>16} {'share':>6} {'with unmasked':>14}"
        lines = [f"{head} {'MFLOP/token':>12} {'MB':>8}"]
        for name, part in self.languages.items():
            share = part.parameters / max(1, part.all_parameters)
            lines.append(
                f"{name:<{width}} {part.parameters:>16,} {share:>6.1%} {part.parameters + self.unmasked:>14,} "
                f"{part.flops / 1e6:>12.2f} {part.n_bytes / 1e6:>8.1f}"
            )
        lines.append(f"unmasked, in every language: {self.unmasked:,}; trainable in all: {self.trainable:,}")
        lines += [f"not packed: {place} ({why})" for place, why in self.unpacked.items()]
        return "\n".join(lines)


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
            layers[name] = _of_experts(layer, state.subnets.languages, _experts_per_token(owner))
            masked |= {id(getattr(layer, stacked.name)) for stacked in layer.stacked}
        if not isinstance(layer, AttachedLinear):
            continue
        weight, bias, mask = layer.weight, layer.bias, layer.mask
        masked |= {id(weight), id(bias)}
        biases = 0 if bias is None else bias.numel()
        of_rows = mask.kind == "rows"
        layers[name] = {}
        for row, (language, live) in enumerate(zip(state.subnets.languages, mask.live.tolist(), strict=True)):
            own = biases if not of_rows or not biases else mask.live_counts()[row]
            count = live + own
            part = Part(count, weight.numel() + biases, 2 * live, count * weight.element_size())
            layers[name][language] = part
    parameters = list(owner.parameters())
    return Summary(
        {language: sum((of[language] for of in layers.values()), Part()) for language in state.subnets.languages},
        layers,
        sum(p.numel() for p in parameters if id(p) not in masked),
        sum(p.numel() for p in parameters if p.requires_grad),
        dict(state.unpacked),
    )


def _of_experts(layer: AttachedExperts, languages: Sequence[str], per_token: int | None) -> dict[str, Part]:
    parameters: list[Any] = [getattr(layer, stacked.name) for stacked in layer.stacked]
    experts, size, neurons = len(parameters[0]), parameters[0].element_size(), layer.mask.in_features
    every, weights = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.ndim == 3]))
    found = {}
    for language, live in zip(languages, layer.mask.live_counts(), strict=True):
        count, products = every * live // neurons, weights * live // neurons
        found[language] = Part(count, every, 2 * products * (per_token or experts) // experts, count * size)
    return found


def _experts_per_token(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_experts_per_tok", None)
