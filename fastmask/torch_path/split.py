"""Where the examples of each language are in a mixed-language batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastmask.kept import Kept
from fastmask.masks import FULL


class Split:
    """A batch with the examples of each language side by side.

    Attributes:
        languages: of each example, in the order of the batch.
        parts: each language that occurs, and its examples, from first to before last, once they are `sorted`.
        present: the languages of `parts`.
    """

    def __init__(self, languages: Sequence[int]) -> None:
        self.languages = languages
        places: dict[int, list[int]] = {}
        for place, language in enumerate(languages):
            places.setdefault(language, []).append(place)
        if any(where[-1] - where[0] >= len(where) for where in places.values()):  # they are copied in any case:
            # those with equally many examples side by side, as they are multiplied together
            places = dict(sorted(places.items(), key=lambda item: len(item[1])))
        self.parts: list[tuple[int, int, int]] = []
        order: list[int] = []
        for language, where in places.items():
            self.parts.append((language, len(order), len(order) + len(where)))
            order += where
        self.present = tuple(places)
        self._order = None if order == list(range(len(order))) else torch.tensor(order, device="cpu")

    @cached_property
    def ids(self) -> Tensor:
        """The language of each example, int64 [B]."""
        return torch.tensor(self.languages, dtype=torch.int64, device="cpu")

    @cached_property
    def full(self) -> Split:
        """The same examples, all of the full network."""
        return split_of((FULL,) * len(self.languages))

    def pieces(self, tokens: Tensor, T: int) -> Sequence[Tensor]:
        """What belongs to each part of `sorted` tokens [B * T, width]."""
        return tokens.split_with_sizes([(last - first) * T for _, first, last in self.parts]) if self.parts else ()

    def sorted(self, x: Tensor) -> Tensor:
        """The tokens [B * T, width] of x [B, T, width], examples of one language side by side."""
        if self._order is not None:
            x = x.index_select(0, self._order.to(x.device))
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2])

    def unsorted(self, tokens: Tensor, T: int) -> Tensor:
        """Undo `sorted`: [B * T, width] -> [B, T, width]."""
        x = tokens.view(len(self.languages), T, tokens.shape[1])
        return x if self._order is None else torch.empty_like(x).index_copy_(0, self._order.to(x.device), x)

    def merged(self, same_as: Sequence[Sequence[int]]) -> Split:
        """The same examples, with languages whose masks are equal in all layers (`first_equals` of each) as one.

        Where languages agree (a mask that all share, a layer that none prunes), one product takes the tokens of all.
        """
        firsts: dict[tuple[int, ...], int] = {}
        names: dict[int, int] = {}
        for language in self.present:
            masks = tuple([same[language] for same in same_as])
            names[language] = firsts.setdefault(masks, FULL if set(masks) == {FULL} else language)
        if all(language == name for language, name in names.items()):
            return self
        return split_of(tuple([names[language] for language in self.languages]))


split_of = lru_cache(64)(Split)  # the layers of a model have one; batches are often alike

_read: Kept[tuple[int, ...]] = Kept()


def languages_of(language_ids: Tensor, n_languages: int) -> tuple[int, ...]:
    """Ids int64 [B] as numbers.

    Raises:
        ValueError: an id that is not -1 to n_languages - 1.
    """
    if language_ids.is_cpu:  # read in each call: what numpy writes is not counted
        languages = tuple(language_ids.tolist())
    else:  # once: reading waits for the device
        languages = _read.of(language_ids, lambda: tuple(language_ids.tolist()))
    if languages and not (min(languages) >= FULL and max(languages) < n_languages):
        place = next(place for place, language in enumerate(languages) if not FULL <= language < n_languages)
        raise ValueError(
            f"language_ids[{place}] is {languages[place]}; expected 0 to {n_languages - 1}, or -1 for the full network"
        )
    return languages


def first_equals(masks: Sequence[Tensor], whole: Callable[[int], bool]) -> list[int]:
    """For each language the first one with an equal mask, `FULL` for one that owns everything; last for `FULL`."""
    firsts: dict[bytes, int] = {}
    found = [firsts.setdefault(mask.cpu().numpy().tobytes(), language) for language, mask in enumerate(masks)]
    return [FULL if whole(language) else language for language in found] + [FULL]
