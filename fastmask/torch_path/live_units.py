"""`LiveUnits`: which rows (or columns) of a weight each language owns, in every form that products need."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.torch_path.segments import FULL

__all__ = ["LiveUnits"]


class LiveUnits:
    """Tables of one mask, each made when it is first asked for and kept: masks never change.

    They do not depend on how wide a batch is packed. Nothing is kept for a pair of languages, and for a set of them
    only what was asked last, so that all of it grows with the number of languages and not faster.

    Args:
        indices, counts: `index` and `extents` of a mask over rows or columns.
        unit: rows (or columns) that live and die as one.
        size: rows (or columns) of the weight.
    """

    def __init__(self, indices: Tensor, counts: Tensor, unit: int, size: int) -> None:
        self.indices, self.unit, self.size = indices, unit, size
        self.counts: list[int] = counts.tolist()
        self._of: dict[int, Tensor] = {}
        self._gathered: dict[tuple[int, int], Tensor] = {}
        self._units: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._slices: dict[tuple[int, int, int], Tensor] = {}
        self._numbers: Tensor | None = None
        self._ordered: Tensor | None = None
        self._dead: Tensor | None = None
        self._side_by_side: tuple[tuple[int, ...], Tensor] | None = None
        self._owners: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    # ---- of one language

    def live(self, language: int) -> int:
        """How many a language owns."""
        return self.size if language == FULL else self.counts[language]

    def of(self, language: int) -> Tensor:
        """Their indices."""
        indices = self._of.get(language)
        if indices is None:
            indices = self._of[language] = self.indices[language, : self.counts[language]]
        return indices

    def units_of(self, language: int) -> Tensor:
        """Indices of their units."""
        units = self._units.get(language)
        if units is None:
            units = self._units[language] = self.of(language)[:: self.unit] // self.unit
        return units

    def places(self, language: int) -> Tensor:
        """For each unit its place among a language's live ones; for a dead one the place behind them."""
        places = self._places.get(language)
        if places is None:
            units = self.units_of(language)
            places = torch.full((self.size // self.unit,), len(units), device=units.device)
            places[units] = torch.arange(len(units), device=units.device)
            self._places[language] = places
        return places

    def gathered(self, language: int, room: int) -> Tensor:
        """Indices of live ones, and any index for each place behind them."""
        if room == self.live(language):
            return self.of(language)
        index = self._gathered.get((language, room))
        if index is None:
            index = torch.nn.functional.pad(self.of(language), (0, room - self.live(language)))
            self._gathered[language, room] = index
        return index

    def sliced(self, language: int, room: int, n: int) -> Tensor:
        """`gathered` for rows in n slices one after the other: all first slices, then all second ones, and so on."""
        index = self._slices.get((language, room, n))
        if index is None:
            slices = torch.arange(n, device=self.indices.device)
            index = (self.gathered(language, room) * n + slices[:, None]).flatten()
            self._slices[language, room, n] = index
        return index

    # ---- of all languages, the full network last

    def numbers(self) -> Tensor:
        """`live` of each, int64 [L + 1]."""
        if self._numbers is None:
            self._numbers = torch.tensor([*self.counts, self.size], device=self.indices.device)
        return self._numbers

    def dead(self) -> Tensor:
        """Which are dead, bool [L + 1, size]."""
        if self._dead is None:
            dead = torch.ones(len(self.counts) + 1, self.size, dtype=torch.bool, device=self.indices.device)
            for language in range(len(self.counts)):
                dead[language].index_fill_(0, self.of(language), False)
            dead[FULL] = False
            self._dead = dead
        return self._dead

    def ordered(self) -> Tensor:
        """All of them, the live ones first and each kind ascending, int32 [L + 1, size]."""
        if self._ordered is None:
            self._ordered = self.dead().to(torch.uint8).argsort(dim=1, stable=True).int()
        return self._ordered

    # ---- of some languages; another thread may ask for others meanwhile, so what is kept is read once

    def side_by_side(self, languages: tuple[int, ...]) -> Tensor:
        """Indices of several languages, one after the other: as many of each as the widest has, any behind its own."""
        made = self._side_by_side
        if made is None or made[0] != languages:
            widest = max(map(self.live, languages))
            rows = torch.tensor(languages, device=self.indices.device)
            made = self._side_by_side = languages, self.indices[:, :widest].index_select(0, rows).flatten()
        return made[1]

    def owners(self, languages: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Of each unit the places of its live copies among those of these languages; where those of each begin."""
        made = self._owners
        if made is None or made[0] != languages:
            every = torch.arange(self.size // self.unit, device=self.indices.device)
            units = torch.cat([every if language == FULL else self.units_of(language) for language in languages])
            first = torch.nn.functional.pad(torch.bincount(units, minlength=len(every)).cumsum(0), (1, 0))
            made = self._owners = languages, units.argsort(stable=True), first
        return made[1:]
