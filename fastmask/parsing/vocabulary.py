"""The closed sets a parser is trained on: dependency labels and universal part-of-speech tags, as numbers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmask.errors import unknown

__all__ = ["IGNORE", "SUBTYPES", "UNKNOWN_UPOS", "Vocabulary"]

IGNORE = -100  # target of a word that has no answer; F.cross_entropy skips it by default
UNKNOWN_UPOS = 0  # row 0 of the UPOS embedding stays zero: an unseen tag adds nothing
SUBTYPES = ("drop", "keep")


class Vocabulary:
    """Labels and tags seen in training, numbered from the most frequent one.

    Attributes:
        deprels: R labels; the number of a label is its place.
        upos: U tags; the number of a tag is its place + 1, because 0 is `UNKNOWN_UPOS`.
        subtypes: "drop" cuts ``nsubj:pass`` to ``nsubj`` (the official scorer ignores subtypes anyway), "keep"
            does not.
    """

    def __init__(self, deprels: Sequence[str], upos: Sequence[str], subtypes: str = "drop") -> None:
        """Take the labels and tags in the order of their numbers.

        Raises:
            ValueError: no label, or `subtypes` is neither "drop" nor "keep".
        """
        if subtypes not in SUBTYPES:
            raise ValueError(f"subtypes is {subtypes!r} (expected one of {', '.join(SUBTYPES)})")
        if not deprels:
            raise ValueError("a vocabulary without dependency labels (expected at least one)")
        self.deprels = tuple(deprels)
        self.upos = tuple(upos)
        self.subtypes = subtypes
        self._deprel_ids = {label: i for i, label in enumerate(self.deprels)}
        self._upos_ids = {tag: i + 1 for i, tag in enumerate(self.upos)}

    @classmethod
    def build(cls, sentences: Iterable[dict[str, Any]], subtypes: str = "drop") -> Vocabulary:
        """Collect the labels and tags of sentences with the columns "deprels" and "upos" (list[str] each)."""
        deprels: Counter[str] = Counter()
        upos: Counter[str] = Counter()
        for sentence in sentences:
            deprels.update(sentence["deprels"])
            upos.update(sentence["upos"])
        if subtypes == "drop":
            whole: Counter[str] = Counter()
            for label, count in deprels.items():
                whole[label.split(":", 1)[0]] += count
            deprels = whole
        for counts in (deprels, upos):
            counts.pop("_", None)  # CoNLL-U's "not given"

        def ranked(counts: Counter[str]) -> list[str]:
            return sorted(counts, key=lambda name: (-counts[name], name))

        return cls(ranked(deprels), ranked(upos), subtypes)

    def deprel_ids(self, labels: Sequence[str]) -> np.ndarray:
        """Return int64 [n]; a label not seen in training (or ``_``) is `IGNORE`, never another label."""
        if self.subtypes == "drop":
            labels = [label.split(":", 1)[0] for label in labels]
        return np.fromiter((self._deprel_ids.get(label, IGNORE) for label in labels), np.int64, len(labels))

    def upos_ids(self, tags: Sequence[str]) -> np.ndarray:
        """Return int64 [n]; a tag not seen in training (or ``_``) is `UNKNOWN_UPOS`."""
        return np.fromiter((self._upos_ids.get(tag, UNKNOWN_UPOS) for tag in tags), np.int64, len(tags))

    def deprel(self, label: str) -> int:
        """Return the number of one label; raise KeyError with the nearest names if it was not seen in training."""
        if label not in self._deprel_ids:
            raise unknown("dependency label", label, self.deprels)
        return self._deprel_ids[label]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        content = {"deprels": self.deprels, "upos": self.upos, "subtypes": self.subtypes}
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["deprels"], content["upos"], content["subtypes"])

    def __eq__(self, other: object) -> bool:
        """Two vocabularies are equal if they number everything alike."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (self.deprels, self.upos, self.subtypes) == (other.deprels, other.upos, other.subtypes)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Say how many labels and tags there are."""
        return f"Vocabulary({len(self.deprels)} deprels, {len(self.upos)} upos, subtypes={self.subtypes!r})"
