"""How similar two languages are by the direction of their dependencies.

Head direction needs sentences with trees of both languages and nothing else. For each universal relation (subtypes
dropped, punctuation and the root left out) it counts the dependents that stand before their head and those that stand
after it. The similarity of two profiles is ours:

    p_r = (before_r + 1/2) / (before_r + after_r + 1)            smoothed, so that one word decides nothing
    w_r = 1 / (1 / n_r + 1 / m_r)                                n_r, m_r: how often each profile has the relation
    similarity = 1 - sum_r w_r |p_r - q_r| / sum_r w_r           over the relations that both have; from 0 to 1

w_r is proportional to the precision of a difference between two shares: of 20 support sentences a frequent relation
counts for what it is worth, and a rare one for little, however large the other treebank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def direction_profile(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """How often the dependents of each relation stand before and after their heads; JSON can hold it.

    Args:
        rows: a data set or mappings with "heads" (0: root, negative: none) and "deprels"; those without do not count.

    Returns:
        Universal relation -> [before, after]; relations that do not occur are not there.
    """
    columns = ("heads", "deprels")
    if set(columns) <= set(getattr(rows, "column_names", ())):  # a data set: nothing else need be read
        rows = rows.select_columns(list(columns))  # type: ignore[attr-defined]
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        if any(row.get(column) is None for column in columns):
            continue
        for position, (head, deprel) in enumerate(zip(row["heads"], row["deprels"], strict=True), start=1):
            relation = deprel.split(":", 1)[0]
            if head > 0 and head != position and relation not in ("punct", "root", "_"):
                counts[relation][position > head] += 1
    return dict(sorted(counts.items()))


def direction_similarity(
    profile: Mapping[str, Sequence[int]], others: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, float]:
    """Similarity of each language's profile in `others` to `profile`, 0 to 1, symmetric; see the top of this file.

    Raises:
        ValueError: two profiles have no relation in common.
    """
    return {language: _similarity(profile, other) for language, other in others.items()}


def _similarity(one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> float:
    weights, differences = [], []
    for relation in sorted(one.keys() & other.keys()):
        (before, after), (theirs, behind) = one[relation], other[relation]
        n, m = before + after, theirs + behind
        weights.append(n * m / (n + m))
        differences.append(abs((before + 0.5) / (n + 1) - (theirs + 0.5) / (m + 1)))
    if not weights:
        raise ValueError(
            f"two head-direction profiles have no relation in common: {', '.join(one) or 'none'} and "
            f"{', '.join(other) or 'none'}"
        )
    return 1 - float(np.average(differences, weights=weights))
