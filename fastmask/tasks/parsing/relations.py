"""Relations that a parser was not trained on: found before it is adapted to sentences that have them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastmask.errors import nearest
from fastmask.errors import unknown as unknown_name
from fastmask.tasks.labels import listed
from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary
from fastmask.tasks.task import UNKNOWN_LABELS

__all__ = ["check_deprels", "unknown_deprels"]


def unknown_deprels(rows: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> Counter[str]:
    """How often each relation occurs that the vocabulary lacks; labels as they stand in the rows."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["deprels"])
    labels = list(counts)
    known = vocabulary.deprel_ids(labels) != IGNORE
    return Counter({label: counts[label] for label, found in zip(labels, known, strict=True) if not found})


def check_deprels(
    rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, unknown: str = "fail"
) -> list[Mapping[str, Any]]:
    """The rows, once every relation in them is one the model can learn, or has been dealt with as asked.

    Args:
        rows: with "deprels".
        vocabulary: of the model.
        unknown: what to do about relations that it lacks. "fail"; "universal": `nsubj:xyz` becomes `nsubj` where the
            vocabulary has that, anything else fails; "ignore": such words keep their head and have no label in the
            loss, with a warning that lists them.

    Raises:
        ValueError: relations that are left unknown, listed with their counts.
        KeyError: `unknown` is none of the three.
    """
    if unknown not in UNKNOWN_LABELS:
        raise unknown_name("way of dealing with unknown relations", unknown, UNKNOWN_LABELS)
    missing = unknown_deprels(rows, vocabulary)
    if not missing:
        return list(rows)
    if unknown == "ignore":
        warnings.warn(
            f"relations that the model does not know have no label in the loss: {listed(missing)}", stacklevel=2
        )
        return list(rows)
    universal: dict[str, str] = {}
    if unknown == "universal":
        whole = {label: label.split(":", 1)[0] for label in missing if ":" in label}
        universal = {label: relation for label, relation in whole.items() if relation in vocabulary.deprels}
        missing = Counter({label: count for label, count in missing.items() if label not in universal})
    if missing:
        close = {label: nearest(label, vocabulary.deprels, 1) for label in missing}
        hints = ", ".join(f"{label} looks like {found[0]}" for label, found in close.items() if found)
        ways = "leave their labels out (ignore)"
        if unknown == "fail":
            ways = f"map subtypes to their universal relations (universal) or {ways}"
        raise ValueError(
            f"relations that the model was not trained on: {listed(missing)}{f' ({hints})' if hints else ''}. "
            f"It knows {', '.join(sorted(vocabulary.deprels))}. Correct them, or {ways}"
        )
    return [{**row, "deprels": [universal.get(label, label) for label in row["deprels"]]} for row in rows]
