"""Similarity of languages: counted by hand, on the artificial languages, on real treebanks, and by URIEL."""

from __future__ import annotations

import builtins
import sys
import sysconfig

import numpy as np
import pytest

from fastmask.tasks.data.synthetic import LANGUAGES as ARTIFICIAL
from fastmask.tasks.data.synthetic import SEEN, UNSEEN, write_treebanks
from fastmask.tasks.data.treebanks import load_treebanks
from fastmask.unseen import direction_profile, direction_similarity, similarity_measure, uriel_similarity

ROWS = [
    {  # the old dog barks loudly .
        "words": ["the", "old", "dog", "barks", "loudly", "."],
        "upos": ["DET", "ADJ", "NOUN", "VERB", "ADV", "PUNCT"],
        "heads": [3, 3, 4, 0, 4, 4],
        "deprels": ["det", "amod", "nsubj", "root", "advmod", "punct"],
    },
    {
        "words": ["seen", "was", "she", "gladly"],
        "upos": ["VERB", "AUX", "PRON", "ADV"],
        "heads": [0, 1, 1, 1],
        "deprels": ["root", "aux:pass", "nsubj:pass", "advmod"],
    },
]
COUNTS = {"det": [1, 0], "amod": [1, 0], "nsubj": [1, 1], "advmod": [0, 2], "aux": [0, 1]}


class TestHeadDirection:
    def test_counts(self):
        """Each dependent is counted on its side, without its subtype; punctuation and root are not."""
        assert direction_profile(ROWS) == COUNTS
        assert direction_profile([{"words": ["a"]}]) == {}
        assert direction_profile([*ROWS, {"words": ["a"], "heads": None, "deprels": None}]) == COUNTS

    def test_similarity_by_hand(self):
        """The similarity is the documented formula."""
        one, other = {"a": [3, 1], "b": [0, 2], "c": [9, 9]}, {"a": [0, 4], "b": [6, 6]}
        w_a, w_b = 1 / (1 / 4 + 1 / 4), 1 / (1 / 2 + 1 / 12)
        d_a, d_b = abs(3.5 / 5 - 0.5 / 5), abs(0.5 / 3 - 6.5 / 13)
        expected = 1 - (w_a * d_a + w_b * d_b) / (w_a + w_b)
        found = direction_similarity(one, {"one": one, "other": other})
        assert found == {"one": 1, "other": pytest.approx(expected, abs=1e-12)}
        assert direction_similarity(other, {"one": one})["one"] == found["other"]

    def test_nothing_in_common(self):
        with pytest.raises(ValueError, match="no relation in common: a and none"):
            direction_similarity({"a": [1, 0]}, {"b": {}})


@pytest.fixture(scope="module")
def artificial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ud")
    write_treebanks(folder, sentences={"train": 200, "dev": 5, "test": 60})
    loaded = load_treebanks(folder, [*SEEN, *UNSEEN], splits=("train", "test"), cache_dir=folder)
    return {code: {name: list(rows) for name, rows in splits.items()} for code, splits in loaded.items()}


def nearest(values):
    return max(values, key=values.get)


@pytest.mark.parametrize("language", list(ARTIFICIAL))
def test_artificial_languages(artificial, language):
    """From 20 sentences, the nearest other language is one of the same word order.

    Each language in turn is left out. What is known of them: the head-final ones (postpositions) are nearest to each
    other; the ones with the verb first or in the middle, to one of those; qah (verb last, all else head-first) has
    none of its kind.
    """
    profiles = {code: direction_profile(artificial[code]["train"]) for code in SEEN if code != language}
    support = direction_profile(artificial[language]["test"][:20])
    near = ARTIFICIAL[nearest(direction_similarity(support, profiles))]
    if language == "qah":
        assert not near.postpositions
    else:
        assert (near.order == "SOV") == (ARTIFICIAL[language].order == "SOV")
        assert near.postpositions == ARTIFICIAL[language].postpositions


def test_real_treebanks(ud_dir):
    """From 20 sentences, Faroese is nearest to Norwegian, and Japanese to Korean."""
    banks = ["UD_English-EWT", "ar", "UD_Norwegian-Bokmaal", "UD_Korean-GSD"]
    profiles = {
        code: direction_profile(splits["train"].select_columns(["heads", "deprels"]))
        for code, splits in load_treebanks(ud_dir, banks, splits=("train",), optional=("train",)).items()
        if splits
    }
    if set(profiles) != {"en", "ar", "no", "ko"}:
        pytest.skip(f"needs train splits of en, ar, no and ko, found {', '.join(profiles)}")
    for bank, expected in (("UD_Faroese-OFT", "no"), ("UD_Japanese-GSD", "ko")):
        (splits,) = load_treebanks(ud_dir, bank, splits=("test",)).values()
        rows = list(splits["test"].select_columns(["heads", "deprels"]))
        drawn = np.random.default_rng(0).permutation(len(rows))[:20]
        assert nearest(direction_similarity(direction_profile([rows[i] for i in drawn]), profiles)) == expected


class TestMeasure:
    """URIEL is used only where it can be, and the error says what to do."""

    @pytest.fixture
    def without_lang2vec(self, monkeypatch):
        real = builtins.__import__

        def missing(name, *args, **kwargs):
            if name.startswith("lang2vec"):
                raise ModuleNotFoundError("No module named 'lang2vec'", name="lang2vec")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", missing)

    @pytest.mark.usefixtures("without_lang2vec")
    def test_not_installed(self):
        assert similarity_measure("fo", ["en", "no"], has_support=True) == "head-direction"
        with pytest.raises(
            ValueError, match=r"give some, choose best, union or full, or use URIEL \(.*pip install -e '\.\[typology\]'"
        ):
            similarity_measure("fo", ["en", "no"], has_support=False)
        with pytest.raises(ImportError, match=r"needs the package lang2vec: in a checkout of fastmask, pip install"):
            similarity_measure("fo", ["en", "no"], has_support=True, asked="uriel")

    def test_asked_for(self):
        assert similarity_measure("fo", ["en"], has_support=True, asked="head-direction") == "head-direction"
        with pytest.raises(ValueError, match="which was not asked for"):
            similarity_measure("fo", ["en"], has_support=False, asked="head-direction")
        with pytest.raises(KeyError, match="did you mean 'uriel'"):
            similarity_measure("fo", ["en"], has_support=True, asked="urial")

    def test_a_language_that_uriel_lacks(self):
        pytest.importorskip("lang2vec.lang2vec")
        assert similarity_measure("qaa", ["en"], has_support=True) == "head-direction"
        with pytest.raises(KeyError, match="URIEL has no language 'qaa'"):
            similarity_measure("qaa", ["en"], has_support=True, asked="uriel")
        with pytest.raises(ValueError, match="URIEL has no language 'qab'"):
            similarity_measure("qab", ["en"], has_support=False)


def test_uriel():
    """Codes of treebanks become those of URIEL, and features are those of syntax."""
    pytest.importorskip("lang2vec.lang2vec")
    assert similarity_measure("fo", ["en", "ar", "no", "ko"], has_support=False) == "uriel"
    languages = ["en", "ar", "cs", "hi", "it", "ko", "no", "ru"]
    for language, expected in (("fo", "no"), ("ja", "ko"), ("hsb", "ru"), ("sv", "no"), ("fa", None), ("zh", None)):
        found = uriel_similarity(language, languages)
        assert list(found) == languages
        assert all(0 < value < 1 for value in found.values())
        assert expected is None or nearest(found) == expected
    assert uriel_similarity("ar", ["ar"])["ar"] == pytest.approx(1)
    with pytest.raises(KeyError, match="URIEL has no language 'qaa'"):
        uriel_similarity("en", ["qaa"])


def test_uriel_from_an_installed_command(tmp_path, monkeypatch):
    """A command finds the package, not the script that lang2vec installs beside it."""
    pytest.importorskip("lang2vec.lang2vec")
    (tmp_path / "lang2vec.py").write_text("raise OSError('the script')")
    for name in [name for name in sys.modules if name.startswith("lang2vec")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert 0 < uriel_similarity("fi", ["ru"])["ru"] <= 1
    assert sys.path[0] == str(tmp_path)
