"""What a language has learnt is taken off its model, put on others, added up and taken off again, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmask as fm
from fastmask.deltas import Part
from fastmask.files import FileError, read_sealed, write_sealed
from fastmask.live import live_of
from fastmask.models.attach import attached
from tests.core.oracle import KINDS, random_mask
from tests.models.tiny_models import batch, tiny

LANGUAGES = ["de", "fi", "ner"]


def subnetworks(model, units="both", seed=3):
    if units == "weights":
        generator = torch.Generator().manual_seed(seed)
        names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        keep = {n: torch.rand(3, *model.get_submodule(n).weight.shape, generator=generator) < 0.1 for n in names}
        return fm.Subnetworks(LANGUAGES, weights=keep)
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed, units=units)


def trained(plain, subnets, *languages, steps=3):
    """A copy of a model that some languages were trained on, each example one of them."""
    model = fm.freeze_unmasked(fm.attach(copy.deepcopy(plain), subnets, forward="full"))
    optimizer = fm.LiveAdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, model=model)
    ids = subnets.ids(languages)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(len(ids)), language_ids=ids)[0].square().sum().backward()
        optimizer.step()
    return model


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def plain():
    return tiny("bert").float()


@pytest.fixture(scope="module")
def deltas(plain):
    """The deltas of two languages, each trained alone, and the models that training left."""
    models = [trained(plain, subnetworks(plain), name) for name in ("de", "ner")]
    return [fm.Delta.of(m, plain, name) for m, name in zip(models, ("de", "ner"), strict=True)], models


# ---- one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("units", ["both", "weights"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_the_base_and_a_delta_are_the_trained_model(model_type, units, dtype, tmp_path):
    """Through a file, on a plain and an attached model, and off again, without a bit of difference."""
    plain = tiny(model_type).to(dtype)
    subnets = subnetworks(plain, units)
    model = trained(plain, subnets, "fi", "fi")
    start = parameters(plain)
    assert any(not torch.equal(start[name], p) for name, p in parameters(model).items())
    delta = fm.Delta.of(model, copy.deepcopy(plain.state_dict()), "fi")
    delta.save(tmp_path / "fi.safetensors")
    again = fm.Delta.load(tmp_path / "fi.safetensors")
    assert repr(again) == repr(delta)
    assert again.changes[0].digest == delta.changes[0].digest
    for target in (plain, fm.attach(copy.deepcopy(plain), subnets), fm.attach(copy.deepcopy(plain), subnets, "full")):
        again.add(target)
        assert_same(parameters(target), parameters(model))
        delta.remove(target)  # the same one, not the same object
        assert_same(parameters(target), start)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.sampled_from([1e-30, 1e-8, 1e-3, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_any_numbers(kind, dtype, scale, seed):
    """Numbers that lose nearly all of their size, change their sign or overflow when subtracted come back exactly."""
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, 8, 12, generator=generator).double().to(dtype)
    small = torch.rand(8, 12, generator=generator) < 0.5
    after = torch.where(small, (after.double() * scale).to(dtype), after)
    after[1, 1] = -0.0
    before[0, 0], after[0, 0] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    live = live_of(random_mask(kind, 4, 8, 12, unit=2, seed=seed), [2 if seed % 2 else 0])
    part = Part(live, (8, 12), "", live.read(after).flatten())
    found = before.clone()
    part.put_on(found, part.read(found))
    keep = live.keep(before) if live.kind != "whole" else torch.ones(8, 12, dtype=torch.bool)
    wanted = torch.where(keep, after, before)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())  # of zeros, too


def test_it_is_small(plain):
    """A delta of 10% of single weights holds little more than those."""
    subnets = subnetworks(plain, "weights")
    delta = fm.Delta.of(trained(plain, subnets, "de"), plain, "de")
    masked = sum(keep[0].numel() for keep in subnets.weights.values())
    assert delta.nbytes < 0.25 * 4 * masked
    assert delta.languages == ("de",)


# ---- several


def test_deltas_are_added_up_and_taken_off_in_any_order(plain, deltas):
    """Language and task: what is left is what the others make of the base, to the last bit."""
    (de, ner), (of_de, of_ner) = deltas
    model, start = copy.deepcopy(plain), parameters(plain)
    de.add(model)
    ner.add(model)
    both = parameters(model)
    for name, p in start.items():
        expected = of_de.get_parameter(name) + of_ner.get_parameter(name) - p
        torch.testing.assert_close(both[name], expected.detach(), rtol=1e-5, atol=1e-5)
    de.remove(model)
    assert_same(parameters(model), parameters(of_ner))
    de.add(model)
    ner.remove(model)
    assert_same(parameters(model), parameters(of_de))
    de.remove(model)
    assert_same(parameters(model), start)


def test_a_sum_is_one_after_the_other(plain, deltas, tmp_path):
    """`a + b` through a file is a, then b; either can be taken off alone."""
    (de, ner), (_, of_ner) = deltas
    (de + ner).save(tmp_path / "sum.safetensors")
    both = fm.Delta.load(tmp_path / "sum.safetensors")
    assert both.languages == ("de", "ner")
    one, other = copy.deepcopy(plain), copy.deepcopy(plain)
    both.add(one)
    de.add(other)
    ner.add(other)
    assert_same(parameters(one), parameters(other))
    de.remove(one)
    assert_same(parameters(one), parameters(of_ner))
    both.remove(other)
    assert_same(parameters(other), parameters(plain))


def test_languages_that_were_trained_together(plain):
    """Each of several has a delta, once the others are named; where nothing is shared their sum is the model."""
    heads = torch.zeros(3, 2, 4, dtype=torch.bool)
    heads[0, :, :1], heads[1, :, 1:3], heads[2, :, 3:] = True, True, True
    model = trained(plain, fm.Subnetworks(LANGUAGES, heads), "de", "fi")
    with pytest.raises(ValueError, match="have changed outside of what 'de' owns"):
        fm.Delta.of(model, plain, "de")
    de, fi = fm.Delta.of(model, plain, "de", beside=["fi"]), fm.Delta.of(model, plain, "fi", beside=["de"])
    found = copy.deepcopy(plain)
    (de + fi).add(found)
    assert_same(parameters(found), parameters(model))


# ---- what is refused


def test_what_changed_elsewhere(plain):
    """A layer norm that was trained, or weights of another language, would be lost."""
    model = trained(plain, subnetworks(plain), "de")
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight[3] += 1
    with pytest.raises(ValueError, match=r"1 weights of 'encoder.layer.0.output.LayerNorm.weight' .* has no mask"):
        fm.Delta.of(model, plain, "de")
    fm.Delta.of(model, plain, "de", ignore=["encoder.layer.0.output.LayerNorm"])
    with pytest.raises(ValueError, match="is not of 'fi' alone"):
        fm.Delta.of(trained(plain, subnetworks(plain), "de"), plain, "fi")


def test_another_base(plain, deltas):
    """Names, shapes, dtypes and values of another model are seen before anything changes."""
    (de, _), (model, _) = deltas
    with pytest.raises(ValueError, match="the base has no parameter"):
        fm.Delta.of(model, {}, "de")
    with pytest.raises(ValueError, match="in the base"):
        fm.Delta.of(model, tiny("bert", intermediate_size=24).float(), "de")
    with pytest.raises(KeyError, match="unknown language 'dee'"):
        fm.Delta.of(model, plain, "dee")
    with pytest.raises(ValueError, match="single name 'fi'"):
        fm.Delta.of(model, plain, "de", beside="fi")
    with pytest.raises(ValueError, match="no subnetworks are attached"):
        fm.Delta.of(plain, plain, "de")
    for other, message in (
        (tiny("llama").float(), "has no parameter"),
        (tiny("bert", intermediate_size=24).float(), "of another model"),
        (tiny("bert"), "float64"),
        (model, "is not what it was when the delta of 'de' was taken"),
    ):
        before = parameters(other)
        with pytest.raises(ValueError, match=message):
            de.add(other)
        assert_same(parameters(other), before)


def test_twice_and_never(plain, deltas):
    """Adding a delta twice, or removing one that was never added, is refused, and nothing changes."""
    (de, ner), _ = deltas
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"'de' was never added to this BertModel \(added: none\)"):
        de.remove(model)
    de.add(model)
    before = parameters(model)
    with pytest.raises(ValueError, match="'de' was added to this BertModel already"):
        (ner + de).add(model)
    with pytest.raises(ValueError, match=r"'ner' was never added to this BertModel \(added: 'de'\)"):
        (de + ner).remove(model)
    assert_same(parameters(model), before)
    with pytest.raises(ValueError, match="'de' is in both"):
        de + (ner + de)
    with pytest.raises(TypeError):
        de + 1
    other = fm.Delta.of(*(lambda p: (trained(p, subnetworks(p), "fi"), p, "fi"))(tiny("bert")))
    with pytest.raises(ValueError, match=r"torch.float32 .* in that of 'de', and torch.float64"):
        de + other


def test_a_change_of_nothing(plain):
    """Of no steps, say: it is on the model all the same."""
    model, nothing = copy.deepcopy(plain), fm.Delta.of(trained(plain, subnetworks(plain), "de", steps=0), plain, "de")
    nothing.add(model)
    with pytest.raises(ValueError, match="'de' was added to this BertModel already"):
        nothing.add(model)
    nothing.remove(model)
    assert_same(parameters(model), parameters(plain))


def test_training_after_a_delta_is_not_lost(plain, deltas):
    """A model that has changed since is left as it is, also where the change is below another delta."""
    (de, ner), _ = deltas
    for changed in (de, ner):
        model = copy.deepcopy(plain)
        de.add(model)
        ner.add(model)
        name, part = next(
            (name, part)
            for name, part in changed.changes[0].parts.items()
            if part.live.kind == "rows" and "weight" in name
        )
        with torch.no_grad():
            model.get_parameter(name)[int(part.live._units[0])] += 1
        before = parameters(model)
        for act in (lambda m=model: ner.remove(m), lambda m=model: de.remove(m)):
            with pytest.raises(ValueError, match=f"'{name}' has changed since the delta of"):
                act()
            assert_same(parameters(model), before)


def test_nan_has_no_delta(plain):
    """A run that diverged has nothing to give."""
    model = trained(plain, subnetworks(plain), "de")
    live = live_of(model.encoder.layer[0].intermediate.dense.mask, [0])
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight[int(live._units[0]), 2] = torch.nan
    with pytest.raises(ValueError, match=r"'encoder.layer.0.intermediate.dense.weight' has no delta: it holds NaN"):
        fm.Delta.of(model, plain, "de")


def test_an_empty_language(plain):
    """A language that owns nothing has learnt nothing."""
    neurons = torch.ones(3, 2, 20, dtype=torch.bool)
    neurons[1] = False
    model = fm.attach(copy.deepcopy(plain), fm.Subnetworks(LANGUAGES, neurons=neurons), forward="full")
    with pytest.raises(ValueError, match="'fi' owns nothing"):
        fm.Delta.of(model, plain, "fi")
    assert attached(model).subnets.languages == tuple(LANGUAGES)
    whole = fm.Delta.of(trained(plain, attached(model).subnets, "de"), plain, "de")  # one that owns everything
    twin = copy.deepcopy(plain)
    whole.add(twin)
    whole.remove(twin)
    assert_same(parameters(twin), parameters(plain))


def test_files_that_are_damaged_or_of_another_kind(plain, deltas, tmp_path):
    """One bit is enough; a masks file is not a delta."""
    (de, _), _ = deltas
    path = tmp_path / "de.safetensors"
    de.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    (tmp_path / "cut").write_bytes(content[:-50])
    subnetworks(plain).save(tmp_path / "masks")
    for name, message in (("flipped", "checksum"), ("cut", "truncated"), ("masks", "not one of a fastmask delta")):
        with pytest.raises(FileError, match=message):
            fm.Delta.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fm.Delta.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, k: t.update({f"{k}.live": torch.ones(3)}), "uint8"),
        (lambda t, k: t.pop(f"{k}.live"), "has no tensor"),
    ],
)
def test_files_that_hold_something_else(plain, deltas, tmp_path, damage, message):
    """A sealed file whose tensors do not go together is refused, and names what is wrong."""
    (de, _), _ = deltas
    de.save(tmp_path / "de")
    tensors, header = read_sealed(tmp_path / "de")
    damage(tensors, next(key for key in tensors if key.endswith("dense.weight.live")).removesuffix(".live"))
    write_sealed(tmp_path / "de", tensors, header)
    with pytest.raises(FileError, match=message):
        fm.Delta.load(tmp_path / "de")
    write_sealed(tmp_path / "de", tensors, {**header, "version": "1"})
    with pytest.raises(FileError, match="has format version 1"):
        fm.Delta.load(tmp_path / "de")


def test_one_name_can_be_ignored(plain):
    """A single name is a beginning of names, not its letters."""
    subnets = subnetworks(plain)
    model = trained(plain, subnets, "de")
    with torch.no_grad():
        parameter = next(p for name, p in model.named_parameters() if name.startswith("embeddings.word"))
        parameter += 1
    names = [set(fm.Delta.of(model, plain, "de", ignore=i).changes[0].parts) for i in ("embeddings", ["embeddings"])]
    assert names[0] == names[1] != set()


def test_a_change_cannot_be_given_twice(plain, deltas):
    """Two times the same change is a mistake, wherever a delta is made."""
    (change,) = deltas[0][0].changes
    with pytest.raises(ValueError, match="'de' is given twice"):
        fm.Delta([change, change])


def test_a_model_that_is_loaded_anew_has_nothing_on_it(plain, deltas):
    """After `load_state_dict` of the base a delta can be added again, and is not there to be removed."""
    delta = deltas[0][0]
    model, base = copy.deepcopy(plain), copy.deepcopy(plain.state_dict())
    delta.add(model)
    model.load_state_dict(base)
    with pytest.raises(ValueError, match="never added"):
        delta.remove(model)
    delta.add(model)
    assert any(not torch.equal(p, base[name]) for name, p in model.named_parameters())
    delta.remove(model)
    assert_same(parameters(model), base)
