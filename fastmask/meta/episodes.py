"""Which sentences an episode sees: support and query of each language of a meta-batch.

Within a language every pass over its sentences is a fresh shuffle, cut into pieces of support + query sentences; what
does not fill a piece is left out of that pass. So the two never share a sentence, no sentence is drawn twice in a pass,
sampling never ends, and length plays no part. Every random decision is a function of (seed, what it is for, a counter),
so the state is a handful of counters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Draw", "EpisodeSampler"]

_LANGUAGES, _SENTENCES = range(2)  # what a random stream is for


@dataclass(frozen=True)
class Draw:
    """One language's sentences in an episode: int64 rows of that language's own data, in random order."""

    language: str
    support: np.ndarray = field(repr=False)
    query: np.ndarray = field(repr=False)


class EpisodeSampler:
    """Yields meta-batches for ever, each a list of `Draw`s of different languages.

    The same on every process: to split a meta-batch over processes, let process r of n take `draws[r::n]`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        support_size: int,
        query_size: int,
        *,
        meta_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the sizes; nothing is drawn.

        Args:
            sizes: number of sentences of each language.
            support_size: sentences in a support set.
            query_size: sentences in a query set; 0 for Reptile without queries.
            meta_batch: languages in a meta-batch, drawn without repetition; all of them, in order, if not given.
            seed: of all random choices.

        Raises:
            ValueError: a number out of its range, no language or one with fewer sentences than support and query take,
                or a meta-batch larger than the number of languages.
        """
        self.sizes = {language: int(size) for language, size in sizes.items()}
        self.languages = tuple(self.sizes)
        if not self.languages:
            raise ValueError("expected at least one language, given none")
        _at_least("support_size", support_size, 1)
        _at_least("query_size", query_size, 0)
        _at_least("seed", seed, 0)
        self.meta_batch = len(self.languages) if meta_batch is None else meta_batch
        _at_least("meta_batch", self.meta_batch, 1)
        if self.meta_batch > len(self.languages):
            raise ValueError(
                f"a meta-batch of {self.meta_batch} languages needs as many, given {len(self.languages)}: "
                f"{', '.join(self.languages)}"
            )
        need = support_size + query_size
        small = [f"{language} has {size}" for language, size in self.sizes.items() if size < need]
        if small:
            raise ValueError(
                f"support ({support_size}) and query ({query_size}) take {need} different sentences of each language: "
                f"{', '.join(small)}"
            )
        self.support_size, self.query_size, self.seed = support_size, query_size, seed
        self._number = 0  # of the next meta-batch
        self._drawn = [0] * len(self.languages)  # so many pieces of each language

    def __iter__(self) -> Iterator[list[Draw]]:
        """Return itself: there is one stream."""
        return self

    def __next__(self) -> list[Draw]:
        """Return the next meta-batch; never runs dry."""
        draws = [self._draw(number) for number in self._members()]
        self._number += 1
        return draws

    def _draw(self, number: int) -> Draw:
        """The next piece of a language."""
        language, need = self.languages[number], self.support_size + self.query_size
        size = self.sizes[language]
        passed, place = divmod(self._drawn[number], size // need)
        rows = self._random(_SENTENCES, number, passed).permutation(size)[place * need : (place + 1) * need]
        self._drawn[number] += 1
        return Draw(language, rows[: self.support_size], rows[self.support_size :])

    def state_dict(self) -> dict[str, Any]:
        """Return counters that JSON can hold; the same on every process that has drawn as much."""
        return {"meta_batch": self._number, "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with the same data and settings."""
        self._number = int(state["meta_batch"])
        self._drawn = [int(n) for n in state["drawn"]]

    def _members(self) -> list[int]:
        """The languages of the next meta-batch."""
        if self.meta_batch == len(self.languages):
            return list(range(self.meta_batch))
        members: list[int] = self._random(_LANGUAGES, self._number).permutation(len(self.languages)).tolist()
        return members[: self.meta_batch]

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r} (expected an integer >= {low})")
