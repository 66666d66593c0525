"""Cross-evaluation, typology and dynamics against cases computed by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import batch, tiny

import fastmask as fm
from fastmask.dynamic import History, Snapshot
from fastmask.files import FileError

MATRIX = {
    "en": {"en": 60, "no": 59, "hi": 50, "full": 58, "random": 55},
    "no": {"en": 57, "no": 58, "hi": 49, "full": 58, "random": 50},
    "hi": {"en": 30, "no": 32, "hi": 31, "full": 40, "random": 20},
    "fo": {"en": 40, "no": 45, "hi": 30, "full": 41, "random": 30},
}


def test_cross_evaluation_by_hand():
    """Rows are languages, columns are subnetworks, and the advantage is diagonal minus rest."""
    calls = []

    def evaluate(language, subnetwork):
        calls.append((language, subnetwork))
        return MATRIX[language][subnetwork]

    result = fm.analysis.cross_evaluation(evaluate, ["en", "no", "hi", "fo"], ["en", "no", "hi"])
    assert calls == [(a, b) for a in MATRIX for b in ("en", "no", "hi", "full", "random")]
    table = result.table.set_index(["language", "subnetwork"])
    assert table.value["fo", "no"] == 45
    assert table.kind["en", "en"] == "own"
    assert table.kind["fo", "en"] == "other"
    assert table.kind["en", "full"] == "control"
    rows = result.more["languages"].set_index("language")
    assert rows.advantage[["en", "no", "hi"]].tolist() == [60 - 54.5, 58 - 53, 31 - 31]
    assert np.isnan(rows.advantage["fo"])
    assert rows.best.tolist() == ["en", "no", "no", "no"]
    overall = result.more["overall"].iloc[0]
    assert (overall.languages, overall.own_is_best) == (3, 2)
    assert overall.advantage == pytest.approx((5.5 + 5 + 0) / 3)
    square = [[60, 59, 50], [57, 58, 49], [30, 32, 31]]
    sums = [sum(square[i][o[i]] for i in range(3)) for o in itertools.permutations(range(3))]
    assert overall.p == sum(s >= 149 for s in sums) / 6
    assert overall.own_minus_full == pytest.approx((2 + 0 - 9) / 3)


def test_cross_evaluation_of_a_loss():
    """Of a loss, where lower is better, the lowest is the best subnetwork."""
    names = ["en", "no", "hi"]
    losses = {a: {b: 1 - v / 100 for b, v in row.items()} for a, row in MATRIX.items()}
    up = fm.analysis.cross_evaluation(lambda a, b: MATRIX[a][b], names)
    down = fm.analysis.cross_evaluation(lambda a, b: losses[a][b], names, higher_is_better=False)
    assert down.more["overall"].p[0] == up.more["overall"].p[0]
    assert down.more["languages"].best.tolist() == up.more["languages"].best.tolist()
    np.testing.assert_allclose(down.more["languages"].advantage, up.more["languages"].advantage / 100)


LEFT = {  # what a language scores when nothing, a language's own units, or as many random ones are off
    "en": {"nothing": 60, "en": 50, "no": 58, "hi": 60, "random": 57},
    "no": {"nothing": 58, "en": 53, "no": 52, "hi": 57, "random": 58},
    "hi": {"nothing": 40, "en": 39, "no": 40, "hi": 41, "random": 38},
}


def test_specificity_by_hand():
    """Rows lose what columns switch off, and units are specific where their own language loses more than the others."""
    calls, names = [], list(LEFT)

    def evaluate(language, off):
        calls.append((language, off))
        return LEFT[language][off]

    result = fm.analysis.specificity(evaluate, names)
    assert calls == [(a, b) for a in names for b in ("nothing", *names, "random")]
    table = result.table.set_index(["language", "off"])
    assert table.loss["no", "en"] == 5
    assert table.kind.tolist() == ["random" if b == "random" else "own" if a == b else "other" for a, b in table.index]
    rows = result.more["languages"].set_index("language")
    assert rows.own.tolist() == [10, 6, -1]
    assert rows.random.tolist() == [3, 0, 2]
    assert rows.others.tolist() == [(5 + 1) / 2, (2 + 0) / 2, (0 + 1) / 2]  # of columns: en is off for no and hi
    assert rows.specificity.tolist() == [7, 5, -1.5]
    overall = result.more["overall"].iloc[0]
    assert (overall.languages, overall.most_of_all, overall.own, overall.specificity) == (3, 2, 5, 3.5)
    square = [[10, 2, 0], [5, 6, 1], [1, 0, -1]]
    sums = [sum(square[i][o[i]] for i in range(3)) for o in itertools.permutations(range(3))]
    assert overall.p == sum(s >= 15 for s in sums) / 6
    down = fm.analysis.specificity(lambda a, b: 1 - LEFT[a][b] / 100, names, higher_is_better=False)
    np.testing.assert_allclose(down.table.loss, result.table.loss / 100)


def test_typology_by_hand():
    """A gain is set against the same language's similarity, and the p-value is that of this correlation."""
    gains = {"de": [1.0, 2.0], "fi": 0.5, "ja": [-1.0], "fr": 0.7}
    similarity = {"ja": 0.1, "de": {"en": 0.9, "hi": 0.2}, "fi": {"en": 0.3, "hi": 0.4}, "fr": {"en": 0.8}}
    result = fm.analysis.typology(gains, similarity)
    table = result.table.set_index("language")
    assert table.gain.to_dict() == {"de": 1.5, "fi": 0.5, "ja": -1, "fr": 0.7}
    assert table.similarity.to_dict() == {"de": 0.9, "fi": 0.4, "ja": 0.1, "fr": 0.8}
    assert table.nearest.to_dict() == {"de": "en", "fi": "hi", "ja": "", "fr": "en"}
    assert (table.low["de"], table.high["de"], table.n["de"]) == (1, 2, 2)
    row = result.more["correlation"].iloc[0]
    assert (row.n, row.rho, row.p) == (4, pytest.approx(1), pytest.approx(2 / 24))


def snapshot(step, language, *layers):
    heads = torch.tensor([[[unit == "1" for unit in layer] for layer in layers]])
    return Snapshot(step, language, fm.Subnetworks([language], heads))


HISTORY = [
    snapshot(0, "en", "1100", "1000"),
    snapshot(0, "no", "1010", "0100"),
    snapshot(0, "hi", "0011", "0001"),
    snapshot(10, "en", "1010", "1000"),
    snapshot(20, "en", "1010", "0100"),
    snapshot(20, "hi", "0011", "0010"),
]


def test_dynamics_by_hand():
    """Churn, distance and convergence are those of the masks of each step."""
    result = fm.analysis.dynamics(HISTORY)
    table = result.table.set_index(["step", "language"])
    assert table.churn.to_dict() == {
        (0, "en"): 0, (0, "no"): 0, (0, "hi"): 0,
        (10, "en"): 1 / 3, (10, "no"): 0, (10, "hi"): 0,
        (20, "en"): 1 / 3, (20, "no"): 0, (20, "hi"): 1 / 3,
    }  # fmt: skip
    assert table.distance[10, "en"] == 1 - 2 / 4
    assert table.distance[20, "en"] == 1 - 1 / 5
    assert table.distance[20, "no"] == 0
    assert (table.live == 3).all()
    pairs = result.more["pairs"].set_index(["step", "relation"])
    assert pairs.jaccard[[(0, "one family"), (10, "one family"), (20, "one family")]].tolist() == [1 / 5, 2 / 4, 1]
    assert pairs.jaccard[20, "two families"] == pytest.approx((1 / 5 + 1 / 5) / 2)
    assert pairs.pairs[20, "two families"] == 2
    # Layer 0 shares 0, 1 or 2 units with 1/6, 4/6, 1/6, layer 1 none or one with 3/4, 1/4.
    chances = {0: 3 / 24, 1: (12 + 1) / 24, 2: (3 + 4) / 24, 3: 1 / 24}
    assert pairs.random[0, "one family"] == pytest.approx(sum(p * i / (6 - i) for i, p in chances.items()))
    updates = fm.analysis.dynamics(HISTORY, steps=[5, 10, 15, 20]).table
    assert updates[updates.language == "en"].churn.tolist() == [0, 0, 1 / 3, 0, 1 / 3]


def test_history_of_a_run(tmp_path):
    """The file that a run leaves holds the history that the run had."""
    model = tiny("bert")
    fm.attach(model, fm.Subnetworks.random(model.config, ["en", "hi"], 0.5, seed=1, units="both"))
    target = torch.randn(24, generator=torch.Generator().manual_seed(2)).double()
    masks = fm.DynamicSubnetworks(model, every=1, swaps=2)

    def loss(batch):
        return ((model(**batch)[0] - target) ** 2).mean((1, 2))

    for step in range(1, 4):
        batches = [batch(3, 4 + step)]
        masks.update(step, {name: fm.importance(model, batches, loss, name) for name in ("en", "hi")})
    path = tmp_path / "dynamic.safetensors"
    masks.save(path)
    found = History.load(path)
    assert list(found) == list(masks.history)
    assert len(found) > 2
    from_file = fm.analysis.dynamics(path, units="neurons").table
    assert from_file.equals(fm.analysis.dynamics(masks.history, units="neurons").table)
    original, good = path.read_bytes(), fm.Subnetworks.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="is no history of masks"):
        History.load(path)
    path.write_bytes(b"broken")
    with pytest.raises(FileError, match="is not a safetensors file, or is truncated"):
        History.load(path)

    def complaint(*names):
        good.rename(dict(zip(good.languages, names, strict=False))).save(path, {"history": "1"})
        with pytest.raises(FileError) as error:
            History.load(path)
        assert str(error.value).startswith(f"{path}: ")
        return str(error.value)

    # What is in it is checked, and not only that it is what was written.
    assert good.languages[:4] == ("en@0", "hi@0", "en@1", "hi@1")
    for wrong in (["en@9", "hi@0"], ["en@0", "hi@9"], ["en@0", "no@1"]):
        assert " from step 0 on" in complaint(*wrong)
    assert "in the order of their steps" in complaint("en@0", "hi@0", "en@9")
    for wrong in ("en", "en@", "@1", "en@-1", "en@1.5", "en@²"):
        assert f"{wrong!r} (expected LANGUAGE@STEP)" in complaint(wrong)
    # One bit of a mask that was.
    content = bytearray(original)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="is damaged"):
        History.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fm.analysis.cross_evaluation(lambda a, b: 1.0, []), "at least one language"),
        (lambda: fm.analysis.cross_evaluation(lambda a, b: 1.0, ["a", "a"]), "distinct names"),
        (lambda: fm.analysis.cross_evaluation(lambda a, b: float("nan"), ["a"]), "metric of 'a' under 'a' is nan"),
        (lambda: fm.analysis.specificity(lambda a, b: 1.0, ["a"]), "two distinct languages or more, given .'a'"),
        (lambda: fm.analysis.specificity(lambda a, b: 1.0, ["a", "a"]), "two distinct languages or more"),
        (lambda: fm.analysis.specificity(lambda a, b: float("nan"), ["a", "b"]), "metric of 'a' without .* 'a' is not"),
        (lambda: fm.analysis.typology({"a": 1, "b": 2}, {}), "at least three"),
        (lambda: fm.analysis.typology({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 1}), "no similarity of c"),
        (lambda: fm.analysis.dynamics(HISTORY, units="neurons"), "unknown masked part 'neurons'"),
        (lambda: fm.analysis.dynamics([]), "no masks"),
        (lambda: fm.analysis.dynamics("/nowhere/dynamic.safetensors"), "No such file or directory"),
    ],
)
def test_bad_input(call, message):
    """Bad input is refused at once, by a message that names it."""
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        call()
