"""Gradients of languages that point against each other: PCGrad, the rival of giving each language weights of its own.

Each language's gradient loses the part that points against another language's: for every other language in random
order, where the inner product of the two is negative, the projection onto the other's own gradient is taken off. The
step then takes the sum (Yu et al. 2020, arXiv 2001.06782).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["without_conflict"]


def without_conflict(gradients: Sequence[Tensor], generator: np.random.Generator) -> tuple[Tensor, float]:
    """The sum of the gradients, each without its conflicts.

    Args:
        gradients: of each language, [n] each, float32 or wider.
        generator: of the order in which a language meets the others.

    Returns:
        The sum [n], and the share of the ordered pairs of languages that were in conflict (0 with one language).
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
