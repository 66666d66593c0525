"""Eight invented languages: their word orders and their vocabularies.

Nothing here is a natural language. Two families descend from one invented proto-vocabulary by regular sound changes,
so related languages share many character trigrams, while word order cuts across the families: each has members that
put the head first and members that put it last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Language:
    """How one language orders and marks what is in a clause.

    Attributes:
        code: a private-use code of ISO 639 (qaa..qtz are never given to a language).
        name: the language part of the folder's name.
        family: a key of the families' sound changes.
        order: of subject, object and verb: "SVO", "VSO" or "SOV".
        postpositions: adpositions, subordinators and auxiliaries follow what they mark; else they precede it.
        adjective, genitive, relative, determiner: "before" or "after" the noun.
        cases: subjects and objects carry a suffix; without it, only their place tells them apart.
        genitive_marking: "adposition" or "suffix".
        scrambling: how often subject and object change places.
        sounds: this language's own changes, after its family's: (pattern, replacement).
        contractions: a preposition and a determiner after it are written as one token (a multiword token).
    """

    code: str
    name: str
    family: str
    order: str
    postpositions: bool
    adjective: str
    genitive: str
    relative: str
    determiner: str
    cases: bool
    genitive_marking: str
    scrambling: float
    sounds: tuple[tuple[str, str], ...]
    contractions: bool = False


_FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "west": (("p", "f"), ("k(?=[ei])", "c"), ("(?<=[aeiou])t(?=[aeiou])", "d"), ("[ou]$", "o")),
    "east": (("b", "p"), ("d", "t"), ("g", "k"), ("r", "l"), ("e", "i"), ("(?<=[aeiou])s(?=[aeiou])", "h")),
}

# In each family the first has the head first and another has it last; the unseen ones combine traits that
# no seen one combines (qad: the verb first, yet adjectives and genitives before the noun; qah: the verb last, yet
# prepositions).
_TABLE: tuple[Language, ...] = (
    Language("qaa", "Avaran", "west", "SVO", False, "after", "after", "after", "before", False, "adposition", 0.0,
             (("v", "b"), ("n$", "")), contractions=True),
    Language("qab", "Belusk", "west", "SVO", False, "before", "after", "after", "after", True, "suffix", 0.25,
             (("d", "z"), ("a(?=[mn])", "o"))),
    Language("qac", "Cidori", "west", "SOV", True, "before", "before", "before", "before", True, "suffix", 0.15,
             (("c", "s"), ("l", "r"))),
    Language("qad", "Dofane", "west", "VSO", False, "before", "before", "after", "after", True, "suffix", 0.1,
             (("v", "w"), ("s(?=[ei])", "x"))),
    Language("qae", "Esikul", "east", "SOV", True, "before", "before", "before", "before", False, "adposition", 0.0,
             (("h", ""), ("u", "o"))),
    Language("qaf", "Fulati", "east", "SOV", True, "after", "before", "before", "after", True, "suffix", 0.2,
             (("t(?=i)", "j"), ("m$", "n"))),
    Language("qag", "Galuhi", "east", "VSO", False, "after", "after", "after", "after", False, "adposition", 0.0,
             (("p", "b"), ("s(?=[iu])", "z"))),
    Language("qah", "Hikolan", "east", "SOV", False, "after", "after", "after", "before", True, "adposition", 0.15,
             (("k(?=i)", "y"), ("i$", ""))),
)  # fmt: skip

LANGUAGES: dict[str, Language] = {language.code: language for language in _TABLE}
UNSEEN: tuple[str, ...] = ("qad", "qah")
SEEN: tuple[str, ...] = tuple(code for code in LANGUAGES if code not in UNSEEN)

# What a noun can be decides what may go with it: see `synthetic`.
NOUN_CLASSES = ("person", "thing", "place", "tool", "part", "time")

# Words per class of the proto-vocabulary.
_SIZES: dict[str, int] = {
    **{f"noun.{kind}": 18 for kind in NOUN_CLASSES},
    "name": 16,
    "verb.intransitive": 18,
    "verb.transitive": 34,
    "verb.saying": 10,
    "adjective": 30,
    "adverb": 14,
    "pronoun": 5,
    "determiner": 4,
    "adposition": 6,
    "genitive": 1,
    "auxiliary": 3,
    "conjunction": 2,
    "subordinator": 3,
    "complementizer": 1,
    "relativizer": 1,
    "suffix.subject": 1,
    "suffix.object": 1,
    "suffix.genitive": 1,
}
_OPEN_CLASSES = ("noun", "name", "verb", "adjective", "adverb")

# The same for every seed: a language is what it is, and only the sentences drawn from it change.
_PROTO_SEED = "fastmask proto-vocabulary 1"

Lexicon = dict[str, tuple[str, ...]]


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """Return a random item.

    Only `random()` is promised to give the same numbers in every version of Python; `choice` and `sample` are not.
    """
    return items[int(rng.random() * len(items))]


def lexicon(language: Language) -> Lexicon:
    """Return word class -> forms; the i-th forms of a class are cognates in all languages."""
    changes = (*_FAMILIES[language.family], *language.sounds)
    forms: Lexicon = {}
    used: set[str] = set()
    for word_class, roots in _proto_vocabulary().items():
        daughters = []
        for root in roots:
            form = root
            for pattern, replacement in changes:
                form = re.sub(pattern, replacement, form)
            # Two roots may fall together; the later one then gets a syllable, and no form means two things.
            while not form or (form in used and not word_class.startswith("suffix")):
                form += "ra" if language.family == "west" else "la"
            used.add(form)
            daughters.append(form)
        forms[word_class] = tuple(daughters)
    return forms


def _proto_vocabulary() -> Lexicon:
    """Return the invented roots that all languages descend from: word class -> roots."""
    rng = random.Random(_PROTO_SEED)
    used: set[str] = set()
    roots: Lexicon = {}
    for word_class, size in _SIZES.items():
        is_open = word_class.split(".")[0] in _OPEN_CLASSES
        words: list[str] = []
        while len(words) < size:
            word = _root(rng, syllables=(2 if rng.random() < 0.6 else 3) if is_open else 1)
            if word_class.startswith("suffix"):
                word = pick(rng, "aeiou") + pick(rng, "mnsr")
            if word not in used:
                used.add(word)
                words.append(word)
        roots[word_class] = tuple(words)
    return roots


def _root(rng: random.Random, syllables: int) -> str:
    """Return consonant-vowel syllables, at times with a consonant at the end."""
    word = "".join(pick(rng, "ptkbdgmnslrv") + pick(rng, "aeiou") for _ in range(syllables))
    return word + pick(rng, "nrsm") if rng.random() < 0.3 else word
