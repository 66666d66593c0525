"""Meta-learning word by word: clones of all parameters, masks multiplied, plain loops; slow, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]


def literal_episode(
    model: nn.Module,
    loss: Callable[[Parameters, Any], Tensor],
    tasks: Sequence[tuple[Parameters, Sequence[Any], Any]],
    steps: int,
    rates: dict[str, float],
    algorithm: str,
) -> tuple[Parameters, list[list[float]]]:
    """The meta-gradient by parameter name, and each task's losses, its query's last.

    Args:
        model: a plain model, left alone.
        loss: of a batch under given parameters.
        tasks: of each language the multipliers (0 or 1) of its masked parameters, support batches, query batch.
        steps: K.
        rates: inner learning rate of each parameter.
        algorithm: "fomaml" or "reptile".
    """
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    outer = {name: torch.zeros_like(value) for name, value in theta.items()}
    history = []
    for multipliers, support, query in tasks:

        def gradient(phi: Parameters, batch: Any, multipliers: Parameters = multipliers) -> tuple[float, Parameters]:
            value = loss({name: p * multipliers.get(name, 1.0) for name, p in phi.items()}, batch)
            grads = torch.autograd.grad(value, list(phi.values()), allow_unused=True)
            found = zip(phi, grads, strict=True)
            return value.item(), {n: torch.zeros_like(phi[n]) if g is None else g for n, g in found}

        phi = {name: value.clone().requires_grad_() for name, value in theta.items()}
        losses = []
        for step in range(steps):
            value, grads = gradient(phi, support[step % len(support)])
            phi = {name: (p - rates[name] * grads[name]).detach().requires_grad_() for name, p in phi.items()}
            losses.append(value)
        value, grads = gradient(phi, query)
        history.append([*losses, value])
        for name in theta:
            change = grads[name] if algorithm == "fomaml" else theta[name] - phi[name].detach()
            outer[name] += change / len(tasks)
    return outer, history


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, T, classes] in their own dtype."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def functional_loss(model: nn.Module) -> Callable[[Parameters, Any], Tensor]:
    """The loss of a Hugging Face model under given parameters."""
    return lambda parameters, batch: token_loss(
        functional_call(model, parameters, (), batch["inputs"], tie_weights=True).logits, batch["labels"]
    )
