"""Where support sentences come from, which make a set, and relations that the model does not know."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary, check_deprels
from fastmask.unseen import split_pool, support_sets


def rows_of(*texts: str) -> list[dict]:
    return [{"words": text.split()} for text in texts]


def many(count: int, word: str) -> list[dict]:
    return rows_of(*(f"{word} {number}" for number in range(count)))


class TestSets:
    """Support sets have no sentence twice, and depend on the seed, not on the order of the file."""

    def test_drawn_from_the_seed(self):
        sets = support_sets(50, 20, 30, seed=3, language="fo")
        assert all(rows.dtype == np.int64 and len(set(rows.tolist())) == 20 for rows in sets)
        again = support_sets(50, 20, 5, seed=3, language="fo")
        assert all(np.array_equal(one, other) for one, other in zip(sets, again, strict=False))
        for other in (support_sets(50, 20, 1, 4, "fo"), support_sets(50, 20, 1, 3, "ja")):
            assert not np.array_equal(sets[0], other[0])
        counts = np.bincount(np.concatenate(sets), minlength=50)
        assert counts.min() >= 2  # 12 expected of each row, deviation 2.7
        assert counts.max() <= 22

    def test_too_few(self):
        assert len(support_sets(20, 20, 1, 0, "fo")[0]) == 20
        with pytest.raises(ValueError, match=r"'fo' has 19 sentences for support sets \(expected at least 20\)"):
            support_sets(19, 20, 1, 0, "fo")


class TestPool:
    """Support and test share no sentence, and the pool is of the right split."""

    @pytest.mark.parametrize(
        ("train", "dev", "source", "size"), [(30, 30, "train", 30), (5, 30, "dev", 30), (5, 5, "test", 20)]
    )
    def test_source(self, train, dev, source, size):
        splits = {"train": many(train, "a"), "dev": many(dev, "b"), "test": many(40, "c")}
        pool = split_pool(splits, 10, seed=0, language="fo")
        assert (pool.source, len(pool.support)) == (source, size)
        assert len(pool.test) == (20 if source == "test" else 40)
        words = [{tuple(row["words"]) for row in part} for part in (pool.support, pool.test)]
        assert not words[0] & words[1]

    def test_the_part_of_a_test(self):
        """The part of a test set is drawn by the seed, and no larger than asked."""
        splits = {"test": many(500, "c")}
        pool = split_pool(splits, 20, seed=0, language="fo")
        assert (len(pool.support), len(pool.test), pool.dropped) == (100, 400, 0)
        assert split_pool(splits, 20, seed=0, language="fo") == pool
        assert split_pool(splits, 20, seed=1, language="fo").support != pool.support
        assert len(split_pool({"test": many(30, "c")}, 20, seed=0, language="fo").test) == 10
        assert len(split_pool({"test": many(30, "c")}, 0, seed=0, language="fo").test) == 30

    def test_the_same_words_twice(self):
        """A sentence of the pool that also stands in the test is not tested on."""
        splits = {"train": rows_of("yes .", "no .", "no ."), "test": rows_of("no .", "yes", "yes .", "maybe")}
        pool = split_pool(splits, 2, seed=0, language="fo")
        assert [row["words"] for row in pool.test] == [["yes"], ["maybe"]]
        assert pool.dropped == 2

    def test_too_few(self):
        splits = {"train": many(5, "a"), "test": many(20, "c")}
        with pytest.raises(ValueError, match="set of 20: 5 in train, 0 in dev, 20 in test"):
            split_pool(splits, 20, seed=0, language="fo")
        with pytest.raises(ValueError, match=r"has no test sentences \(splits given: train\)"):
            split_pool({"train": many(5, "a")}, 2, seed=0, language="fo")
        with pytest.raises(ValueError, match="every test sentence is also a support sentence"):
            split_pool({"train": many(5, "a"), "test": many(4, "a")}, 2, seed=0, language="fo")


class TestDeprels:
    """A relation that the model does not know is refused, ignored or mapped as asked, never guessed."""

    ROWS = ({"deprels": ["nsubj:outer", "root", "objj"]}, {"deprels": ["root", "nsubj:outer"]})

    def test_subtypes_dropped(self):
        vocabulary = Vocabulary(["nsubj", "root", "obj"], [], "drop")
        rows = [{"deprels": ["nsubj:outer", "root", "obj"]}]
        assert check_deprels(rows, vocabulary) == rows
        with pytest.raises(ValueError, match=r"objj \(1\) \(objj looks like obj\)\. It knows nsubj, obj, root"):
            check_deprels(self.ROWS, vocabulary)

    def test_subtypes_kept(self):
        vocabulary = Vocabulary(["nsubj", "root", "obj"], [], "keep")
        with pytest.raises(ValueError, match=r"trained on: nsubj:outer \(2\), objj \(1\) .* \(universal\)"):
            check_deprels(self.ROWS, vocabulary)
        with pytest.raises(ValueError, match=r"trained on: objj \(1\) "):
            check_deprels(self.ROWS, vocabulary, "universal")
        mapped = check_deprels(self.ROWS[1:], vocabulary, "universal")
        assert mapped == [{"deprels": ["root", "nsubj"]}]
        assert self.ROWS[1] == {"deprels": ["root", "nsubj:outer"]}

    def test_universal_that_is_unknown_too(self):
        """`xyz:outer` is refused if the model does not know `xyz` either."""
        with pytest.raises(ValueError, match=r"xyz:outer \(1\)"):
            check_deprels([{"deprels": ["xyz:outer"]}], Vocabulary(["nsubj"], [], "keep"), "universal")

    def test_ignored(self):
        vocabulary = Vocabulary(["nsubj", "root", "obj"], [], "keep")
        with pytest.warns(UserWarning, match=r"no label in the loss: nsubj:outer \(2\), objj \(1\)"):
            rows = check_deprels(self.ROWS, vocabulary, "ignore")
        ids = Counter(vocabulary.deprel_ids(rows[0]["deprels"]).tolist())
        assert ids == {IGNORE: 2, 1: 1}

    def test_a_choice_that_does_not_exist(self):
        with pytest.raises(KeyError, match="did you mean 'universal'"):
            check_deprels(self.ROWS, Vocabulary(["root"], []), "univrsal")
