"""The closed sets a parser is trained on: dependency labels and universal part-of-speech tags, as numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastmask.errors import nearest
from fastmask.errors import unknown as unknown_name
from fastmask.tasks.task import UNKNOWN_LABELS, listed

IGNORE = -100  # target of a word that has no answer; F.cross_entropy skips it by default
UNKNOWN_UPOS = 0  # row 0 of the UPOS embedding stays zero: an unseen tag adds nothing
SUBTYPES = ("drop", "keep")
ROOT, UNSPECIFIED, LOOSE = "root", "dep", "parataxis"  # relations of Universal Dependencies with a fixed meaning


def universal(label: str) -> str:
    """A relation without its subtype: ``nsubj`` of ``nsubj:pass``."""
    return label.partition(":")[0]


class Vocabulary:
    """Labels and tags seen in training, numbered from the most frequent one.

    Attributes:
        deprels: R labels; the number of a label is its place.
        upos: U tags; the number of a tag is its place + 1, because 0 is `UNKNOWN_UPOS`.
        subtypes: "drop" cuts ``nsubj:pass`` to ``nsubj`` (scores ignore subtypes anyway), "keep"
            does not.
        roots: int64, the numbers of the labels that only the root of a tree may have: ``root`` and its subtypes.
        others: int64, the numbers of the other labels.
    """

    def __init__(self, deprels: Sequence[str], upos: Sequence[str], subtypes: str = "drop") -> None:
        """Take the labels and tags in the order of their numbers.

        Raises:
            ValueError: no label, one twice, one that is empty or holds white space, or `subtypes` is neither "drop"
                nor "keep".
        """
        if subtypes not in SUBTYPES:
            raise ValueError(f"subtypes is {subtypes!r} (expected one of {', '.join(SUBTYPES)})")
        if not deprels:
            raise ValueError("a vocabulary without dependency labels (expected at least one)")
        for label in deprels:
            if label.split() != [label]:
                raise ValueError(f"dependency label {label!r} (expected text without white space)")
        for names in (deprels, upos):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{twice[0]!r} stands twice in a vocabulary (expected every name once)")
        self.deprels = tuple(deprels)
        self.upos = tuple(upos)
        self.subtypes = subtypes
        self._deprel_ids = {label: i for i, label in enumerate(self.deprels)}
        self._upos_ids = {tag: i + 1 for i, tag in enumerate(self.upos)}
        is_root = np.array([universal(label) == ROOT for label in self.deprels])
        self.roots, self.others = np.flatnonzero(is_root), np.flatnonzero(~is_root)

    @classmethod
    def build(cls, sentences: Iterable[dict[str, Any]], subtypes: str = "drop") -> Vocabulary:
        """Collect the labels and tags of sentences with the columns "deprels" and "upos" (list[str] each)."""
        deprels: Counter[str] = Counter()
        upos: Counter[str] = Counter()
        for sentence in sentences:
            labels = sentence["deprels"]
            deprels.update(map(universal, labels) if subtypes == "drop" else labels)
            upos.update(sentence["upos"])
        for counts in (deprels, upos):
            counts.pop("_", None)  # CoNLL-U's "not given"

        def ranked(counts: Counter[str]) -> list[str]:
            return sorted(counts, key=lambda name: (-counts[name], name))

        vocabulary = cls(ranked(deprels), ranked(upos), subtypes)
        if not len(vocabulary.roots):
            warnings.warn(
                f"no word of the training data is labelled {ROOT!r}; the parser will give that label to every root, "
                "as Universal Dependencies demand",
                stacklevel=2,
            )
        return vocabulary

    def deprel_ids(self, labels: Sequence[str]) -> np.ndarray:
        """Return int64 [n]; a label not seen in training (or ``_``) is `IGNORE`, never another label."""
        if self.subtypes == "drop":
            labels = [universal(label) for label in labels]
        return np.fromiter((self._deprel_ids.get(label, IGNORE) for label in labels), np.int64, len(labels))

    def upos_ids(self, tags: Sequence[str]) -> np.ndarray:
        """Return int64 [n]; a tag not seen in training (or ``_``) is `UNKNOWN_UPOS`."""
        return np.fromiter((self._upos_ids.get(tag, UNKNOWN_UPOS) for tag in tags), np.int64, len(tags))

    @property
    def loose(self) -> str:
        """The label that attaches what merely stands beside: ``parataxis``, ``dep``, or the most frequent one."""
        known = [self.deprels[i] for i in self.others]
        return next((label for label in (LOOSE, UNSPECIFIED, *known) if label in known), UNSPECIFIED)


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
    counts = Counter(label for row in rows for label in row["deprels"])
    known = vocabulary.deprel_ids(list(counts)) != IGNORE
    missing = Counter({label: counts[label] for label, found in zip(counts, known, strict=True) if not found})
    if not missing:
        return list(rows)
    if unknown == "ignore":
        warnings.warn(
            f"relations that the model does not know have no label in the loss: {listed(missing)}", stacklevel=2
        )
        return list(rows)
    mapped: dict[str, str] = {}
    if unknown == "universal":
        whole = {label: universal(label) for label in missing if ":" in label}
        mapped = {label: relation for label, relation in whole.items() if relation in vocabulary.deprels}
        missing = Counter({label: count for label, count in missing.items() if label not in mapped})
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
    return [{**row, "deprels": [mapped.get(label, label) for label in row["deprels"]]} for row in rows]
