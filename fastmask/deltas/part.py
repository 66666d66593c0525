"""The change of one parameter: what of it may have changed, and by how much, exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.live import WHOLE, Live

__all__ = ["Part", "digest_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """The change of the live part of a parameter, n numbers.

    Attributes:
        live: what may have changed.
        shape: of the parameter.
        base: `digest_of` the live part before.
        difference: [n] in the parameter's dtype; after - before, where before + difference is after to the last bit.
        places, values: int64 [m], and [m] in the parameter's dtype: where it is not (numbers that lost most of their
            size), `difference` is -before there, and `values`, which are after, are added to the sum.
    """

    live: Live
    shape: tuple[int, ...]
    base: str
    difference: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def between(cls, before: Tensor, after: Tensor, live: Live) -> Part:
        """The change of a parameter.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        old, new = (live.read(tensor.detach()).flatten().cpu() for tensor in (before, after))
        if not (bool(old.isfinite().all()) and bool(new.isfinite().all())):
            raise ValueError("it holds NaN or infinity, from which nothing can be subtracted")
        difference = new - old
        places = (old + difference != new).nonzero().flatten()
        difference[places] = -old[places]
        return cls(live, tuple(after.shape), digest_of(old), difference, places, new[places])

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.difference.dtype

    def read(self, parameter: Tensor) -> Tensor:
        """The live part of a parameter, flattened [n]."""
        return self._on(parameter).read(parameter.detach()).flatten()

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Put back what `read` returned."""
        live = self._on(parameter)
        live.write(parameter.detach(), values.view(live.read(parameter.detach()).shape))

    def added_to(self, values: Tensor) -> Tensor:
        """What `read` returned, changed."""
        sums = values + self.difference.to(values.device)
        return sums.index_add_(0, self.places.to(values.device), self.values.to(values.device))

    def _on(self, parameter: Tensor) -> Live:
        live = self.live
        if live is WHOLE or live.words.device == parameter.device:
            return live
        return Live(live.kind, live.shape, live.cell, live.words.to(parameter.device))

    # ---- in files

    @property
    def code(self) -> Tensor:
        """What lives, uint8; empty where everything does."""
        return torch.empty(0, dtype=torch.uint8) if self.live is WHOLE else self.live.encoded()

    @classmethod
    def decoded(
        cls, shape: tuple[int, ...], base: str, code: Tensor, difference: Tensor, places: Tensor, values: Tensor
    ) -> Part:
        """A part of what was written; raises ValueError if it is of a parameter of another shape."""
        live = WHOLE if code.shape == (0,) else Live.decoded(code, shape)
        return cls(live, shape, base, difference, places, values)


def digest_of(values: Tensor) -> str:
    """The SHA-256 of numbers, of their dtype and how many they are."""
    plain = values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {plain.numel()} ".encode())
    digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
