"""The gradients of several languages side by side, and the sums of their products that cosines and conflicts need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["gradients_of", "products"]

HELD = 4 * 2**30  # bytes of gradients, of all languages together, that are held at a time
CHUNK = 1 << 16  # coordinates whose float64 products are summed at a time: a few MB, which the processor's cache holds


def gradients_of(
    whole: nn.Module, run: Callable[[str, Any], Tensor], data: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Gradients of every language's summed loss with respect to every parameter, one parameter at a time.

    As many parameters as fit into `HELD` are differentiated together; for the next ones every batch runs again.

    Args:
        whole: the module whose parameters count; in eval mode, or its passes see different dropout.
        run: (language, batch) -> a scalar, by running `whole`.
        data: the batches of L languages.

    Yields:
        (name, rows, gradients): gradients [L, 2, R, C] of the sums over even and over odd batches, in the rows [R]
        where some language has a gradient; of an embedding those are the words that occur. A vector has C = 1.
    """
    parameters = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
    for group in _groups(parameters, 2 * len(data)):
        found: dict[str, list[tuple[int, int, Tensor, Tensor]]] = {name: [] for name in group}
        for place, (language, batches) in enumerate(data.items()):
            for half in (0, 1):
                sums: dict[str, Tensor] = {}
                for batch in batches[half::2]:
                    grads = torch.autograd.grad(
                        run(language, batch), [parameters[name] for name in group], allow_unused=True
                    )
                    for name, grad in zip(group, grads, strict=True):
                        if grad is not None:
                            sums[name] = sums[name] + grad if name in sums else grad
                for name, grad in sums.items():
                    matrix = grad.reshape(len(grad), -1) if grad.ndim else grad.reshape(1, 1)
                    rows = matrix.any(1).nonzero()[:, 0]
                    found[name].append((place, half, rows, matrix[rows]))
        for name in group:
            if pieces := found.pop(name):
                rows = torch.cat([of_one for _, _, of_one, _ in pieces]).unique()
                gradients = pieces[0][3].new_zeros(len(data), 2, len(rows), pieces[0][3].shape[1])
                for place, half, own, values in pieces:
                    gradients[place, half, torch.searchsorted(rows, own)] = values
                yield name, rows, gradients


def _groups(parameters: Mapping[str, Tensor], copies: int) -> list[list[str]]:
    """The names in their order, cut where so many copies of their parameters would be more than `HELD`."""
    groups: list[list[str]] = [[]]
    room = HELD
    for name, parameter in parameters.items():
        size = copies * parameter.nbytes
        if size > room and groups[-1]:
            groups.append([])
            room = HELD
        groups[-1].append(name)
        room -= size
    return groups


def products(gradients: Tensor, owned: Tensor | None = None) -> dict[str, NDArray[np.float64]]:
    """Sums over coordinates of products of L gradients, by name, each float64 [L, L] of languages i and j.

    With g = a + b the gradient of all batches, a of the even and b of the odd ones:
    `dot` g_i g_j; `absolute` |g_i g_j|; `signs` the sign of g_i g_j; `both` 1 where g_i g_j is not 0; `halves` a_i b_j;
    `norms`, `norms_a`, `norms_b` the squares of g_i, a_i and b_i over what j owns.

    Args:
        gradients: [L, 2, R, C].
        owned: bool [L, R, C]; default everything.
    """
    L = len(gradients)
    everything = torch.ones(1, 1, dtype=torch.bool, device=gradients.device)
    names = ("dot", "absolute", "signs", "both", "halves", "norms", "norms_a", "norms_b")
    sums = {name: np.zeros((L, L)) for name in names}
    keeps = everything.expand(L, gradients[0, 0].numel()) if owned is None else owned.flatten(1)
    for piece, kept in zip(gradients.flatten(2).split(CHUNK, 2), keeps.split(CHUNK, 1), strict=True):
        a, b = piece.double().unbind(1)
        g, keep = a + b, kept.double()
        signs = g.sign()
        pairs = ((g, g), (g.abs(), g.abs()), (signs, signs), (signs.abs(), signs.abs()), (a, b))
        norms = tuple((x.square(), keep) for x in (g, a, b))
        for name, (x, y) in zip(names, pairs + norms, strict=True):
            sums[name] += (x @ y.t()).cpu().numpy()
    return sums
