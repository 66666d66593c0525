"""Subnetworks made of others: some languages of them, one more, those of several together."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmask as fm
from fastmask import Subnetworks
from tests.models.tiny_models import batch, multiplied, tiny

LANGUAGES = ("de", "en", "fi", "fr", "hi")
PARTS = ("heads", "neurons", "weights")


def masks(languages=LANGUAGES, parts=PARTS, seed=0, heads=8, module="encoder.x"):
    """Random masks; the second language owns nothing, the third everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        keep = torch.rand(len(languages), *shape, generator=generator) < 0.5
        keep[1:2], keep[2:3] = False, True
        return keep

    made = {"heads": draw(3, heads), "neurons": draw(3, 24), "weights": {module: draw(5, 7), "y": draw(2, 3)}}
    return Subnetworks(languages, **{part: made[part] for part in parts})


def dense(subnets, name):
    """What one language owns, in one row."""
    row = subnets.languages.index(name)
    tensors = [subnets.heads, subnets.neurons, *(subnets.weights or {}).values()]
    return torch.cat([keep[row].flatten() for keep in tensors if keep is not None])


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.sampled_from(LANGUAGES), min_size=1, unique=True), parts=st.sets(st.sampled_from(PARTS)))
def test_select_and_stack(names, parts, tmp_path_factory):
    """Each language keeps its masks, in the order asked for, through selecting, stacking and saving."""
    parts = sorted(parts or PARTS)
    subnets = masks(parts=parts)
    found = subnets.select(iter(names))
    rest = [name for name in LANGUAGES if name not in names]
    joined = found if not rest else Subnetworks.stack(iter([found, subnets.select(rest)]))
    for mine in (found, joined):
        for name in mine.languages:
            assert dense(mine, name).equal(dense(subnets, name))
    assert found.languages == tuple(names)
    assert joined.languages == (*names, *rest)
    assert (found.heads is None, found.neurons is None, found.weights is None) == tuple(p not in parts for p in PARTS)
    assert joined.select(LANGUAGES) == subnets
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    for mine in (found, joined):
        mine.save(file)
        assert Subnetworks.load(file) == mine


def test_neighbours_are_not_copied():
    """Selecting neighbouring languages copies no masks."""
    subnets = masks()
    for names in (LANGUAGES, ["fi"], ["en", "fi", "fr"]):
        found, first = subnets.select(names), LANGUAGES.index(names[0])
        assert found.heads.data_ptr() == subnets.heads[first].data_ptr()
        assert found.weights["y"].data_ptr() == subnets.weights["y"][first].data_ptr()


@pytest.mark.parametrize("own", [["en"], ["fi"], ["fr"]], ids=["empty", "full", "random"])
def test_append(own):
    """The new language has the mask that was given, and the others keep theirs."""
    subnets = masks()
    before = masks()
    longer = subnets.append("nl", subnets.select(own))
    assert longer.languages == (*LANGUAGES, "nl")
    assert dense(longer, "nl").equal(dense(subnets, own[0]))
    assert longer.select(LANGUAGES) == subnets == before


def test_the_default_device_is_no_matter():
    """Masks have values even if the default device is meta."""
    subnets, more = masks(), masks(["x"])

    def make():
        return Subnetworks.stack([subnets.select(["fr", "de"]), subnets.select(["en"])]).append("y", more)

    expected = make()
    with torch.device("meta"):
        assert make() == expected


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_model_runs_them(model_type):
    """Attached, every language of a mixed batch computes what the plain model with multiplied weights does."""
    model = tiny(model_type)
    drawn = Subnetworks.random(model.config, ["aa", "bb", "cc"], 0.5, seed=3, units="both")
    more = Subnetworks.random(model.config, ["dd"], 0.3, seed=4, units="both")
    subnets = Subnetworks.stack([drawn.select(["cc", "aa"]), more]).append("ee", drawn.select(["bb"]))
    sources = {"cc": (drawn, 2), "aa": (drawn, 0), "dd": (more, 0), "ee": (drawn, 1)}
    names = ["ee", "aa", "dd", "cc", "aa"]
    inputs = batch(len(names))
    expected = [
        multiplied(model, source, {name: value[at : at + 1] for name, value in inputs.items()}, [row])
        for at, (source, row) in enumerate(sources[name] for name in names)
    ]
    fm.attach(model, subnets)
    found = model(**inputs, language_ids=subnets.ids(names))[0]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-9)


class TestBadInput:
    """Every error names what was given and what was expected."""

    @pytest.mark.parametrize(
        ("languages", "error", "message"),
        [
            ([], ValueError, r"at least one language name, given \[\]"),
            (["de", "en", "de"], ValueError, r"expected distinct language names, given \['de'\] more than once"),
            (["en", "dee"], KeyError, "unknown language 'dee'; did you mean 'de'"),
            ("de", ValueError, "given the single name 'de'"),
            ({"de"}, ValueError, "given a set"),
            ([0], ValueError, r"given \[0\]"),
        ],
        ids=repr,
    )
    def test_select(self, languages, error, message):
        with pytest.raises(error, match=message):
            masks().select(languages)

    def test_append(self):
        subnets = masks()
        with pytest.raises(ValueError, match=r"'de' has a subnetwork already \(languages: de, en, fi, fr, hi\)"):
            subnets.append("de", subnets.select(["en"]))
        with pytest.raises(ValueError, match=r"one language to append as 'nl', given Subnetworks\(de, en, fi"):
            subnets.append("nl", subnets)
        with pytest.raises(ValueError, match="one language to append as 'nl', given None"):
            subnets.append("nl", None)
        with pytest.raises(ValueError, match="without control characters"):
            subnets.append("n\nl", subnets.select(["en"]))

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"heads": 7}, r": heads is (3, 8) on cpu and (3, 7) on cpu"),
            ({"parts": ["heads", "weights"]}, ": neurons is (3, 24) on cpu and not masked"),
            ({"module": "z"}, ": weights.encoder.x is (5, 7) on cpu and not masked"),
        ],
        ids=str,
    )
    def test_other_geometry(self, other, message):
        """Both are named, whichever comes first."""
        first, second = masks(), masks(["nl"], **other)
        with pytest.raises(ValueError, match=re.escape(f"cannot stack {first!r} and {second!r}{message}")):
            Subnetworks.stack([first, masks(["sv"]), second])
        with pytest.raises(ValueError, match=re.escape(f"cannot stack {second!r} and {first!r}: ")):
            Subnetworks.stack([second, first])
        with pytest.raises(ValueError, match="cannot stack"):
            first.append("nl", second)

    def test_stack(self):
        with pytest.raises(ValueError, match="expected Subnetworks to stack, given none"):
            Subnetworks.stack([])
        with pytest.raises(ValueError, match="expected Subnetworks to stack, given NoneType, str"):
            Subnetworks.stack([masks(), None, "de"])
        with pytest.raises(ValueError, match=r"expected distinct language names, given \['de'\] more than once"):
            Subnetworks.stack([masks(), masks(["de"])])
