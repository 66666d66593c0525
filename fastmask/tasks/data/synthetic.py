"""An artificial treebank in eight invented languages, for trying and testing everything without a download.

The sentences mean nothing and no score on them says anything about natural languages. What carries over is the
situation: word orders in conflict, vocabularies in common within a family, and attachments that only the words
themselves decide. A phrase such as "with N" hangs from the verb or from the noun before it according to its
adposition and the noun's class, with noise, so a perfect parser does not score 100.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastmask.files import StrPath, write_folder
from fastmask.tasks.data.conllu import write_texts
from fastmask.tasks.data.synthetic_languages import LANGUAGES, NOUN_CLASSES, SEEN, UNSEEN, Language, lexicon, pick

__all__ = ["LANGUAGES", "SEEN", "SENTENCES", "UNSEEN", "UNSEEN_TRAIN", "treebanks_in", "write_treebanks"]

SENTENCES: dict[str, int] = {"train": 600, "dev": 100, "test": 150}
UNSEEN_TRAIN = 20  # a support set: nobody should train on the unseen languages

SHORTEST, LONGEST = 3, 25  # words

# For each adposition (row) and class of its noun (column): how often it hangs from a noun rather than from the verb.
_TO_NOUN: tuple[tuple[float, ...], ...] = (
    # person thing place tool  part  time
    (0.9, 0.7, 0.2, 0.1, 0.95, 0.05),
    (0.8, 0.5, 0.1, 0.05, 0.9, 0.05),
    (0.1, 0.2, 0.1, 0.05, 0.3, 0.05),
    (0.2, 0.9, 0.8, 0.6, 0.9, 0.7),
    (0.05, 0.1, 0.3, 0.05, 0.1, 0.05),
    (0.7, 0.8, 0.9, 0.9, 0.8, 0.1),
)


@dataclass
class _Node:
    """A word with its dependents on either side, from left to right."""

    form: str
    upos: str
    deprel: str = "root"
    feats: str = "_"
    lemma: str = ""
    noun_class: str = ""
    before: list[_Node] = field(default_factory=list)
    after: list[_Node] = field(default_factory=list)

    def words(self) -> list[_Node]:
        left = [word for node in self.before for word in node.words()]
        return [*left, self, *(word for node in self.after for word in node.words())]


def write_treebanks(directory: StrPath, seed: int = 0, sentences: Mapping[str, int] = SENTENCES) -> list[str]:
    """Write ``UD_<Name>-Toy/<code>_toy-ud-{train,dev,test}.conllu`` for all languages; return their codes.

    The same seed and numbers give the same bytes on every machine.

    Args:
        directory: made if it is missing; files of the same name are replaced.
        seed: another seed gives other sentences of the same languages.
        sentences: how many per split in a seen language, `SENTENCES` for a split that is not given; unseen ones get
            at most `UNSEEN_TRAIN` for training.
    """
    for code, language in LANGUAGES.items():
        folder = Path(directory) / f"UD_{language.name}-Toy"
        folder.mkdir(parents=True, exist_ok=True)
        written: set[str] = set()  # no sentence twice, above all not in train and test
        # Test first: it must not depend on how much training data was asked for.
        for split in ("test", "dev", "train"):
            count = sentences.get(split, SENTENCES[split])
            if code in UNSEEN and split == "train":
                count = min(count, UNSEEN_TRAIN)
            grammar = _Grammar(language, random.Random(f"{seed}/{code}/{split}"))
            blocks: list[str] = []
            while len(blocks) < count:
                words = grammar.sentence()
                text = " ".join(word.form for word in words)
                if SHORTEST <= len(words) <= LONGEST and text not in written:
                    written.add(text)
                    blocks.append(_block(words, f"{code}-{split}-{len(blocks) + 1}", language.contractions))
            write_texts(folder / f"{code}_toy-ud-{split}.conllu", blocks)
    return list(LANGUAGES)


def _block(words: list[_Node], sent_id: str, contractions: bool) -> str:
    heads: dict[int, int] = {}
    place = {id(word): position for position, word in enumerate(words, start=1)}
    for word in words:
        for dependent in (*word.before, *word.after):
            heads[id(dependent)] = place[id(word)]
    lines: list[str] = []
    text = ""
    inside = 0  # the last word of a multiword token
    for position, word in enumerate(words, start=1):
        following = words[position] if position < len(words) else None
        glued = "SpaceAfter=No" if following is not None and following.upos == "PUNCT" else "_"
        space = "" if glued != "_" or following is None else " "
        if contractions and position > inside and word.upos == "ADP" and following and following.upos == "DET":
            token = word.form + following.form[1:]
            lines.append(f"{position}-{position + 1}\t{token}" + "\t_" * 8)
            inside = position + 1
            text += token + " "  # a noun always follows the determiner
        elif position > inside:
            text += word.form + space
        misc = glued if position > inside else "_"
        head = heads.get(id(word), 0)
        lemma = word.lemma or word.form
        columns = (position, word.form, lemma, word.upos, "_", word.feats, head, word.deprel, "_", misc)
        lines.append("\t".join(str(column) for column in columns))
    return "\n".join([f"# sent_id = {sent_id}", f"# text = {text.strip()}", *lines, "", ""])


class _Grammar:
    """Draws sentences of one language. Every method builds a subtree; `depth` counts clauses around it."""

    def __init__(self, language: Language, rng: random.Random) -> None:
        self.language = language
        self.rng = rng
        self.lexicon = lexicon(language)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def word(self, word_class: str, upos: str, deprel: str = "root") -> _Node:
        return _Node(pick(self.rng, self.lexicon[word_class]), upos, deprel)

    def put(self, head: _Node, dependent: _Node, side: str) -> None:
        """Attach at the outer edge of a side."""
        if side == "before":
            head.before.insert(0, dependent)
        else:
            head.after.append(dependent)

    def marker_side(self) -> str:
        return "after" if self.language.postpositions else "before"

    def sentence(self) -> list[_Node]:
        root = self.clause(depth=0)
        mark = _Node("?" if self.chance(0.1) else ".", "PUNCT", "punct")
        root.after.append(mark)
        return root.words()

    def clause(self, depth: int, deprel: str = "root", gap: bool = False) -> _Node:
        """Return a clause; `gap` leaves out the subject, as in a relative clause."""
        kind = pick(self.rng, ("intransitive", "transitive", "transitive", "transitive", "saying"))
        if kind == "saying" and depth >= 2:
            kind = "transitive"
        verb = self.word(f"verb.{kind}", "VERB", deprel)
        subject = None if gap else self.subject(depth)
        core: list[_Node] = []
        if kind == "transitive":
            core.append(self.mark_case(self.noun_phrase(depth, "obj"), "object"))
        for _ in range(2):
            if self.chance(0.3):
                core.append(self.adpositional_phrase(depth, "obl"))
        if kind == "saying":
            core.append(self.complement(depth))
        if self.language.order == "SOV":
            core.reverse()
        self.place_arguments(verb, subject, core)
        self.add_verb_modifiers(verb, depth)
        return verb

    def place_arguments(self, verb: _Node, subject: _Node | None, core: list[_Node]) -> None:
        order = self.language.order
        scrambled = self.chance(self.language.scrambling)
        first = [subject] if subject else []
        if order == "SOV":
            verb.before = [*core, *first] if scrambled else [*first, *core]
        elif order == "VSO":
            verb.after = [*core[:1], *first, *core[1:]] if scrambled else [*first, *core]
        elif scrambled and first and core and core[0].deprel == "obj":
            verb.before, verb.after = core[:1], [*first, *core[1:]]
        else:
            verb.before, verb.after = first, core

    def add_verb_modifiers(self, verb: _Node, depth: int) -> None:
        if self.chance(0.3):
            adverb = self.word("adverb", "ADV", "advmod")
            if self.language.order == "SOV" or self.chance(0.3):
                verb.before.append(adverb)
            else:
                verb.after.insert(0, adverb)
        if self.chance(0.3):
            auxiliary = self.word("auxiliary", "AUX", "aux")
            if self.language.postpositions:
                verb.after.insert(0, auxiliary)
            else:
                verb.before.append(auxiliary)
        if depth < 2 and verb.deprel in ("root", "ccomp") and self.chance(0.15):
            clause = self.clause(depth + 1, "advcl")
            self.put(clause, self.word("subordinator", "SCONJ", "mark"), self.marker_side())
            first = self.language.postpositions or self.chance(0.5)
            comma = _Node(",", "PUNCT", "punct")
            (clause.after if first else clause.before).insert(len(clause.after) if first else 0, comma)
            self.put(verb, clause, "before" if first else "after")
        if depth == 0 and verb.deprel == "root" and self.chance(0.12):
            other = self.clause(depth + 1, "conj")
            self.put(other, self.word("conjunction", "CCONJ", "cc"), "before")
            verb.after.append(other)

    def complement(self, depth: int) -> _Node:
        clause = self.clause(depth + 1, "ccomp")
        if self.chance(0.8):
            self.put(clause, self.word("complementizer", "SCONJ", "mark"), self.marker_side())
        return clause

    def subject(self, depth: int) -> _Node:
        if self.chance(0.3):
            return self.mark_case(self.word("pronoun", "PRON", "nsubj"), "subject")
        kind = "person" if self.chance(0.7) else None
        return self.mark_case(self.noun_phrase(depth, "nsubj", kind), "subject")

    def mark_case(self, node: _Node, role: str) -> _Node:
        """Give a noun phrase's head and its coordinated nouns the suffix of a role, in languages with cases."""
        if self.language.cases:
            for noun in (node, *(n for n in (*node.before, *node.after) if n.deprel == "conj")):
                noun.lemma = noun.form
                noun.form += self.lexicon[f"suffix.{role}"][0]
                noun.feats = {"subject": "Case=Nom", "object": "Case=Acc", "genitive": "Case=Gen"}[role]
        return node

    def noun(self, deprel: str, kind: str | None) -> _Node:
        if kind in (None, "person") and self.chance(0.12):
            name = self.word("name", "PROPN", deprel)
            name.noun_class = "person"
            return name
        kind = kind or pick(self.rng, NOUN_CLASSES)
        noun = self.word(f"noun.{kind}", "NOUN", deprel)
        noun.noun_class = kind
        return noun

    def noun_phrase(self, depth: int, deprel: str, kind: str | None = None, inner: int = 0) -> _Node:
        """Return a noun with its modifiers, the innermost first; `inner` counts noun phrases around it."""
        head = self.noun(deprel, kind)
        language = self.language
        if head.upos == "NOUN":
            if self.chance(0.3):
                self.put(head, self.word("adjective", "ADJ", "amod"), language.adjective)
            has_determiner = self.chance(0.4)
            if has_determiner and language.determiner == "after":
                self.put(head, self.word("determiner", "DET", "det"), "after")
            if inner < 2 and self.chance(0.15):
                self.put(head, self.genitive(depth, inner), language.genitive)
            if inner < 2 and self.chance(0.18):
                side = "before" if language.postpositions else "after"
                self.put(head, self.adpositional_phrase(depth, "nmod", inner + 1), side)
            if depth < 2 and self.chance(0.1):
                self.put(head, self.relative_clause(depth), language.relative)
            if has_determiner and language.determiner == "before":
                self.put(head, self.word("determiner", "DET", "det"), "before")
        if inner < 2 and self.chance(0.12):
            # Only like joins like: the class tells which of two nouns a third is coordinated with.
            other = self.noun_phrase(depth + 2, "conj", head.noun_class, inner=2)
            self.put(other, self.word("conjunction", "CCONJ", "cc"), "before")
            head.after.append(other)
        return head

    def genitive(self, depth: int, inner: int) -> _Node:
        owner = self.noun_phrase(depth + 1, "nmod", "person" if self.chance(0.5) else None, inner + 1)
        if self.language.genitive_marking == "suffix" and self.language.cases:
            return self.mark_case(owner, "genitive")
        self.put(owner, self.word("genitive", "ADP", "case"), self.marker_side())
        return owner

    def relative_clause(self, depth: int) -> _Node:
        """Return a clause whose subject is the noun outside; a pronoun stands for it where the clause follows."""
        clause = self.clause(depth + 1, "acl:relcl", gap=True)
        relativizer = self.lexicon["relativizer"][0]
        if self.language.relative == "after":
            self.put(clause, _Node(relativizer, "PRON", "nsubj"), "before")
        else:
            self.put(clause, _Node(relativizer, "SCONJ", "mark"), "after")
        return clause

    def adpositional_phrase(self, depth: int, deprel: str, inner: int = 0) -> _Node:
        """Return an oblique or nominal modifier; adposition and class are drawn so that `_TO_NOUN` holds."""
        while True:
            row = int(self.rng.random() * len(_TO_NOUN))
            column = int(self.rng.random() * len(NOUN_CLASSES))
            to_noun = _TO_NOUN[row][column]
            if self.chance(to_noun if deprel == "nmod" else 1.0 - to_noun):
                break
        noun = self.noun_phrase(depth + 1, deprel, NOUN_CLASSES[column], max(inner, 1))
        self.put(noun, _Node(self.lexicon["adposition"][row], "ADP", "case"), self.marker_side())
        return noun


def treebanks_in(run: StrPath) -> Path:
    """Write the artificial languages to ``RUN/data`` (once) and return that folder."""
    target = Path(run, "data")
    if not target.is_dir():
        try:
            write_folder(target, {".": write_treebanks})
        except OSError:
            if not target.is_dir():  # another process was faster: its files are the same
                raise
    return target
