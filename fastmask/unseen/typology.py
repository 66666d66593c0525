"""How similar two languages are: by the direction of their dependencies, or by the URIEL database.

Head direction needs sentences with trees of both languages and nothing else. For each universal relation (subtypes
dropped, punctuation and the root left out) it counts the dependents that stand before their head and those that stand
after it. The similarity of two profiles is ours:

    p_r = (before_r + 1/2) / (before_r + after_r + 1)            smoothed, so that one word decides nothing
    w_r = 1 / (1 / n_r + 1 / m_r)                                n_r, m_r: how often each profile has the relation
    similarity = 1 - sum_r w_r |p_r - q_r| / sum_r w_r           over the relations that both have; from 0 to 1

w_r is proportional to the precision of a difference between two shares: of 20 support sentences a frequent relation
counts for what it is worth, and a rare one for little, however large the other treebank.

URIEL (Littell et al. 2017) is read by `lang2vec` (the extra `typology`): the cosine of two languages' syntactic
features, gaps filled by their nearest neighbours (`syntax_knn`; which features is our choice, too).
"""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmask.errors import FastmaskKeyError, unknown

__all__ = [
    "SIMILARITIES", "HeadDirection", "direction_profile", "direction_similarity", "head_direction_similarity",
    "similarity_measure", "uriel_similarity",
]  # fmt: skip

SIMILARITIES = ("uriel", "head-direction")

# Treebanks carry the codes of macrolanguages, which URIEL does not have: the member that their treebanks are in.
INDIVIDUAL = {
    "ar": "arb", "az": "azj", "fa": "pes", "gn": "gug", "mn": "khk", "sq": "als", "sw": "swh", "uz": "uzn", "zh": "cmn",
}  # fmt: skip


@dataclass(frozen=True)
class HeadDirection:
    """How often the dependents of each relation stand before and after their heads.

    Attributes:
        counts: universal relation -> (before, after); relations that do not occur are not there.
    """

    counts: Mapping[str, Sequence[int]]

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> HeadDirection:
        """Count sentences with "heads" (0: root, negative: none) and "deprels"."""
        counts: dict[str, Sequence[int]] = {}
        for row in rows:
            for position, (head, deprel) in enumerate(zip(row["heads"], row["deprels"], strict=True), start=1):
                relation = deprel.split(":", 1)[0]
                if head > 0 and head != position and relation not in ("punct", "root", "_"):
                    before, after = counts.get(relation, (0, 0))
                    counts[relation] = (before + (position < head), after + (position > head))
        return cls(dict(sorted(counts.items())))

    def similarity(self, other: HeadDirection) -> float:
        """Similarity of two profiles, 0 to 1, symmetric; see the top of this file.

        Raises:
            ValueError: they have no relation in common.
        """
        weights, differences = [], []
        for relation in sorted(self.counts.keys() & other.counts.keys()):
            (before, after), (theirs, behind) = self.counts[relation], other.counts[relation]
            n, m = before + after, theirs + behind
            weights.append(n * m / (n + m))
            differences.append(abs((before + 0.5) / (n + 1) - (theirs + 0.5) / (m + 1)))
        if not weights:
            raise ValueError(
                "two head-direction profiles have no relation in common: "
                f"{', '.join(self.counts) or 'none'} and {', '.join(other.counts) or 'none'}"
            )
        return 1 - float(np.average(differences, weights=weights))


def direction_profile(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of a `HeadDirection` of rows (a data set or mappings), as JSON; rows without trees do not count."""
    columns = ("heads", "deprels")
    if set(columns) <= set(getattr(rows, "column_names", ())):  # a data set: nothing else need be read
        rows = rows.select_columns(list(columns))  # type: ignore[attr-defined]
    return dict(HeadDirection.of_rows(row for row in rows if set(columns) <= row.keys()).counts)


def direction_similarity(profile: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`head_direction_similarity` of profiles as `direction_profile` makes them, also after they were JSON."""
    return head_direction_similarity(HeadDirection(profile), {name: HeadDirection(of) for name, of in others.items()})


def head_direction_similarity(support: HeadDirection, training: Mapping[str, HeadDirection]) -> dict[str, float]:
    """Similarity of each training language's profile to that of the support sentences."""
    return {language: support.similarity(profile) for language, profile in training.items()}


def similarity_measure(language: str, others: Sequence[str], has_support: bool, asked: str | None = None) -> str:
    """Which of `SIMILARITIES` finds the nearest of `others` to `language`.

    The one that is asked for; else URIEL where `lang2vec` is installed and knows them all; else head direction.

    Raises:
        KeyError: `asked` is neither, or URIEL is asked for and lacks a language.
        ImportError: URIEL is asked for and `lang2vec` is not there.
        ValueError: only head direction is left, and there are no support sentences.
    """
    if asked is not None and asked not in SIMILARITIES:
        raise unknown("similarity of languages", asked, SIMILARITIES)
    why_not = "which was not asked for"
    if asked != "head-direction":
        try:
            _codes(_uriel(), [language, *others])
            return "uriel"
        except (ImportError, KeyError) as error:
            if asked is not None:
                raise
            why_not = str(error)
    if not has_support:
        raise ValueError(
            f"the language nearest to {language!r} by head direction cannot be found without support sentences that "
            f"have trees: give some, choose best, union or full, or use URIEL ({why_not})"
        )
    return "head-direction"


def uriel_similarity(language: str, others: Sequence[str]) -> dict[str, float]:
    """Cosine of the URIEL syntactic features of `language` with those of each of `others`, 0 to 1.

    Args:
        language: ISO 639-1 or 639-3 code, as treebanks have them.
        others: the same.

    Raises:
        ImportError: `lang2vec` is not installed, or cannot be imported; the message says what to install.
        KeyError: a language that URIEL does not have.
    """
    uriel = _uriel()
    codes = _codes(uriel, [language, *others])
    found = uriel.get_features(sorted(set(codes.values())), "syntax_knn")
    features = {name: np.asarray(found[code], dtype=np.float64) for name, code in codes.items()}
    own = features[language]

    def cosine(theirs: np.ndarray) -> float:
        return float(own @ theirs / np.sqrt((own @ own) * (theirs @ theirs)))

    return {name: cosine(features[name]) for name in others}


def _codes(uriel: Any, languages: Sequence[str]) -> dict[str, str]:
    """The code that URIEL has for each language."""
    codes = {name: str(INDIVIDUAL.get(name) or uriel.LETTER_CODES.get(name, name)) for name in languages}
    lacking = [name for name, code in codes.items() if code not in uriel.URIEL_LANGUAGES]
    if lacking:
        raise FastmaskKeyError(f"URIEL has no language {', '.join(map(repr, lacking))} (expected ISO 639 codes it has)")
    return codes


def _uriel() -> Any:
    """The package lang2vec, imported without the folder of installed scripts.

    It puts a ``lang2vec.py`` there, which hides the package from every command that is started from it.
    """
    before, scripts = list(sys.path), sysconfig.get_path("scripts")
    sys.path[:] = [folder for folder in before if folder != scripts]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it reads its files by `pkg_resources`, which says that it is deprecated
            from lang2vec import lang2vec
    except ImportError as error:
        name = error.name or "lang2vec"
        hint = " (setuptools below 82 has it)" if name == "pkg_resources" else ""
        raise ImportError(
            f"the similarity of languages by URIEL needs the package {name}{hint}: "
            "in a checkout of fastmask, pip install -e '.[typology]'; head direction does without",
            name=name,
        ) from error
    finally:
        sys.path[:] = before
    return lang2vec
