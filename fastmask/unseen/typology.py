"""How similar two languages are: by the direction of their dependencies, or by the URIEL database.

Head direction is counted by `fastmask.tasks.data.head_direction`. URIEL (Littell et al. 2017) is read by `lang2vec`
(the extra `typology`): the cosine of two languages' syntactic features, gaps filled by their nearest neighbours
(`syntax_knn`; which features is our choice).
"""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmask.errors import FastmaskKeyError, unknown

SIMILARITIES = ("uriel", "head-direction")

# Treebanks carry the codes of macrolanguages, which URIEL does not have: the member that their treebanks are in.
INDIVIDUAL = {
    "ar": "arb", "az": "azj", "fa": "pes", "gn": "gug", "mn": "khk", "sq": "als", "sw": "swh", "uz": "uzn", "zh": "cmn",
}  # fmt: skip


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
