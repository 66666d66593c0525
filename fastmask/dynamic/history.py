"""The masks that were: one entry for each language and change, 8 units to a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["History", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The mask of one language from one step on; None for a kind of unit that is not masked."""

    step: int
    language: str
    heads: Tensor | None  # bool [layers, heads]
    neurons: Tensor | None  # bool [layers, ffn]


class History(Sequence[Snapshot]):
    """Every mask that a language had, in the order of their steps; an entry is unpacked when it is looked at.

    It starts with the masks of all languages at step 0.
    """

    def __init__(self, subnets: Subnetworks) -> None:
        self._languages = subnets.languages
        masks = {"heads": subnets.heads, "neurons": subnets.neurons}
        self._shapes = {kind: tuple(keep.shape[1:]) for kind, keep in masks.items() if keep is not None}
        self._when: list[tuple[int, int]] = []  # step, position of the language
        self._packed: dict[str, list[bytes]] = {kind: [] for kind in self._shapes}
        for row in range(len(subnets.languages)):
            self.add(0, row, subnets)

    def add(self, step: int, row: int, subnets: Subnetworks) -> None:
        """Remember the mask that a language has from `step` on."""
        self._when.append((step, row))
        for kind, packed in self._packed.items():
            packed.append(np.packbits(getattr(subnets, kind)[row].cpu().numpy()).tobytes())

    def __len__(self) -> int:
        return len(self._when)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        step, row = self._when[at]
        masks = {kind: self._mask(kind, packed[at]) for kind, packed in self._packed.items()}
        return Snapshot(step, self._languages[row], masks.get("heads"), masks.get("neurons"))

    def _mask(self, kind: str, packed: bytes) -> Tensor:
        layers, units = self._shapes[kind]
        flags = np.unpackbits(np.frombuffer(packed, np.uint8), count=layers * units)
        return torch.from_numpy(flags.astype(bool).reshape(layers, units))

    def at(self, step: int) -> Subnetworks:
        """The masks of all languages as they were after `step` steps."""
        latest: dict[int, int] = {}
        for position, (when, row) in enumerate(self._when):
            if when <= max(step, 0):
                latest[row] = position
        found = [latest[row] for row in range(len(self._languages))]
        masks = {
            kind: torch.stack([self._mask(kind, packed[at]) for at in found]) for kind, packed in self._packed.items()
        }
        return Subnetworks(self._languages, masks.get("heads"), masks.get("neurons"))

    def tensors(self) -> dict[str, Tensor]:
        """All entries: `when` int64 [n, 2] (step, language) and uint8 [n, bytes] of each kind."""
        packed = {
            kind: torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).copy()).view(len(rows), -1)
            for kind, rows in self._packed.items()
        }
        return {"when": torch.tensor(self._when, dtype=torch.int64).view(-1, 2), **packed}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """See that tensors are those of a history of these languages and shapes.

        Raises:
            ValueError: they are not; the message says which.
        """
        if tensors.keys() != {"when", *self._shapes}:
            raise ValueError(f"a history holds {', '.join(tensors)} (expected {', '.join(['when', *self._shapes])})")
        count = len(tensors["when"])
        expected = {"when": (torch.int64, (count, 2))} | {
            kind: (torch.uint8, (count, -(-layers * units // 8))) for kind, (layers, units) in self._shapes.items()
        }
        for name, (dtype, shape) in expected.items():
            given = tensors[name]
            if given.dtype != dtype or given.shape != shape:
                raise ValueError(f"{name} of a history is {given.dtype} {tuple(given.shape)}, expected {dtype} {shape}")
        steps, rows = tensors["when"].unbind(1)
        languages = len(self._languages)
        if not (
            torch.equal(rows[:languages], torch.arange(languages))
            and not steps[:languages].any()
            and bool((steps.diff() >= 0).all())
            and bool(((rows >= 0) & (rows < languages)).all())
        ):
            raise ValueError("when of a history does not begin with all languages at step 0 and go on from there")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all entries by those of `tensors()`.

        Raises:
            ValueError: see `check`; nothing is changed then.
        """
        self.check(tensors)
        when: list[list[int]] = tensors["when"].tolist()
        self._when = [(step, row) for step, row in when]
        self._packed = {kind: [row.numpy().tobytes() for row in tensors[kind]] for kind in self._shapes}
