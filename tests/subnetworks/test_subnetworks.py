"""`Subnetworks`: construction, controls, overlap and files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, LlamaConfig

from fastmask import Subnetworks
from fastmask.subnetworks.controls import random_like, shared_like, shuffled
from fastmask.subnetworks.storage import read_metadata

CONFIG = BertConfig(num_hidden_layers=3, num_attention_heads=8, hidden_size=16, intermediate_size=24)


def masks(seed=0, density=0.5, languages=("de", "en", "fi")):
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(len(languages), 3, 8, generator=generator) < density
    neurons = torch.rand(len(languages), 3, 24, generator=generator) < density
    weights = {"encoder.x": torch.rand(len(languages), 5, 7, generator=generator) < density}
    return Subnetworks(languages, heads, neurons, weights)


def test_random_has_the_asked_density_in_every_layer():
    """A random control would be of another size than what it controls."""
    subnets = Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both")
    assert (subnets.heads.sum(-1) == 4).all()
    assert (subnets.neurons.sum(-1) == 12).all()
    assert subnets == Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=1, units="both")
    assert subnets != Subnetworks.random(CONFIG, ["a", "b"], 0.5, seed=2, units="both")
    assert (Subnetworks.random(CONFIG, ["a"], 0.001, seed=1).heads.sum(-1) == 1).all()


def test_grouped_query_attention_counts_key_value_groups():
    """Masks of a decoder would have one entry for each query head."""
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
    """The mandatory control would differ in size by layer or language."""
    subnets = masks()
    control = random_like(subnets, seed=4)
    assert torch.equal(control.heads.sum(-1), subnets.heads.sum(-1))
    assert torch.equal(control.neurons.sum(-1), subnets.neurons.sum(-1))
    assert control != subnets


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
    """A shuffled control in which some language keeps its mask controls nothing."""
    heads = torch.eye(5, dtype=torch.bool)[:, None]
    subnets = Subnetworks(list("abcde"), heads)
    for seed in range(20):
        moved = shuffled(subnets, seed).heads[:, 0]
        assert not moved.diagonal().any()
        assert torch.equal(moved.sum(0), torch.ones(5, dtype=torch.int64))


@settings(max_examples=30, deadline=None)
@given(
    L=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 33)),
    seed=st.integers(0, 99),
    parts=st.sets(st.sampled_from(["heads", "neurons", "weights"]), min_size=1),
)
def test_files_round_trip(L, shape, seed, parts, tmp_path_factory):
    """A saved mask comes back different."""
    generator = torch.Generator().manual_seed(seed)

    def keep():
        return torch.rand(L, *shape, generator=generator) < 0.5

    subnets = Subnetworks(
        [f"språk-{i}" for i in range(L)],
        keep() if "heads" in parts else None,
        keep() if "neurons" in parts else None,
        {"a.b": keep(), "c": keep()} if "weights" in parts else None,
    )
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    subnets.save(path, {"note": "x"})
    assert Subnetworks.load(path) == subnets
    assert read_metadata(path)["note"] == "x"
    assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"]


class TestBadInput:
    """Every error names what was given and what was expected."""

    def test_nothing_masked(self):
        with pytest.raises(ValueError, match="nothing is masked"):
            Subnetworks(["a"])

    def test_wrong_language_count(self):
        with pytest.raises(ValueError, match="heads has masks for 2 languages, expected 1"):
            Subnetworks(["a"], torch.ones(2, 1, 1, dtype=torch.bool))

    def test_repeated_language(self):
        with pytest.raises(ValueError, match="distinct"):
            Subnetworks(["a", "a"], torch.ones(2, 1, 1, dtype=torch.bool))

    def test_wrong_dtype(self):
        with pytest.raises(
            ValueError, match=r"expected neurons as a bool tensor with 3 dimensions, given torch.float32"
        ):
            Subnetworks(["a"], neurons=torch.ones(1, 1, 1))

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

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no masks file at"):
            Subnetworks.load(tmp_path / "no.safetensors")

    def test_truncated_file(self, tmp_path):
        path = tmp_path / "masks.safetensors"
        masks().save(path)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match="not a masks file, or is truncated"):
            Subnetworks.load(path)

    def test_another_kind_of_file(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="not one of fastmask subnetworks"):
            Subnetworks.load(path)

    def test_newer_version(self, tmp_path):
        path = tmp_path / "masks.safetensors"
        masks().save(path, {"version": "2"})
        with pytest.raises(ValueError, match="format version 2, this fastmask reads up to 1"):
            Subnetworks.load(path)
