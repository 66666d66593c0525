"""What is done to gradients between the backward pass and the optimizer's step, in any training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def clip(parameters: Iterable[Tensor], limit: float) -> float:
    """`torch.nn.utils.clip_grad_norm_`, also of sparse gradients, which hold each row once; the norm they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(held)
    torch._foreach_mul_(held, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return float(norm)


@torch.no_grad()
def sum_over_processes(parameters: Iterable[Tensor]) -> None:
    """Replace every `.grad` by its sum over all processes, where `DistributedDataParallel` does not do it.

    A process without a gradient counts as zeros where others have one; it stays without where none has.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    for parameter, somewhere in zip(trained, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def backward_without_conflict(
    parameters: Iterable[Tensor], losses: Iterable[tuple[Tensor, float]], generator: np.random.Generator
) -> tuple[float, float]:
    """Put the gradient of the mean of several languages' losses into `.grad`, without their conflicts; in one process.

    Args:
        parameters: of the model; a gradient goes to those that require one and that a loss depends on.
        losses: of each language the loss [], and its weight in the mean.
        generator: draws the order in which languages are compared.

    Returns:
        The mean loss, and the share of the ordered pairs of languages that were in conflict.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    reached = [False] * len(trained)
    gradients, total, weights = [], 0.0, 0.0
    for loss, weight in losses:
        own = torch.autograd.grad(loss, trained, allow_unused=True)
        reached = [before or grad is not None for before, grad in zip(reached, own, strict=True)]
        pairs = zip(trained, own, strict=True)
        dense = [p.new_zeros(p.numel()) if grad is None else grad.to_dense().flatten() for p, grad in pairs]
        gradients.append(torch.cat(dense) * weight)
        total, weights = total + float(loss.detach()) * weight, weights + weight
    joined, share = without_conflict(gradients, generator)
    joined /= weights
    parts = joined.split([parameter.numel() for parameter in trained])
    for parameter, grad, is_reached in zip(trained, parts, reached, strict=True):
        # Without a gradient, as in plain training, weight decay leaves it alone.
        parameter.grad = grad.view_as(parameter) if is_reached else None
    return total / weights, share


def without_conflict(gradients: Sequence[Tensor], generator: np.random.Generator) -> tuple[Tensor, float]:
    """PCGrad (Yu et al. 2020, arXiv 2001.06782): the sum of the languages' gradients [n], each without its conflicts.

    For every other language in random order, where the inner product of the two is negative, the projection onto the
    other's own gradient is taken off. Returned with the share of the ordered pairs of languages that were in conflict.
    """
    lengths = torch.stack([torch.dot(gradient, gradient) for gradient in gradients])
    total, conflicts = torch.zeros_like(gradients[0]), 0
    for number, gradient in enumerate(gradients):
        own = gradient.clone()
        for other in generator.permutation(len(gradients)).tolist():
            product = torch.dot(own, gradients[other])
            if other != number and bool(product < 0):
                own.sub_(gradients[other], alpha=float(product / lengths[other]))
                conflicts += 1
        total += own
    return total, conflicts / max(1, len(gradients) * (len(gradients) - 1))
