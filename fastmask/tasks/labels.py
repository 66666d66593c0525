"""Names of labels: of the training rows, in a model's config, and those of a support set that a model does not have."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastmask.errors import unknown as unknown_name
from fastmask.tasks.pretrained import load_model
from fastmask.tasks.task import UNKNOWN_LABELS

__all__ = ["check_labels", "labels_of", "listed", "model_for", "name_of"]


def name_of(label: Any) -> str | None:
    """A label by its name; None if there is none: not given, or ``_`` as CoNLL-U has it."""
    return None if label is None or label in ("_", "") else str(label)


def model_for(auto: str, name: str, labels: Iterable[Any]) -> nn.Module:
    """A pretrained model with a head for these labels, whose names its config has; see `load_model`.

    Raises:
        ValueError: fewer than two labels.
    """
    names = sorted({found for label in labels if (found := name_of(label)) is not None}, key=_by_number)
    if len(names) < 2:
        raise ValueError(f"the training data has the labels {', '.join(names) or 'none'} (expected at least two)")
    numbers = {label: number for number, label in enumerate(names)}
    return load_model(auto, name, id2label=dict(enumerate(names)), label2id=numbers)


def labels_of(model: Any) -> list[str]:
    """The labels of a model, in the order of its logits."""
    config = model.config
    return [config.id2label[number] for number in range(config.num_labels)]


def check_labels(given: Iterable[Any], known: Iterable[str], unknown: str) -> set[str]:
    """The labels that the model does not have, which are to be left out.

    Args:
        given: of the rows.
        known: of the model.
        unknown: one of `UNKNOWN_LABELS`; none but relations have a universal part, so "universal" is as "fail".

    Raises:
        ValueError: there are some, and `unknown` is not "ignore"; lists them with their counts.
        KeyError: `unknown` is none of the three.
    """
    if unknown not in UNKNOWN_LABELS:
        raise unknown_name("way of dealing with unknown labels", unknown, UNKNOWN_LABELS)
    known = set(known)
    missing = Counter(found for label in given if (found := name_of(label)) is not None and found not in known)
    if not missing:
        return set()
    if unknown != "ignore":
        raise ValueError(
            f"labels that the model was not trained on: {listed(missing)}. It knows {', '.join(sorted(known))}. "
            "Correct them, or leave them out (ignore)"
        )
    warnings.warn(f"labels that the model does not know are left out: {listed(missing)}", stacklevel=3)
    return set(missing)


def listed(counts: Counter[str]) -> str:
    """Labels with their counts, the most frequent first."""
    return ", ".join(f"{label} ({count})" for label, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def _by_number(label: str) -> tuple[int, str]:
    """Numbers in their order, then words in theirs."""
    return (int(label), "") if label.isascii() and label.isdigit() else (1 << 62, label)
