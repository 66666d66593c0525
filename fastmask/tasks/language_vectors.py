"""One learned vector for each language, added to the encoder's input: the control for what routing alone tells a model.

Which subnetwork runs also says which language a sentence is in, to a model that is otherwise told nothing of it. Method
`vector` gives that much to the full network: every language owns all units, and has a vector, zero at first. Examples
find theirs by the language ids that would find a subnetwork, so choosing for an unseen language, adapting and scoring
work as they do with masks: a training language's vector for its mask, the mean of all for the union of all masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models.attach import attached, is_attached

__all__ = ["LanguageVectors", "ids_of"]


class LanguageVectors(nn.Module):
    """Vectors of L languages, in the order of the subnetworks' languages; `weight` is [L, D]."""

    def __init__(self, weight: Tensor) -> None:
        """Take the vectors, [L, D]."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    @classmethod
    def zero(cls, languages: int, like: Tensor) -> LanguageVectors:
        """No vector says anything yet; width, dtype and device are those of `like`, [..., D]."""
        return cls(like.new_zeros(languages, like.shape[-1]))

    def forward(self, inputs: Tensor, language_ids: Tensor | int | None) -> Tensor:
        """Inputs [B, T, D] with the vector of each example's language; unchanged of none and of the full network (-1).

        Args:
            inputs: [B, T, D].
            language_ids: int64 [B], or one for all; L, a language more than there are, is their union.
        """
        if language_ids is None or (isinstance(language_ids, int) and language_ids < 0):
            return inputs
        mean, none = self.weight.mean(0, keepdim=True), torch.zeros_like(self.weight[:1])
        table = torch.cat([self.weight, mean, none])  # -1 is the last row
        ids = torch.as_tensor(language_ids, device=table.device)
        chosen = table[ids].to(inputs.dtype)
        return inputs + (chosen if ids.ndim == 0 else chosen[:, None])

    def with_copy(self, language: int) -> LanguageVectors:
        """The same, and a last one that is a copy of `language`'s: -1 is none, L the mean of all."""
        added = self(self.weight.new_zeros(1, 1, self.weight.shape[1]), language)[0]
        return LanguageVectors(torch.cat([self.weight, added]).detach().clone())


def ids_of(encoder: Any, language_ids: Tensor | None) -> Tensor | int | None:
    """The languages of a forward pass: those given, or that of `fastmask.language`; None if nothing is attached."""
    if not is_attached(encoder):
        return None
    return attached(encoder).router.default.get() if language_ids is None else language_ids
