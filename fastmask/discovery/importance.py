"""How much each live head and neuron matters to a language: the score that pruning drops units by.

I_h = mean over sentences of |dL_sentence / d xi_h|, where xi_h is a gate that multiplies the output of unit h, at 1
(Michel, Levy and Neubig 2019). Every sentence has gates of its own, so one backward pass gives each sentence's
derivative and the score does not depend on how sentences fall into batches. Scores are then divided by the L2 norm of
their layer, so that layers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models.attach import attached, language
from fastmask.models.families import layer_parts
from fastmask.models.layers import AttachedLinear
from fastmask.torch_path.activations import NONE, activate

__all__ = ["Importance", "importance"]


@dataclass(frozen=True)
class Importance:
    """Scores of the live units, float32; dead units have 0. None for a kind of unit that is not masked."""

    heads: Tensor | None  # [layers, heads]
    neurons: Tensor | None  # [layers, ffn]


class _Gate(torch.autograd.Function):
    """Multiplication by gates that are all 1: the identity, with the gates' gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, unit: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unit = unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        per_unit = (x * dy).unflatten(-1, (-1, ctx.unit)).sum(-1, dtype=torch.float32)
        return dy, per_unit.flatten(1, -2).sum(1), None


def importance(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], language_name: str
) -> Importance:
    """Score every live unit of one language.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached; skipped units cost nothing
            here either. It is put in eval mode for the time of the call: dropout would add noise to the scores.
        batches: what `loss` takes; one language each, any sizes.
        loss: runs `model` on a batch and returns one loss for each example, [B]. It must not give `language_ids`:
            it is called inside `fastmask.language(model, language_name)`.
        language_name: one of the attached subnetworks' languages.

    Returns:
        Scores >= 0; within a layer they have L2 norm 1.

    Raises:
        ValueError: no batch, or a loss of another shape.
    """
    subnets = attached(model).subnets
    row = subnets.index(language_name)
    probes: list[tuple[str, int, nn.Module, int]] = []  # kind of unit, layer, module that consumes it, size of a unit
    for index, parts in enumerate(layer_parts(model)):
        if subnets.heads is not None:
            probes.append(("heads", index, model.get_submodule(parts.heads_columns[0]), parts.heads_columns[1]))
        if subnets.neurons is not None:
            probes.append(("neurons", index, model.get_submodule(parts.neurons_columns), 1))
    if not probes:
        raise ValueError("importance needs subnetworks over heads or neurons; these have only weights")

    totals = [torch.zeros(0)] * len(probes)
    sentences = 0
    with _frozen(model), language(model, language_name), _gated(probes) as gates, torch.enable_grad():
        for batch in batches:
            gates.clear()
            losses = loss(batch)
            if losses.ndim != 1:
                raise ValueError(f"expected one loss for each example, [batch], given shape {tuple(losses.shape)}")
            grads = torch.autograd.grad(losses.sum(), gates)
            sentences += losses.shape[0]
            for i, grad in enumerate(grads):
                summed = grad.abs().sum(0).cpu()
                totals[i] = summed if totals[i].numel() == 0 else totals[i] + summed
    if not sentences:
        raise ValueError(f"no batch to score the units of {language_name!r} on")

    scores = {
        kind: torch.zeros(keep.shape[1:]) if keep is not None else None
        for kind, keep in (("heads", subnets.heads), ("neurons", subnets.neurons))
    }
    for (kind, index, _, _), total in zip(probes, totals, strict=True):
        live = (subnets.heads if kind == "heads" else subnets.neurons)[row, index].nonzero().flatten().cpu()  # type: ignore[index]
        # Slot j of the packed activation is the j-th live unit; slots behind them belong to no unit.
        mean = total[: len(live)] / sentences
        scores[kind][index, live] = mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)  # type: ignore[index]
    return Importance(scores["heads"], scores["neurons"])


@contextmanager
def _gated(probes: list[tuple[str, int, nn.Module, int]]) -> Iterator[list[Tensor]]:
    """Gate the input of every consumer; yields the list that each forward pass fills with its gates [B, units]."""
    gates: list[Tensor] = []
    consumers = [module for _, _, module, _ in probes if isinstance(module, AttachedLinear)]
    activations: dict[nn.Module, str] = {module: module.activation for module in consumers}

    def hook(unit: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def gate(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # The gate stands behind the activation, also where the module computes it: it is taken out meanwhile.
            x = activate(inputs[0], activations.get(module, NONE))
            ones = torch.ones(x.shape[0], x.shape[-1] // unit, device=x.device, requires_grad=True)
            gates.append(ones)
            return (_Gate.apply(x, ones, unit), *inputs[1:])

        return gate

    for module in consumers:
        module.activation = NONE
    handles = [module.register_forward_pre_hook(hook(unit)) for _, _, module, unit in probes]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
        for module in consumers:
            module.activation = activations[module]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for parameters: the weight gradients would cost half of the backward pass."""
    training = model.training
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in required:
            parameter.requires_grad_(True)
