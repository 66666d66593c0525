"""Support examples of an unseen language: where they come from, and which ones make a set."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Pool", "split_pool", "support_sets", "without_repeats"]

POOL_SPLITS = ("train", "dev", "test")

_SETS, _POOL = range(2)  # what a random stream is for


def support_sets(n_pool: int, size: int, count: int, seed: int, language: str) -> list[np.ndarray]:
    """`count` random support sets: int64 [size] rows of a pool of `n_pool` sentences, in random order.

    No row twice in a set, and none in two sets while the pool lasts; then the pool is drawn from anew. The first sets
    are the same however many are drawn. Length plays no part.

    Raises:
        ValueError: the pool is smaller than a set, or a number is out of its range.
    """
    if size < 0 or count < 0 or seed < 0:
        raise ValueError(f"size is {size}, count {count} and seed {seed} (expected none below 0)")
    if n_pool < size:
        raise ValueError(f"language {language!r} has {n_pool} sentences for support sets (expected at least {size})")
    at_once = n_pool // size if size else max(count, 1)  # sets that one drawing of the pool makes
    orders = [_random(seed, _SETS, language, round_).permutation(n_pool) for round_ in range(-(-count // at_once))]
    return [orders[n // at_once][n % at_once * size : (n % at_once + 1) * size] for n in range(count)]


@dataclass(frozen=True)
class Pool:
    """The sentences of an unseen language, parted.

    Attributes:
        support: rows that support sets are drawn from.
        test: rows that are scored, the same for all support sets; none has the words of a support row.
        source: the split that the support rows are from.
        dropped: test rows that were left out because a support row has the same words.
    """

    support: list[Mapping[str, Any]] = field(repr=False)
    test: list[Mapping[str, Any]] = field(repr=False)
    source: str
    dropped: int


def words_of(row: Mapping[str, Any]) -> Any:
    """What makes two rows the same sentence: their "words"."""
    return tuple(row["words"])


def split_pool(
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    size: int,
    seed: int,
    language: str,
    set_aside: int = 100,
    same: Callable[[Mapping[str, Any]], Any] = words_of,
) -> Pool:
    """Part an unseen language's sentences into a pool for support sets and a test.

    The pool is the train split if that holds a support set, else the dev split, else a random part of the test split,
    which is then not tested on.

    Args:
        splits: split -> rows with "words"; "test" must be there.
        size: sentences of a support set; 0 where there are none (zero-shot).
        seed: of the part of the test split.
        language: for messages, and part of the seed.
        set_aside: test sentences that make the pool if they must: never more than half of them, unless a support set
            takes more.
        same: what makes two rows the same example.

    Raises:
        ValueError: no test sentences, or no split with enough sentences; the message says how many there are.
    """
    rows = {name: list(splits.get(name, ())) for name in POOL_SPLITS}
    test = rows["test"]
    if not test:
        raise ValueError(f"language {language!r} has no test sentences (splits given: {', '.join(splits) or 'none'})")
    source = next((name for name in ("train", "dev") if len(rows[name]) >= max(size, 1)), "test")
    if source == "test":
        if size >= len(test):
            counts = ", ".join(f"{len(found)} in {name}" for name, found in rows.items())
            raise ValueError(
                f"language {language!r} has too few sentences for a support set of {size}: {counts} "
                f"(expected {size} in train or dev, or more than {size} in test)"
            )
        number = 0 if size == 0 else max(size, min(set_aside, len(test) // 2))
        order = _random(seed, _POOL, language).permutation(len(test))
        support = [test[row] for row in np.sort(order[:number])]
        test = [test[row] for row in np.sort(order[number:])]
    else:
        support = rows[source]
    left = without_repeats(test, support, same)
    if not left:
        raise ValueError(f"language {language!r}: every test sentence is also a support sentence")
    return Pool(support, left, source, len(test) - len(left))


def without_repeats(
    test: Iterable[Mapping[str, Any]],
    support: Iterable[Mapping[str, Any]],
    same: Callable[[Mapping[str, Any]], Any] = words_of,
) -> list[Mapping[str, Any]]:
    """The test rows that are not `same` as a support row."""
    taken = {same(row) for row in support}
    return [row for row in test if same(row) not in taken]


def _random(seed: int, purpose: int, language: str, *counters: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, zlib.crc32(language.encode("utf-8")), *counters])
