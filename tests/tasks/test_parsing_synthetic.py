"""The invented treebanks: valid, the same everywhere, in conflict where they say so, neither trivial nor noise."""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
from io import StringIO
from pathlib import Path

import pytest
from udtools.udeval import evaluate, load_conllu

from fastmask.tasks.data.conllu import Sentence, read_sentences
from fastmask.tasks.data.synthetic import SENTENCES, UNSEEN_TRAIN, write_treebanks
from fastmask.tasks.data.synthetic_languages import LANGUAGES, SEEN, UNSEEN, lexicon
from fastmask.tasks.data.treebanks import find_treebanks, load_treebanks

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert write_treebanks(folder) == list(LANGUAGES)
    return folder


@pytest.fixture(scope="module")
def sentences(toy: Path) -> dict[tuple[str, str], list[Sentence]]:
    return {
        (code, split): list(read_sentences(toy / f"UD_{language.name}-Toy" / f"{code}_toy-ud-{split}.conllu"))
        for code, language in LANGUAGES.items()
        for split in SPLITS
    }


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.conllu")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def test_same_bytes_on_every_machine(tmp_path: Path) -> None:
    """The invented data is the same on every machine, in every version.

    A deliberate change of the languages changes this number; say so in the changelog.
    """
    write_treebanks(tmp_path / "a", sentences={"train": 30, "dev": 5, "test": 10})
    assert digest(tmp_path / "a") == "2bf158bd138b51e5acfa3a5c9eab7dc22f1715cdc37d31de56cd128c3b36affe"


def test_a_seed_gives_other_sentences_of_the_same_languages(tmp_path: Path) -> None:
    """A seed changes the sentences, and leaves the languages as they are."""
    small = {"train": 300, "dev": 5, "test": 5}
    words = []
    for seed in (0, 1):
        write_treebanks(tmp_path / str(seed), seed=seed, sentences=small)
        path = next((tmp_path / str(seed)).glob("*/qaa_toy-ud-train.conllu"))
        words.append({word for s in read_sentences(path) for word in s.words})
    assert digest(tmp_path / "0") != digest(tmp_path / "1")
    assert len(words[0] & words[1]) > 0.8 * min(len(words[0]), len(words[1]))


def test_the_test_set_does_not_depend_on_the_training_size(toy: Path, tmp_path: Path) -> None:
    """Runs with more training data are scored on the same sentences."""
    write_treebanks(tmp_path, sentences={"train": 25})
    name = "UD_Cidori-Toy/qac_toy-ud-test.conllu"
    assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()


def test_sizes_lengths_and_no_sentence_twice(sentences: dict[tuple[str, str], list[Sentence]]) -> None:
    """Sizes are those promised, and no test sentence is trained on."""
    for (code, split), items in sentences.items():
        assert len(items) == (UNSEEN_TRAIN if code in UNSEEN and split == "train" else SENTENCES[split])
        assert all(3 <= len(s.words) <= 25 for s in items)
    for code in LANGUAGES:
        texts = [s.words for split in SPLITS for s in sentences[code, split]]
        assert len(set(texts)) == len(texts)


def test_the_scorer_and_the_loader_accept_them(toy: Path, tmp_path: Path) -> None:
    """The default data can be found, loaded and scored."""
    assert {treebank.code for treebank in find_treebanks(toy).values()} == set(LANGUAGES) == {*SEEN, *UNSEEN}
    loaded = load_treebanks(toy, list(LANGUAGES), cache_dir=tmp_path)
    blocks = "".join(path.read_text(encoding="utf-8") for path in toy.rglob("*-test.conllu"))
    gold, again = (load_conllu(StringIO(blocks), "", {}) for _ in range(2))
    assert evaluate(gold, again)["LAS"].f1 == 1.0
    assert evaluate(gold, again)["Words"].gold_total == sum(
        len(w) for of in loaded.values() for w in of["test"]["words"]
    )


def test_every_relation_occurs_in_every_language(sentences: dict[tuple[str, str], list[Sentence]]) -> None:
    """Every language has every construction that the others are trained on."""
    wanted = {
        "root",
        "nsubj",
        "obj",
        "obl",
        "nmod",
        "case",
        "amod",
        "det",
        "advmod",
        "aux",
        "conj",
        "cc",
        "acl:relcl",
        "advcl",
        "ccomp",
        "mark",
        "punct",
    }
    for code in LANGUAGES:
        found = {deprel for split in ("dev", "test") for s in sentences[code, split] for deprel in s.deprels}
        assert found == wanted, code


def share_before(items: list[Sentence], deprel: str) -> float:
    """How often a dependent with this relation stands before its head."""
    sides = [
        position < head
        for s in items
        for position, (head, label) in enumerate(zip(s.heads, s.deprels, strict=True), start=1)
        if label == deprel
    ]
    return sum(sides) / len(sides)


def test_word_orders_are_those_of_the_table(sentences: dict[tuple[str, str], list[Sentence]]) -> None:
    """Languages order their words as the table says, and so conflict where it says."""
    for code, language in LANGUAGES.items():
        items = sentences[code, "test"]
        for deprel, before in (
            ("amod", language.adjective == "before"),
            ("det", language.determiner == "before"),
            ("acl:relcl", language.relative == "before"),
            ("case", not language.postpositions),
        ):
            assert share_before(items, deprel) == float(before), (code, deprel)
        assert (share_before(items, "obj") > 0.5) == (language.order == "SOV"), code
    for family in ("west", "east"):
        orders = {language.order for language in LANGUAGES.values() if language.family == family}
        assert "SOV" in orders
        assert len(orders) > 1


def test_relatives_share_more_trigrams_than_strangers() -> None:
    """Related languages share more trigrams: there is a family to transfer within."""

    def trigrams(code: str) -> set[str]:
        forms = [form for items in lexicon(LANGUAGES[code]).values() for form in items]
        return {f"^{form}$"[i : i + 3] for form in forms for i in range(len(form))}

    overlap: dict[bool, list[float]] = collections.defaultdict(list)
    for a, b in itertools.combinations(LANGUAGES, 2):
        left, right = trigrams(a), trigrams(b)
        overlap[LANGUAGES[a].family == LANGUAGES[b].family].append(len(left & right) / len(left | right))
    assert sum(overlap[True]) / len(overlap[True]) > 1.5 * sum(overlap[False]) / len(overlap[False])


def test_no_form_means_two_things() -> None:
    """Sound changes never make two function words look alike."""
    for language in LANGUAGES.values():
        classes = {name: forms for name, forms in lexicon(language).items() if not name.startswith("suffix")}
        forms = [form for items in classes.values() for form in items]
        assert len(set(forms)) == len(forms), language.code


def test_one_language_has_multiword_tokens(toy: Path) -> None:
    """One language of the default data has multiword tokens."""
    for code, language in LANGUAGES.items():
        text = (toy / f"UD_{language.name}-Toy" / f"{code}_toy-ud-test.conllu").read_text(encoding="utf-8")
        count = len(re.findall(r"(?m)^[0-9]+-[0-9]+\t", text))
        assert (count > 10) == language.contractions, code


def test_texts_are_what_the_tokens_say(toy: Path) -> None:
    """`# text` is what the tokens spell."""
    for path in toy.rglob("*.conllu"):
        for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
            rows = [line.split("\t") for line in block.split("\n") if not line.startswith("#")]
            inside, text = 0, ""
            for row in rows:
                if "-" in row[0]:
                    inside = int(row[0].split("-")[1])
                elif int(row[0]) <= inside:
                    continue
                text += row[1] + ("" if "SpaceAfter=No" in row[9] else " ")
            assert block.split("\n")[1] == f"# text = {text.strip()}"


def test_attachment_is_neither_given_nor_random(sentences: dict[tuple[str, str], list[Sentence]]) -> None:
    """An adposition tells something, but not all, about where its phrase attaches."""
    sides: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for s in sentences["qaa", "train"]:
        for head, deprel, word in zip(s.heads, s.deprels, s.words, strict=True):
            if deprel == "case":
                sides[word][s.deprels[head - 1]] += 1
    counts = [(c["nmod"], c["obl"]) for c in sides.values() if c["obl"]]  # without the genitive, which is always nmod
    best = sum(max(pair) for pair in counts) / sum(sum(pair) for pair in counts)
    assert 0.6 < best < 0.95
