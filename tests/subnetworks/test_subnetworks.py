"""`Subnetworks`: construction, controls and overlap."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig

from fastmask import Subnetworks
from fastmask.subnetworks.controls import permuted_like, random_like, shared_like, shuffled, without_own

CONFIG = BertConfig(num_hidden_layers=3, num_attention_heads=8, hidden_size=16, intermediate_size=24)


def masks(seed=0, density=0.5, languages=("de", "en", "fi")):
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(len(languages), 3, 8, generator=generator) < density
    neurons = torch.rand(len(languages), 3, 24, generator=generator) < density
    weights = {"encoder.x": torch.rand(len(languages), 5, 7, generator=generator) < density}
    return Subnetworks(languages, heads, neurons, weights)


def test_random_has_the_asked_density_in_every_layer():
    """A random control has the density that was asked for, in every layer."""
    subnets = Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both")
    assert (subnets.heads.sum(-1) == 4).all()
    assert (subnets.neurons.sum(-1) == 12).all()
    assert subnets == Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both")
    assert subnets != Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=2, units="both")
    assert (Subnetworks.random(CONFIG, ["a"], 0.001, seed=1).heads.sum(-1) == 1).all()


def test_names_in_any_ordered_form():
    """Names of a tuple, a generator or a mapping are those of a list."""
    expected = Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1)
    names = {"a": 1, "b": 2}
    for languages in (("a", "b"), (name for name in "ab"), names, names.keys()):
        assert Subnetworks.random(CONFIG, languages, 0.5, seed=1) == expected
    assert expected.ids(name for name in "bab").tolist() == [1, 0, 1]


def test_the_default_device_is_no_matter(tmp_path):
    """Masks are drawn, loaded and shuffled with values even if the default device is meta."""
    expected = Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both")
    expected.save(tmp_path / "masks.safetensors")
    with torch.device("meta"):
        assert Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both") == expected
        assert Subnetworks.load(tmp_path / "masks.safetensors") == expected
        assert expected.ids(["b", "a"]).tolist() == [1, 0]
        moved, control = shuffled(expected), random_like(expected, seed=4)
    assert moved == shuffled(expected)
    assert control == random_like(expected, seed=4)


def test_grouped_query_attention_counts_key_value_groups():
    """Masks of a decoder have one entry for each group of query heads."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=10)
    assert Subnetworks.full(config, ["a"], units="both").heads.shape == (1, 2, 2)


def test_overlap_is_jaccard():
    """Hand-computed: 1 shared of 3 in either."""
    heads = torch.tensor([[[True, True, False]], [[False, True, True]], [[False, False, False]]])
    subnets = Subnetworks(["a", "b", "c"], heads)
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(subnets.overlap(), expected)
    torch.testing.assert_close(Subnetworks(["a", "b", "c"], neurons=heads).overlap(), expected)


def test_random_like_keeps_sizes():
    """The random control has the sizes of the original in each layer and language."""
    subnets = masks()
    control = random_like(subnets, seed=4)
    assert torch.equal(control.heads.sum(-1), subnets.heads.sum(-1))
    assert torch.equal(control.neurons.sum(-1), subnets.neurons.sum(-1))
    assert control != subnets


def test_what_is_left_without_a_languages_own_units():
    """Own is what fewer than half of the others have, too; a layer of nothing else stays whole."""
    rows = [[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    heads = torch.tensor(rows, dtype=torch.bool)[:, None]
    left = without_own(Subnetworks(["a", "b", "c", "d"], heads)).heads[:, 0]
    # Unit 1 is in the masks of two of a's three others.
    assert left.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    half = torch.tensor(
        [[[1, 1, 0]], [[1, 0, 0]], [[0, 0, 1]]], dtype=torch.bool
    )  # unit 0: one of a's two others has it
    assert without_own(Subnetworks(["a", "b", "c"], half)).heads[0, 0].int().tolist() == [1, 0, 1]
    neurons = torch.tensor([[[1, 1], [1, 1]], *[[[0, 0], [1, 0]]] * 3], dtype=torch.bool)
    left = without_own(Subnetworks(["a", "b", "c", "d"], neurons=neurons)).neurons
    assert left[0].int().tolist() == [[1, 1], [1, 0]]


def test_shared_like_takes_the_most_voted_units():
    """Hand-computed: sizes 2, 1 -> rounded mean 2 (1.5 rounds to even); votes 2, 1, 0."""
    heads = torch.tensor([[[True, True, False]], [[True, False, False]]])
    shared = shared_like(Subnetworks(["a", "b"], heads))
    assert shared.heads.tolist() == [[[True, True, False]]] * 2


@pytest.mark.parametrize("seed", range(10))
def test_shared_like_is_as_large_as_a_language(seed):
    """The shared mask must have as many units as a language has on average, in a layer and in all together."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(3, 5, 7, generator=generator) < 0.5
    heads[:, :, 0] = True
    shared = shared_like(Subnetworks(["a", "b", "c"], heads)).heads
    assert int(shared[0].sum()) == round(int(heads.sum()) / 3)
    assert ((shared[0].sum(-1) - heads.sum(-1).double().mean(0)).abs() < 1).all()


def test_shuffled_gives_nobody_its_own():
    """No language keeps its own mask, and each mask has a new owner."""
    moved = shuffled(Subnetworks(list("abcde"), torch.eye(5, dtype=torch.bool)[:, None])).heads[:, 0]
    assert not moved.diagonal().any()
    assert torch.equal(moved.sum(0), torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least two languages"):
        shuffled(Subnetworks(["a"], torch.ones(1, 1, 2, dtype=torch.bool)))


def test_shuffled_hands_over_what_is_most_unlike():
    """By hand: a and b are nearly alike, c and d too; a and b must get the masks of c and d, and they those of a, b."""
    heads = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    moved = shuffled(Subnetworks(list("abcd"), heads[:, None])).heads[:, 0]
    assert not (moved & heads).any()
    assert sorted(map(tuple, moved.tolist())) == sorted(map(tuple, heads.tolist()))


def test_permuted_like_keeps_overlaps_and_changes_units():
    """Sizes and overlaps of languages are what they were in each layer; the units are others, the same for all."""
    subnets = masks()
    control = permuted_like(subnets, seed=1)
    for kind in ("heads", "neurons"):
        ours, theirs = getattr(control, kind), getattr(subnets, kind)
        for layer in range(ours.shape[1]):
            mine, given = ours[:, layer].int(), theirs[:, layer].int()
            assert torch.equal(mine @ mine.T, given @ given.T)
            assert sorted(map(tuple, mine.T.tolist())) == sorted(map(tuple, given.T.tolist()))
    assert control != subnets
    assert control == permuted_like(subnets, seed=1)


def test_controls_own_only_units_that_exist():
    """Where a layer has fewer units than another, no control owns one that it does not have; sizes stay."""
    model = BertModel(CONFIG)
    model.encoder.layer[1].intermediate.dense = torch.nn.Linear(16, 9)
    model.encoder.layer[1].output.dense = torch.nn.Linear(9, 16)
    found = Subnetworks.random(model, ["a", "b", "c"], 0.6, seed=2, units="both")
    assert found.neurons.sum(-1)[0].tolist() == [14, 5, 14]
    controls = [random_like(found, 3, model), permuted_like(found, 3, model), shared_like(found), shuffled(found)]
    for subnets in (found, *controls):
        assert not subnets.neurons[:, 1, 9:].any()
        assert torch.equal(subnets.neurons.sum(-1), found.neurons.sum(-1))
        assert torch.equal(subnets.heads.sum(-1), found.heads.sum(-1))
    even = masks()
    assert random_like(even, 3) == random_like(even, 3, BertModel(CONFIG))
    assert permuted_like(even, 3) == permuted_like(even, 3, BertModel(CONFIG))


class TestBadInput:
    """Every error names what was given and what was expected."""

    def test_nothing_masked(self):
        with pytest.raises(ValueError, match="nothing is masked"):
            Subnetworks(["a"])

    def test_wrong_language_count(self):
        with pytest.raises(ValueError, match="heads has masks for 2 languages, expected 1"):
            Subnetworks(["a"], torch.ones(2, 1, 1, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("languages", "message"),
        [
            ("deu", r"expected a sequence of language names, given the single name 'deu': \['deu'\]\?"),
            (b"deu", r"given the single name b'deu'"),
            ("", r"given the single name ''"),
            ([], r"at least one language name, given \[\]"),
            (["de", 3], r"control characters, given \[3\]"),
            ([b"de"], r"control characters, given \[b'de'\]"),
            ([None], r"control characters, given \[None\]"),
            (["de", ""], r"control characters, given \[''\]"),
            (["de", "fi", "de"], r"expected distinct language names, given \['de'\] more than once"),
            ({"de"}, r"names in a fixed order \(list, tuple\), given a set"),
            (frozenset(["de"]), r"given a frozenset"),
            (3, r"names in a fixed order \(list, tuple\), given a int"),
            (None, r"given a NoneType"),
        ],
        ids=repr,
    )
    def test_languages(self, languages, message):
        """A single name, which would be read letter by letter, and a set, which has no order, are refused."""
        size = len(languages) if hasattr(languages, "__len__") else 1
        makers = [
            lambda: Subnetworks(languages, torch.ones(size, 1, 1, dtype=torch.bool)),
            lambda: Subnetworks.random(CONFIG, languages, density=0.5, seed=0),
            lambda: Subnetworks.full(CONFIG, languages),
        ]
        for make in makers:
            with pytest.raises(ValueError, match=message):
                make()

    @pytest.mark.parametrize(
        ("languages", "error", "message"),
        [
            ("de", ValueError, r"given the single name 'de': \['de'\]\?"),
            ({"de"}, ValueError, "given a set"),
            (None, ValueError, "given a NoneType"),
            (["de", "dee"], KeyError, "unknown language 'dee'; did you mean 'de'"),
            ([0], KeyError, "unknown language 0"),
        ],
        ids=repr,
    )
    def test_ids(self, languages, error, message):
        """A single name, which would be read letter by letter, and a set, which has no order, are refused."""
        with pytest.raises(error, match=message):
            masks().ids(languages)

    def test_masks_without_values(self):
        with pytest.raises(ValueError, match="expected heads with values, given a tensor on the meta device"):
            Subnetworks(["a"], torch.ones(1, 1, 1, dtype=torch.bool, device="meta"))

    def test_wrong_dtype(self):
        with pytest.raises(
            ValueError, match=r"expected neurons as a bool tensor with 3 dimensions, given torch.float32"
        ):
            Subnetworks(["a"], neurons=torch.ones(1, 1, 1))

    def test_names_that_cannot_be_printed(self):
        for name in ("a\nb", "\x1b[2J", "\ud800", "", 3):
            with pytest.raises(ValueError, match="expected language names that are text"):
                Subnetworks([name], torch.ones(1, 1, 1, dtype=torch.bool))

    def test_nothing_to_mask(self):
        with pytest.raises(ValueError, match=r"heads has the shape \(1, 0, 4\) \(expected at least one"):
            Subnetworks(["a"], torch.ones(1, 0, 4, dtype=torch.bool))

    def test_unknown_language(self):
        with pytest.raises(KeyError, match="unknown language 'dee'; did you mean 'de'"):
            masks().index("dee")

    def test_unknown_units(self):
        with pytest.raises(KeyError, match="unknown kind of unit 'head'; did you mean 'heads'"):
            Subnetworks.random(CONFIG, ["a"], 0.5, 0, units="head")

    @pytest.mark.parametrize("density", [0, -1, 1.1])
    def test_density(self, density):
        with pytest.raises(ValueError, match="density must be above 0"):
            Subnetworks.random(CONFIG, ["a"], density, 0)


def test_rename():
    subnets = Subnetworks(["a", "b"], heads=torch.ones(2, 1, 2, dtype=torch.bool))
    assert subnets.rename({"b": "c"}).languages == ("a", "c")
    with pytest.raises(KeyError, match="unknown language 'x'"):
        subnets.rename({"x": "y"})
    with pytest.raises(ValueError, match="more than once"):
        subnets.rename({"b": "a"})
