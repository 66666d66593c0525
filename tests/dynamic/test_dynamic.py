"""Dynamic subnetworks: updates, replaced masks, checkpoints and errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batch, multiplied, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmask as fm
from fastmask.dynamic import History, swapped
from fastmask.files import FileError, read_tensors
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
EAGER = {"every": 1, "swaps": 2}
MARK = {"history": "1"}  # in the header of a file


def masked_model(model_type="bert", units="both", density=0.5, seed=3):
    model = tiny(model_type)
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, density, seed, units=units))


def flipped(keep):
    """Another mask with as many live units in every layer."""
    return keep.roll(1, -1)


def assert_equals_multiplying(model, ids=(2, 0, 1, 1, 0)):
    """Output and every gradient of an attached model equal those of its weights multiplied by its current masks."""
    ids, subnets = list(ids), attached(model).subnets
    plain = fm.detach(copy.deepcopy(model))
    expected = multiplied(plain, subnets, batch(len(ids)), ids)
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(5))
    (expected * upstream).sum().backward()
    model.zero_grad()
    output = model(**batch(len(ids)), language_ids=torch.tensor(ids))[0]
    (output * upstream).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def index_rows(model, row):
    """What the masked layers store of one language."""
    layers = {name: m.mask for name, m in model.named_modules() if isinstance(m, AttachedLinear)}
    return {name: mask.index[row, : mask.live_counts()[row]].clone() for name, mask in layers.items()}


def scores_of(model, *languages, size=4):
    """Importance of the units of some languages."""
    target = torch.randn(24, generator=torch.Generator().manual_seed(2)).double()

    def loss(inputs):
        return ((model(**inputs)[0] - target) ** 2).mean((1, 2))

    return {name: fm.importance(model, [batch(size)], loss, name) for name in languages}


class TestSwapping:
    def test_by_hand(self):
        """The weakest live units leave, over all layers that have dead ones, for dead ones of their layers."""
        keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
        dead = ~keep
        dead[1, 2] = False  # a layer of fewer units
        scores = torch.tensor([[0.1, 0.5, 0.9, 0, 0], [0.4, 0.6, 0, 0, 0.2], [0.01, 0.01, 0.01, 0.01, 0.01]])
        after = swapped(keep, dead, scores, 2, np.random.default_rng(0))
        assert after[0, :3].tolist() == [False, True, True]
        assert after[0, 3:].sum() == 1
        assert after[1].int().tolist() == [1, 1, 0, 1, 0]  # 0.2 leaves; only unit 3 can come in
        assert after[2].all()
        after = swapped(keep, dead, scores, 99, np.random.default_rng(0))
        assert after[0].int().tolist() == [0, 0, 1, 1, 1]  # as many as there are dead ones
        assert after[1].int().tolist() == [1, 1, 0, 1, 0]

    @settings(max_examples=60, deadline=None)
    @given(
        layers=st.integers(1, 4),
        units=st.integers(1, 9),
        count=st.integers(1, 40),
        seed=st.integers(0, 999),
    )
    def test_properties(self, layers, units, count, seed):
        """Every layer keeps its size, no more units leave than asked for, none of them is more important than one that
        stays in a layer with a dead unit left, and what comes in was dead.
        """
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(layers, units, generator=generator) < 0.4
        scores = torch.rand(layers, units, generator=generator)
        after = swapped(keep, ~keep, scores, count, np.random.default_rng(seed))
        assert torch.equal(after.sum(1), keep.sum(1))
        left = keep & ~after
        assert left.sum() <= count
        if left.any() and left.sum() == count:
            spare = (left.sum(1) < (~keep).sum(1)).unsqueeze(1)
            stayed = scores[keep & after & spare]
            assert not len(stayed) or scores[left & spare].numel() == 0 or scores[left & spare].max() <= stayed.min()

    def test_what_comes_in_depends_on_seed_step_and_language(self):
        """Runs with one seed repeat; other seeds, steps and languages draw other units."""
        keep = (torch.arange(60) % 2 == 0).view(1, 1, 60).expand(2, 1, 60)
        scores = {"neurons": torch.linspace(1, 2, 60).view(1, 60)}

        def came(seed, step, language):
            model = fm.attach(
                tiny("bert", intermediate_size=60, num_hidden_layers=1), fm.Subnetworks(["a", "b"], neurons=keep)
            )
            dynamic = fm.DynamicSubnetworks(model, every=1, swaps=5, seed=seed)
            assert dynamic.update(step, {language: scores}) == [language]
            new = dynamic.history[-1].masks.neurons[0]
            assert (keep[0] & ~new).nonzero()[:, 1].tolist() == [0, 2, 4, 6, 8]
            return tuple((new & ~keep[0]).nonzero()[:, 1].tolist())

        assert came(0, 1, "a") == came(0, 1, "a")
        assert len({came(0, 1, "a"), came(1, 1, "a"), came(0, 2, "a"), came(0, 1, "b")}) == 4

    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_changes_the_scored_language_only(self, model_type):
        """An update changes one language's mask, and the size of none of its layers."""
        model = masked_model(model_type)
        before, others = attached(model).subnets, {row: index_rows(model, row) for row in (0, 2)}
        dynamic = fm.DynamicSubnetworks(model, **EAGER)
        assert dynamic.update(1, scores_of(model, "bb")) == ["bb"]
        after = attached(model).subnets
        for old, new in ((before.heads, after.heads), (before.neurons, after.neurons)):
            assert torch.equal(old[[0, 2]], new[[0, 2]])
            assert torch.equal(old.sum(-1), new.sum(-1))
            assert (old[1] & ~new[1]).sum() == 2
        for row, rows in others.items():
            now = index_rows(model, row)
            assert all(torch.equal(now[name], stored) for name, stored in rows.items())
        assert dynamic.update(2, {}) == []
        assert_equals_multiplying(model)

    def test_share_of_live_units(self):
        """`swaps` below 1 is a share of the live units, at least one."""
        model = masked_model(density=0.5)
        dynamic = fm.DynamicSubnetworks(model, every=1, swaps=0.15)
        before = attached(model).subnets
        dynamic.update(1, scores_of(model, "aa"))
        after = attached(model).subnets
        assert (before.heads[0] & ~after.heads[0]).sum() == 1  # of 4
        assert (before.neurons[0] & ~after.neurons[0]).sum() == 3  # of 20


class TestReplacing:
    @settings(max_examples=40, deadline=None)
    @given(
        L=st.integers(1, 4),
        groups=st.integers(1, 6),
        unit=st.integers(1, 3),
        density=st.sampled_from([0.0, 0.4, 1.0]),
        seed=st.integers(0, 99),
    )
    def test_equals_a_mask_made_anew(self, L, groups, unit, density, seed):
        """A mask with one language replaced equals the mask made anew, units included."""
        generator = torch.Generator().manual_seed(seed)
        N, K, row = groups * unit, 2 * groups, seed % L

        def flags(*shape):
            return torch.rand(shape, generator=generator) < density

        rows, columns, blocks = flags(L, groups).repeat_interleave(unit, 1), flags(L, K), flags(L, groups, 2)
        cases = [
            (lambda keep: fm.Mask.rows(keep, K), rows, (torch.rand(N, generator=generator) < 0.5)),
            (lambda keep: fm.Mask.columns(keep, N), columns, (torch.rand(K, generator=generator) < 0.5)),
            (lambda keep: fm.Mask.blocks(keep, (unit, groups)), blocks, flags(groups, 2)),
            (fm.Mask.weights, flags(L, N, K), flags(N, K)),
        ]
        for make, keep, new in cases:
            mask = make(keep)
            stored = [tensor.clone() for tensor in (mask.index, mask.extents, mask.live)]
            replaced = mask.replaced(row, new)
            changed = keep.clone()
            changed[row] = new
            anew = make(changed)
            for mine, fresh in ((replaced.index, anew.index), (replaced.extents, anew.extents)):
                assert torch.equal(mine, fresh)
            assert torch.equal(replaced.live, anew.live)
            assert all(fine == 0 for fine in map(int.__mod__, anew.geometry, replaced.geometry))
            assert torch.equal(replaced.to_dense(), anew.to_dense())
            for before, now in zip(stored, (mask.index, mask.extents, mask.live), strict=True):
                assert torch.equal(before, now)

    def test_errors_of_replaced(self):
        """A wrong shape or a negative id is refused."""
        mask = fm.Mask.rows(torch.ones(2, 6, dtype=torch.bool), 3)
        with pytest.raises(ValueError, match=r"language id -1 is out of range: expected 0 to 1"):
            mask.replaced(-1, torch.ones(6, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"expected keep \[6\] of a mask of rows, given shape \(5,\)"):
            mask.replaced(0, torch.ones(5, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"dtype torch\.bool"):
            mask.replaced(0, torch.ones(6))

    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_attached_model_follows(self, model_type):
        """An attached model computes with the new mask, wider or narrower than the old one."""
        model = masked_model(model_type)
        subnets, old = attached(model).subnets, attached(model).subnets.heads.clone()
        heads, neurons = subnets.heads[1].clone(), subnets.neurons[1].clone()
        heads[0], neurons[1] = True, torch.arange(20) == 7
        untouched = model.get_submodule(
            "encoder.layer.0.output.dense" if model_type == "bert" else "layers.0.mlp.down_proj"
        ).mask
        set_subnetwork(model, "bb", heads=heads, neurons=neurons)
        assert torch.equal(subnets.heads, old)  # what others hold stays as it is
        assert torch.equal(attached(model).subnets.heads[1], heads)
        assert any(m.mask is untouched for m in model.modules() if isinstance(m, AttachedLinear))
        assert_equals_multiplying(model)
        assert_equals_multiplying(model, [1, 1])
        set_subnetwork(model, "bb", heads=subnets.heads[1])
        assert_equals_multiplying(model)

    def test_a_backward_pass_ends_with_the_masks_it_began_with(self):
        """A backward pass uses the masks of its forward pass, even if they were replaced in between."""
        grads = []
        for replace in (False, True):
            model = masked_model()
            output = model(**batch(3), language_ids=torch.tensor([1, 0, 1]))[0]
            if replace:
                subnets = attached(model).subnets
                set_subnetwork(model, "bb", flipped(subnets.heads[1]), flipped(subnets.neurons[1]))
            output.square().sum().backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_compiled_model_follows(self):
        """A compiled model computes with the new masks, and can be scored without compiling it again."""
        torch._dynamo.reset()
        model = masked_model().float()
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=count)
        inputs = {**batch(3), "language_ids": torch.tensor([0, 1, 2])}
        compiled(**inputs)
        dynamic = fm.DynamicSubnetworks(compiled, **EAGER)
        before, compilations = compiled(**inputs)[0], count.frame_count
        scores = fm.importance(compiled, [batch(4)], lambda rows: compiled(**rows)[0].square().mean((1, 2)), "bb")
        assert count.frame_count == compilations
        assert dynamic.update(1, {"bb": scores}) == ["bb"]
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(compiled(**inputs)[0][1], before[1])
        fm.detach(compiled)
        assert type(model).__module__.startswith("transformers.")
        torch._dynamo.reset()

    def test_wrong_subnetworks_change_nothing(self):
        """A subnetwork that is refused is applied in no layer."""
        model = masked_model()
        state = attached(model)
        before, masks = state.subnets, [m.mask for m in model.modules() if isinstance(m, AttachedLinear)]
        good, dead = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
        dead[1] = False
        with pytest.raises(ValueError, match="would leave 'bb' without live neurons in layer 1"):
            set_subnetwork(model, "bb", good, dead)
        with pytest.raises(ValueError, match=r"expected heads of 'bb' as a bool tensor \(2, 4\), given .*\(2, 5\)"):
            set_subnetwork(model, "bb", heads=torch.ones(2, 5, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"given torch\.float32"):
            set_subnetwork(model, "bb", heads=torch.ones(2, 4))
        with pytest.raises(KeyError, match="unknown language 'b'; did you mean 'bb'"):
            set_subnetwork(model, "b", good)
        with pytest.raises(ValueError, match="give heads, neurons or both"):
            set_subnetwork(model, "bb")
        with pytest.raises(ValueError, match="no subnetworks are attached"):
            set_subnetwork(tiny("bert"), "bb", good)
        with pytest.raises(ValueError, match="do not mask neurons"):
            set_subnetwork(masked_model(units="heads"), "bb", neurons=dead)
        assert state.subnets is before
        assert all(
            m.mask is old
            for m, old in zip((m for m in model.modules() if isinstance(m, AttachedLinear)), masks, strict=True)
        )


def trained(dynamic, optimizer, first, last):
    """Steps of a small training: every language in each batch, an update every second step."""
    model, ids = dynamic.model, torch.tensor([0, 1, 2, 1])
    for step in range(first, last + 1):
        model(**batch(4), language_ids=ids)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if dynamic.due(step):
            dynamic.update(step, scores_of(model, *LANGUAGES, size=2 + step % 3))


class TestTraining:
    def test_resumed_run_continues_exactly(self, tmp_path):
        """A checkpoint holds everything: a resumed run has the same masks, weights and history."""

        def start():
            model = masked_model()
            return fm.DynamicSubnetworks(model, every=2, swaps=1), torch.optim.AdamW(model.parameters(), lr=1e-2)

        whole, optimizer = start()
        trained(whole, optimizer, 1, 9)
        broken, optimizer = start()
        trained(broken, optimizer, 1, 5)
        broken.save(tmp_path / "dynamic.safetensors")
        weights, moments = copy.deepcopy(broken.model.state_dict()), copy.deepcopy(optimizer.state_dict())
        trained(broken, optimizer, 6, 9)  # what was saved must not change with it
        resumed, optimizer = start()
        resumed.model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        resumed.load(tmp_path / "dynamic.safetensors")
        trained(resumed, optimizer, 6, 9)
        assert attached(resumed.model).subnets == attached(whole.model).subnets
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert list(resumed.history) == list(whole.history)
        assert len(whole.history) == 5 * len(LANGUAGES)

    def test_training_goes_on_and_detaching_works(self):
        """After updates gradients are right, parameters are the same objects, and the model can be detached."""
        model = masked_model()
        parameters = list(model.parameters())
        dynamic = fm.DynamicSubnetworks(model, every=1, swaps=3)
        trained(dynamic, torch.optim.AdamW(parameters, lr=1e-2), 1, 3)
        assert len(dynamic.history) > 6
        assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
        assert_equals_multiplying(model)
        subnets = attached(model).subnets
        with torch.no_grad(), fm.language(model, "bb"):
            expected = model(**batch(2))[0]
        plain = fm.detach(model)
        assert all(mine is before for mine, before in zip(plain.parameters(), parameters, strict=True))
        torch.testing.assert_close(multiplied(plain, subnets, batch(2), [1, 1]), expected)

    def test_masks_stay_after_the_last_step_of_updates(self):
        """After `until` no update is due, and masks stay whatever scores say."""
        dynamic = fm.DynamicSubnetworks(masked_model(), every=2, swaps=2, until=5)
        assert [step for step in range(10) if dynamic.due(step)] == [2, 4]
        for step in (4, 6):
            before = attached(dynamic.model).subnets
            assert (dynamic.update(step, scores_of(dynamic.model, "aa")) == ["aa"]) == (step == 4)
            assert (attached(dynamic.model).subnets == before) == (step == 6)

    def test_history(self, tmp_path):
        """Each update is in the history, at its step, with the masks as they were then."""
        model = masked_model()
        dynamic = fm.DynamicSubnetworks(model, every=2, swaps=2)
        was = {0: attached(model).subnets}
        for step in range(1, 9):
            if dynamic.due(step):
                dynamic.update(step, scores_of(model, "cc" if step == 4 else "aa"))
            was[step] = attached(model).subnets
        dynamic.history.save(tmp_path / "history.safetensors")
        again = History.load(tmp_path / "history.safetensors")
        for step, subnets in was.items():
            assert dynamic.history.at(step) == again.at(step) == subnets, step
        assert [(h.step, h.language) for h in dynamic.history[:3]] == [(0, name) for name in LANGUAGES]
        last = dynamic.history[-1]
        assert last.step == 8
        assert last.masks == attached(model).subnets.select(["aa"])
        heads = last.masks.heads
        assert heads.untyped_storage().nbytes() == heads.nbytes  # not the masks of all languages
        packed = sum(flags.numel() for flags in read_tensors(tmp_path / "history.safetensors")[0].values())
        assert packed == len(dynamic.history) * (1 + 5)  # 2 layers x 4 heads, and x 20 neurons, a bit each
        with pytest.raises(ValueError, match=r"update\(step=2\): masks were last changed after step 8"):
            dynamic.update(2, {})

    def test_a_second_update_at_one_step_replaces_the_first(self, tmp_path):
        """Of the masks that a language got at one step the last ones count, and others may be updated between."""
        dynamic = fm.DynamicSubnetworks(masked_model(), **EAGER)
        for name in ("bb", "aa", "bb"):
            dynamic.update(1, scores_of(dynamic.model, name))
        dynamic.save(tmp_path / "dynamic.safetensors")
        again = fm.DynamicSubnetworks(masked_model(), **EAGER)
        again.load(tmp_path / "dynamic.safetensors")
        assert attached(again.model).subnets == attached(dynamic.model).subnets
        assert len(again.history) == len(dynamic.history) - 1

    def test_languages_may_be_called_anything(self, tmp_path):
        """Names that look like those of a file's masks come back as they were."""
        names, path = ["fi", "fi@0", "@", "fi@300@1"], tmp_path / "dynamic.safetensors"
        subnets = fm.Subnetworks.random(tiny("bert").config, names, 0.5, seed=0)
        dynamic = fm.DynamicSubnetworks(fm.attach(tiny("bert"), subnets), **EAGER)
        for step in (1, 300):
            dynamic.update(step, scores_of(dynamic.model, *names))
        dynamic.save(path)
        assert list(History.load(path)) == list(dynamic.history)

    def test_checkpoint_of_something_else_changes_nothing(self, tmp_path):
        """A file that does not fit is refused, and nothing of it is loaded."""
        path = tmp_path / "dynamic.safetensors"
        dynamic = fm.DynamicSubnetworks(masked_model(), **EAGER)
        dynamic.save(path)
        good = fm.Subnetworks.load(path)
        dynamic.update(1, scores_of(dynamic.model, "aa"))
        before = attached(dynamic.model).subnets
        heads_only = fm.DynamicSubnetworks(masked_model(units="heads"))
        with pytest.raises(FileError, match=r"mask \{'heads': \(2, 4\)\}, given others that mask .*'neurons'"):
            heads_only.load(path)

        def refused(subnets, message, mark=MARK):
            subnets.save(tmp_path / "wrong", mark)
            with pytest.raises(FileError, match=message):
                dynamic.load(tmp_path / "wrong")

        dead = good.map(torch.clone)
        dead.heads[0, 1] = False
        refused(dead, "'aa' has no live heads in layer 1")
        refused(good.rename({"aa@0": "aa@3"}), "expected the masks of aa, bb, cc from step 0 on")
        refused(good.rename({"aa@0": "xx@0"}), r"of languages \['xx', 'bb', 'cc'\], expected \['aa', 'bb', 'cc'\]")
        for mark in ({}, {"history": "2"}):
            refused(good, "no history of masks", mark)
        assert attached(dynamic.model).subnets is before
        dynamic.load(path)
        assert attached(dynamic.model).subnets != before

    def test_units_that_a_layer_lacks_change_no_language(self, tmp_path):
        """A file that gives one language units of a narrower layer is refused before any language has its masks."""
        model = tiny("bert")
        layer, sizes = model.encoder.layer[1], (model.config.hidden_size, 12)
        layer.intermediate.dense = nn.Linear(*sizes, dtype=model.dtype)
        layer.output.dense = nn.Linear(*sizes[::-1], dtype=model.dtype)
        neurons = torch.ones(2, 2, model.config.intermediate_size, dtype=torch.bool)
        neurons[:, 1, 12:] = False
        neurons[:, :, 0] = False
        fm.attach(model, fm.Subnetworks(["aa", "bb"], neurons=neurons))
        before, dynamic = attached(model).subnets, fm.DynamicSubnetworks(model)
        neurons[0, :, :2] = torch.tensor([True, False])  # would fit
        neurons[1, 1, 15] = True
        fm.Subnetworks(["aa@0", "bb@0"], neurons=neurons).save(tmp_path / "wrong", MARK)
        with pytest.raises(FileError, match=r"neurons of layer 1 that do not exist"):
            dynamic.load(tmp_path / "wrong")
        assert attached(model).subnets is before


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every must be a whole number of steps, at least 1, given 0"),
            ({"every": 1.5}, "every must be"),
            ({"until": -1}, "until must be a step or None, given -1"),
            ({"until": 2.5}, "until must be"),
            ({"swaps": 0}, "swaps must be"),
            ({"swaps": 2.5}, "swaps must be"),
            ({"swaps": float("nan")}, "swaps must be"),
            ({"swaps": float("inf")}, "swaps must be"),
        ],
    )
    def test_options(self, options, message):
        """A wrong option is refused."""
        with pytest.raises(ValueError, match=message):
            fm.DynamicSubnetworks(masked_model(), **options)

    def test_models(self):
        """A model whose masks cannot be updated is refused before training."""
        with pytest.raises(ValueError, match="no subnetworks are attached to this BertModel"):
            fm.DynamicSubnetworks(tiny("bert"))
        weights = {"encoder.layer.0.intermediate.dense": torch.ones(1, 20, 24, dtype=torch.bool)}
        only_weights = fm.attach(tiny("bert"), fm.Subnetworks(["a"], weights=weights))
        with pytest.raises(ValueError, match="over weights only"):
            fm.DynamicSubnetworks(only_weights)
        heads = torch.ones(2, 2, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match="every language owns all heads: as sizes are kept, nothing could change"):
            fm.DynamicSubnetworks(fm.attach(tiny("bert"), fm.Subnetworks(["a", "b"], heads)))
        heads[1, 0] = False
        with pytest.raises(ValueError, match="'b' has no live heads in layer 0"):
            fm.DynamicSubnetworks(fm.attach(tiny("bert"), fm.Subnetworks(["a", "b"], heads)))

    def test_scores(self):
        """Scores of an unknown language, or that are not finite, change nothing."""
        model = masked_model()
        dynamic, before = fm.DynamicSubnetworks(model, **EAGER), attached(model).subnets
        good = scores_of(model, "aa")
        with pytest.raises(KeyError, match="unknown language 'ab'; did you mean"):
            dynamic.update(1, {**good, "ab": good["aa"]})
        infinite = {**good["aa"], "neurons": good["aa"]["neurons"] * float("nan")}
        with pytest.raises(FloatingPointError, match="the scores of 'bb' are not finite"):
            dynamic.update(1, {**good, "bb": infinite})
        assert attached(model).subnets is before
        fm.detach(model)
        fm.attach(model, fm.Subnetworks.random(model.config, ["xx"], 0.5, 0, units="both"))
        with pytest.raises(ValueError, match="the model now has subnetworks of"):
            dynamic.update(1, {})
