"""Dynamic subnetworks: scouts, swaps, replaced masks, checkpoints and errors."""

from __future__ import annotations

import copy
import io
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_scout import literal_gradients, loss_of
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from tiny_models import batch, multiplied, tiny
from torch._dynamo.testing import CompileCounterWithBackend

import fastmask as fm
from fastmask.discovery import importance
from fastmask.dynamic import STRATEGIES, scout
from fastmask.dynamic.swap import Swap, layer_norms, swapped
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
EAGER = {"every": 1, "swaps": 2, "margin": 0.0}


def masked_model(model_type="bert", units="both", density=0.5, seed=3):
    model = tiny(model_type)
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, density, seed, units=units))


def masks_of(subnets, row):
    kinds = {"heads": subnets.heads, "neurons": subnets.neurons}
    return {kind: keep[row] for kind, keep in kinds.items() if keep is not None}


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


class TestScout:
    @pytest.mark.parametrize("units", ["heads", "neurons", "both"])
    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_equals_the_literal_definition(self, model_type, units):
        """Gates of live and dead units, and of groups of query heads, get the gradient of their definition."""
        model = masked_model(model_type, units)
        plain, subnets, inputs = fm.detach(copy.deepcopy(model)), attached(model).subnets, batch(5)
        found = scout(model, "bb", inputs, loss_of(model))
        grads = literal_gradients(plain, inputs, masks_of(subnets, 1))
        assert found.examples == 5
        assert found.absolute.keys() == grads.keys()
        for kind, grad in grads.items():
            torch.testing.assert_close(found.absolute[kind], grad.abs().sum(0), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.signed[kind], grad.sum(0), rtol=1e-10, atol=1e-10)
            dead = ~masks_of(subnets, 1)[kind]
            assert (found.absolute[kind][dead] > 0).all()

    def test_computes_the_function_of_the_subnetwork(self):
        """A scouting pass computes what the trained subnetwork computes."""
        model = masked_model()
        seen = []

        def loss(inputs):
            seen.append(model(**inputs)[0])
            return seen[-1].mean((1, 2))

        scout(model, "cc", batch(3), loss)
        with fm.language(model, "cc"):
            torch.testing.assert_close(seen[0], model(**batch(3))[0], rtol=1e-12, atol=1e-12)

    def test_masks_over_weights_stay_in_force(self):
        """Masks over single weights stay in force while a language is scouted."""
        model = tiny("bert")
        name = "encoder.layer.1.intermediate.dense"
        keep = torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(0)) < 0.4
        heads = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(1)) < 0.5
        heads[..., 0] = True
        plain = copy.deepcopy(model)
        plain.get_submodule(name).weight.data *= keep[1]
        fm.attach(model, fm.Subnetworks(["a", "b"], heads, weights={name: keep}))
        found = scout(model, "b", batch(4), loss_of(model))
        expected = literal_gradients(plain, batch(4), {"heads": heads[1]})["heads"].abs().sum(0)
        torch.testing.assert_close(found.absolute["heads"], expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_live_units_score_as_in_discovery(self, model_type):
        """Static and dynamic subnetworks rank live units alike."""
        model = masked_model(model_type)
        found = scout(model, "aa", batch(5), loss_of(model))
        expected = importance(model, [batch(5)], loss_of(model), "aa")
        for kind, keep in masks_of(attached(model).subnets, 0).items():
            live = found.absolute[kind].masked_fill(~keep, 0)
            live = (live / layer_norms(live)).float()
            torch.testing.assert_close(live, getattr(expected, kind), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_does_not_depend_on_the_batch_size(self, strategy):
        """Scores do not depend on how examples fall into batches."""
        states = []
        for size in (1, 2, 5):
            model = masked_model()
            dynamic = fm.DynamicSubnetworks(model, strategy, **EAGER)
            for first in range(0, 5, size):
                part = {name: value[first : first + size] for name, value in batch(5).items()}
                dynamic.scout("bb", part, loss_of(model))
            dynamic.update(1)
            states.append(dynamic.state_dict()["tensors"])
        for other in states[1:]:
            for name, tensor in states[0].items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-10, atol=1e-12)

    def test_swaps_do_not_depend_on_the_number_of_scouts(self):
        """Scouting a language twice as often does not double its scores."""
        states = []
        for times in (1, 3):
            model = masked_model()
            dynamic = fm.DynamicSubnetworks(model, **EAGER)
            for _ in range(times):
                dynamic.scout("bb", batch(4), loss_of(model))
            dynamic.update(1)
            states.append(dynamic.state_dict()["tensors"])
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-10, atol=1e-12)

    def test_leaves_the_model_as_it_was(self):
        """No gradients, frozen parameters, hooks, eval mode or full-network router are left behind."""
        model = masked_model().train()
        model.encoder.layer[0].eval()
        model.embeddings.word_embeddings.weight.requires_grad_(False)
        routers = {id(m.router) for m in model.modules() if isinstance(m, AttachedLinear)}
        modes = [m.training for m in model.modules()]
        scout(model, "aa", batch(3), loss_of(model))
        with pytest.raises(RuntimeError, match="inside the loss"):
            scout(model, "aa", batch(3), lambda inputs: (_ for _ in ()).throw(RuntimeError("inside the loss")))
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert {id(m.router) for m in model.modules() if isinstance(m, AttachedLinear)} == routers
        assert all(m.activation == "gelu" for name, m in model.named_modules() if name.endswith("0.output.dense"))
        assert_equals_multiplying(model)

    def test_half_precision_sums_in_float32(self):
        """In bfloat16, too, a gate's gradient is summed over tokens in float32."""
        model = masked_model().to(torch.bfloat16)
        found = scout(model, "aa", batch(4), lambda inputs: model(**inputs)[0].float().square().mean((1, 2)))
        assert all(sums.dtype == torch.float64 and bool(sums.isfinite().all()) for sums in found.absolute.values())

    def test_infinite_loss_is_refused(self):
        """A loss that is not finite is refused, and the averages stay as they were."""
        model = masked_model()
        dynamic = fm.DynamicSubnetworks(model, every=1)
        with pytest.raises(FloatingPointError, match="scouting 'aa'"):
            dynamic.scout("aa", batch(2), lambda inputs: model(**inputs)[0].mean((1, 2)) * float("inf"))
        assert dynamic.update(1) == []


class TestSwap:
    def test_by_hand(self):
        """Pairs in order: the weakest live unit for the strongest dead one, if it is worth it by the margin."""
        keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
        scores = torch.tensor([[0.1, 0.5, 0.9, 0.3, 0.2], [0.4, 0.6, 0.8, 0.0, 0.45]])
        # Live, weakest first: 0.1, 0.4, 0.5 ...; dead, strongest first: 0.8, 0.45, 0.3 ...
        once = [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
        twice = [[0, 1, 1, 0, 0], [0, 1, 1, 0, 1]]
        assert swapped(keep, scores, 1, 0.0).int().tolist() == once
        assert swapped(keep, scores, 5, 0.0).int().tolist() == twice
        assert swapped(keep, scores, 5, 0.2).int().tolist() == once  # 0.45 is not more than 1.2 * 0.4
        assert torch.equal(swapped(keep, scores, 5, 10.0), keep)

    def test_the_last_unit_of_a_layer_leaves_only_for_one_of_its_layer(self):
        """The last unit of a layer may be swapped, but only within the layer."""
        keep = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
        keep = torch.cat([keep, torch.zeros(2, 1, dtype=torch.bool)], 1)
        elsewhere = torch.tensor([[0.1, 0.0, 0.0], [0.5, 0.6, 0.9]])
        assert swapped(keep, elsewhere, 1, 0.0).int().tolist() == [[1, 0, 0], [0, 1, 1]]
        same_layer = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.6, 0.0]])
        assert swapped(keep, same_layer, 1, 0.0).int().tolist() == [[0, 1, 0], [1, 1, 0]]

    @settings(max_examples=60, deadline=None)
    @given(
        layers=st.integers(1, 4),
        units=st.integers(1, 9),
        pairs=st.integers(1, 40),
        margin=st.sampled_from([0.0, 0.2, 3.0]),
        seed=st.integers(0, 999),
    )
    def test_properties(self, layers, units, pairs, margin, seed):
        """Sizes stay, no layer dies, no more pairs are swapped than allowed, and the live units get stronger."""
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(layers, units, generator=generator) < 0.4
        keep[:, 0] = True
        scores = torch.rand(layers, units, generator=generator)
        after = swapped(keep, scores, pairs, margin)
        assert after.sum() == keep.sum()
        assert after.any(1).all()
        came, left = scores[after & ~keep].sort().values, scores[keep & ~after].sort().values
        assert len(came) == len(left) <= pairs
        assert (came > (1 + margin) * left).all()

    def test_averages_exponentially(self):
        """Both averages must begin with the first scores, forget at the decay, and be shares of one norm."""
        model = masked_model(units="heads")
        dynamic = fm.DynamicSubnetworks(model, every=1, decay=0.75, margin=1e9)
        expected = {}
        for step, size in ((1, 3), (2, 4)):
            dynamic.scout("bb", batch(size), loss_of(model))
            found = scout(model, "bb", batch(size), loss_of(model))
            norms = (found.absolute["heads"] / size).norm(dim=1, keepdim=True)
            for name in ("absolute", "signed"):
                scores = getattr(found, name)["heads"] / size / norms
                expected[name] = 0.75 * expected[name] + 0.25 * scores if name in expected else scores
            assert dynamic.update(step) == []  # the margin
        for name, average in expected.items():
            stored = dynamic.state_dict()["tensors"][f"swap.{name}.heads"]
            torch.testing.assert_close(stored[1], average, rtol=1e-12, atol=1e-12)
            assert not stored[[0, 2]].any()

    def test_a_dead_unit_enters_by_its_sign_and_a_live_one_leaves_by_magnitude(self):
        """What would raise the loss must stay out however large it is; the sign of a live unit must not count."""
        keep = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.bool)
        absolute = torch.tensor([[9.0, 2.0, 5.0, 8.0, 6.0, 7.0]]).double()
        signed = torch.tensor([[9.0, -2.0, 0.0, 8.0, -5.0, -4.0]]).double()

        def after(pairs, margin):
            strategy = Swap({"heads": keep[None]}, pairs, margin, 0.8)
            sums = {"absolute": absolute * 4, "signed": signed * 4}
            return strategy.update("heads", 0, keep, sums).int().tolist()

        assert after(1, 0.0) == [[1, 0, 1, 0, 1, 0]]  # 5 for 2, not 8, which is harmful
        assert after(3, 0.0) == [[1, 0, 1, 0, 1, 0]]  # 4 does not come in for 5
        assert after(3, 1.6) == [[1, 1, 1, 0, 0, 0]]  # 5 is not more than 2.6 times 2

    def test_a_random_swap_lets_the_same_units_leave_and_draws_those_that_come_in(self):
        """The control swaps as many units, the same weak ones for others, by numbers that differ by language and update
        and are the same in a run that is repeated.
        """
        keep = (torch.arange(60) % 2 == 0).view(1, 60)
        sums = {"absolute": torch.linspace(1, 2, 60).double()[None], "signed": -torch.linspace(5, 9, 60).double()[None]}

        def two_updates(shuffled, row=0):
            strategy = Swap({"heads": keep.expand(2, 1, 60)}, 5, 0.0, 0.8, shuffled)
            first, second = (strategy.update("heads", row, keep, sums) for _ in range(2))
            return first, second

        chosen, random, other = two_updates(False)[0], two_updates(True), two_updates(True, row=1)
        assert (keep & ~chosen).nonzero().tolist() == (keep & ~random[0]).nonzero().tolist()
        assert (keep & ~chosen).sum() == 5
        came = [(after & ~keep).nonzero().flatten().tolist() for after in (chosen, *random, *other)]
        assert len({tuple(units) for units in came}) == 5
        assert all(torch.equal(one, again) for one, again in zip(random, two_updates(True), strict=True))

    def test_swaps_lower_the_loss(self):
        """At fixed weights, the units that come in for as many weak ones must make the language's loss smaller."""
        gains = []
        for seed in range(8):
            model = masked_model(seed=seed)
            dynamic = fm.DynamicSubnetworks(model, every=1, swaps=2, margin=0.0)
            losses = []
            for step in range(1, 3):
                with torch.no_grad(), fm.language(model, "aa"):
                    losses.append(float(loss_of(model)(batch(6)).mean()))
                dynamic.scout("aa", batch(6), loss_of(model))
                dynamic.update(step)
            gains.append(losses[0] - losses[1])
        assert sum(gain > 0 for gain in gains) >= 7

    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_changes_the_scouted_language_only(self, model_type):
        """A swap changes one language's mask, and not its size."""
        model = masked_model(model_type)
        before, others = attached(model).subnets, {row: index_rows(model, row) for row in (0, 2)}
        dynamic = fm.DynamicSubnetworks(model, **EAGER)
        dynamic.scout("bb", batch(4), loss_of(model))
        assert dynamic.update(1) == ["bb"]
        after = attached(model).subnets
        for old, new in ((before.heads, after.heads), (before.neurons, after.neurons)):
            assert torch.equal(old[[0, 2]], new[[0, 2]])
            assert old[1].sum() == new[1].sum()
            assert (old[1] & ~new[1]).sum() <= 2
        for row, rows in others.items():
            now = index_rows(model, row)
            assert all(torch.equal(now[name], stored) for name, stored in rows.items())
        assert dynamic.update(2) == []  # nothing was scouted since
        assert_equals_multiplying(model)

    def test_share_of_live_units(self):
        """`swaps` below 1 is a share of the live units, at least one."""
        model = masked_model(density=0.5)
        dynamic = fm.DynamicSubnetworks(model, every=1, swaps=0.15, margin=0.0, decay=0.0)
        dynamic.scout("aa", batch(4), loss_of(model))
        before = attached(model).subnets
        dynamic.update(1)
        after = attached(model).subnets
        assert (before.heads[0] & ~after.heads[0]).sum() <= 1  # of 4
        assert 1 <= (before.neurons[0] & ~after.neurons[0]).sum() <= 3  # of 20


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
        """A compiled model computes with the new masks, and can be scouted."""
        torch._dynamo.reset()
        model = masked_model().float()
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=count)
        inputs = {**batch(3), "language_ids": torch.tensor([0, 1, 2])}
        compiled(**inputs)
        dynamic = fm.DynamicSubnetworks(compiled, **EAGER)
        before, compilations = compiled(**inputs)[0], count.frame_count
        dynamic.scout("bb", batch(4), lambda rows: compiled(**rows)[0].square().mean((1, 2)))
        assert count.frame_count == compilations
        assert dynamic.update(1) == ["bb"]
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
    """Steps of a small training: every language in each batch, a scout and an update every second step."""
    model, ids = dynamic.model, torch.tensor([0, 1, 2, 1])
    for step in range(first, last + 1):
        model(**batch(4), language_ids=ids)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for language in LANGUAGES:
            dynamic.scout(language, batch(2 + step % 3), loss_of(model))
        dynamic.update(step)


class TestTraining:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_resumed_run_continues_exactly(self, strategy):
        """A checkpoint holds everything: a resumed run has the same masks, weights and history."""
        options = {"every": 2, "swaps": 1, "margin": 0.05}

        def start():
            model = masked_model()
            return fm.DynamicSubnetworks(model, strategy, **options), torch.optim.AdamW(model.parameters(), lr=1e-2)

        whole, optimizer = start()
        trained(whole, optimizer, 1, 9)
        broken, optimizer = start()
        trained(broken, optimizer, 1, 5)  # in the middle of a window: a scout waits for its update
        state = broken.state_dict()
        pickled = io.BytesIO()
        torch.save(state, pickled)
        pickled.seek(0)
        torch.load(pickled, weights_only=True)
        weights, moments = copy.deepcopy(broken.model.state_dict()), copy.deepcopy(optimizer.state_dict())
        trained(broken, optimizer, 6, 9)  # what was saved must not change with it
        file, header = to_bytes(state["tensors"]), json.dumps(state["header"])
        resumed, optimizer = start()
        resumed.model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        resumed.load_state_dict({"tensors": from_bytes(file), "header": json.loads(header)})
        assert 0 < resumed.seconds < whole.seconds * 100
        trained(resumed, optimizer, 6, 9)
        assert attached(resumed.model).subnets == attached(whole.model).subnets
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        expected = whole.state_dict()["tensors"]
        for name, tensor in resumed.state_dict()["tensors"].items():
            assert torch.equal(tensor, expected[name]), name
        assert len(whole.history) > len(LANGUAGES)

    def test_training_goes_on_and_detaching_works(self):
        """After updates gradients are right, parameters are the same objects, and the model can be detached."""
        model = masked_model()
        parameters = list(model.parameters())
        dynamic = fm.DynamicSubnetworks(model, every=1, swaps=3, margin=0.0)
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
        """After `until` no update may be due, and masks must stay whatever scouts have seen."""
        dynamic = fm.DynamicSubnetworks(masked_model(), **{**EAGER, "every": 2}, until=5)
        assert [step for step in range(10) if dynamic.due(step)] == [2, 4]
        for step in (4, 6):
            dynamic.scout("aa", batch(4), loss_of(dynamic.model))
            before = attached(dynamic.model).subnets
            assert (dynamic.update(step) == ["aa"]) == (step == 4)
            assert (attached(dynamic.model).subnets == before) == (step == 6)

    def test_history(self):
        """Each update is in the history, at its step, with the masks as they were then."""
        model = masked_model()
        dynamic = fm.DynamicSubnetworks(model, every=2, swaps=2, margin=0.0)
        was = {0: attached(model).subnets}
        for step in range(1, 9):
            if dynamic.due(step):
                dynamic.scout("cc" if step == 4 else "aa", batch(3), loss_of(model))
            dynamic.update(step)
            was[step] = attached(model).subnets
        for step, subnets in was.items():
            assert dynamic.history.at(step) == subnets, step
        assert [(h.step, h.language) for h in dynamic.history[:3]] == [(0, name) for name in LANGUAGES]
        last = dynamic.history[-1]
        assert last.step in (6, 8)
        assert torch.equal(last.heads, attached(model).subnets.heads[0])
        assert torch.equal(last.neurons, attached(model).subnets.neurons[0])
        packed = sum(t.numel() for name, t in dynamic.history.tensors().items() if name != "when")
        assert packed == len(dynamic.history) * (math.ceil(2 * 4 / 8) + math.ceil(2 * 20 / 8))
        assert dynamic.seconds > 0
        with pytest.raises(ValueError, match=r"update\(step=2\): masks were last changed after step"):
            dynamic.update(2)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_several_processes_see_one_batch(self, strategy):
        """Processes that scout one batch together end with the same masks."""
        halves = [{name: value[part] for name, value in batch(6).items()} for part in (slice(0, 2), slice(2, 6))]
        model = masked_model()
        alone = fm.DynamicSubnetworks(model, strategy, **EAGER)
        alone.scout("bb", batch(6), loss_of(model))
        alone.update(1)
        ranks, sent = [], []
        for half in halves:
            ranks.append(fm.DynamicSubnetworks(masked_model(), strategy, **EAGER))
            ranks[-1].scout("bb", half, loss_of(ranks[-1].model))
        for rank in ranks:
            state = rank.state_dict()["tensors"]
            names = [name for name in state if name.startswith("scouted.")]
            sent.append(torch.cat([state[name].flatten() for name in names]))
        for rank in ranks:
            rank.update(1, reduce=lambda mine: sent[0] + sent[1])
            assert attached(rank.model).subnets == attached(alone.model).subnets

    def test_checkpoint_of_something_else_changes_nothing(self):
        """A state that does not fit is refused, and nothing of it is loaded."""
        dynamic = fm.DynamicSubnetworks(masked_model(), **EAGER)
        dynamic.scout("aa", batch(2), loss_of(dynamic.model))
        good = dynamic.state_dict()
        other_model = masked_model()
        other = fm.DynamicSubnetworks(other_model, "random-swap")
        with pytest.raises(ValueError, match="of strategy 'swap', expected 'random-swap'"):
            other.load_state_dict(good)
        heads_only = fm.DynamicSubnetworks(masked_model(units="heads"))
        with pytest.raises(ValueError, match=r"one side only has .*neurons"):
            heads_only.load_state_dict(good)
        wrong = copy.deepcopy(good)
        wrong["tensors"]["masks.heads"][0, 1] = False
        with pytest.raises(ValueError, match="'aa' has no live heads in layer 1"):
            dynamic.load_state_dict(wrong)
        wrong = copy.deepcopy(good)
        wrong["tensors"]["scouted.signed.heads"] = wrong["tensors"]["scouted.signed.heads"][:, :1]
        with pytest.raises(ValueError, match=r"scouted\.signed\.heads of this .*\(3, 1, 4\), expected .*\(3, 2, 4\)"):
            dynamic.load_state_dict(wrong)
        for version in (1, 3):
            other = {**good, "header": {**good["header"], "version": version}}
            with pytest.raises(ValueError, match=f"version {version}, this fastmask reads version 2, whose masks move"):
                dynamic.load_state_dict(other)
        after = dynamic.state_dict()["tensors"]
        assert all(torch.equal(tensor, after[name]) for name, tensor in good["tensors"].items())


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"strategy": "swop"}, KeyError, "unknown strategy 'swop'; did you mean 'swap'"),
            ({"every": 0}, ValueError, "every must be a whole number of steps, at least 1, given 0"),
            ({"every": 1.5}, ValueError, "every must be"),
            ({"until": -1}, ValueError, "until must be a step or None, given -1"),
            ({"until": 2.5}, ValueError, "until must be"),
            ({"swaps": 0}, ValueError, "swaps must be"),
            ({"swaps": 2.5}, ValueError, "swaps must be"),
            ({"swaps": float("nan")}, ValueError, "swaps must be"),
            ({"swaps": float("inf")}, ValueError, "swaps must be"),
            ({"margin": -0.1}, ValueError, "margin must be"),
            ({"decay": 1.0}, ValueError, "decay must be"),
        ],
    )
    def test_options(self, options, error, message):
        """A wrong option is refused."""
        with pytest.raises(error, match=message):
            fm.DynamicSubnetworks(masked_model(), **options)

    def test_models(self):
        """A model whose masks cannot be updated is refused before training."""
        with pytest.raises(ValueError, match="no subnetworks are attached to this BertModel"):
            fm.DynamicSubnetworks(tiny("bert"))
        weights = {"encoder.layer.0.intermediate.dense": torch.ones(1, 20, 24, dtype=torch.bool)}
        only_weights = fm.attach(tiny("bert"), fm.Subnetworks(["a"], weights=weights))
        with pytest.raises(ValueError, match="over weights only"):
            fm.DynamicSubnetworks(only_weights)
        with pytest.raises(ValueError, match="only weights"):
            scout(only_weights, "a", batch(2), loss_of(only_weights))
        heads = torch.ones(2, 2, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match="every language owns all heads: as sizes are kept, nothing could change"):
            fm.DynamicSubnetworks(fm.attach(tiny("bert"), fm.Subnetworks(["a", "b"], heads)))
        heads[1, 0] = False
        with pytest.raises(ValueError, match="'b' has no live heads in layer 0"):
            fm.DynamicSubnetworks(fm.attach(tiny("bert"), fm.Subnetworks(["a", "b"], heads)))

    def test_scouts(self):
        """A wrong language or loss is refused."""
        model = masked_model()
        dynamic = fm.DynamicSubnetworks(model)
        with pytest.raises(KeyError, match="unknown language 'ab'; did you mean"):
            dynamic.scout("ab", batch(2), loss_of(model))
        with pytest.raises(ValueError, match=r"one loss for each example, \[batch\], given shape \(\)"):
            dynamic.scout("aa", batch(2), lambda inputs: model(**inputs)[0].mean())
        with pytest.raises(ValueError, match="must run the model once, it ran it 2 times"):
            dynamic.scout("aa", batch(2), lambda inputs: (model(**inputs)[0] + model(**inputs)[0]).mean((1, 2)))
        with pytest.raises(ValueError, match="gave 3 losses, its model 2 examples"):
            dynamic.scout("aa", batch(2), lambda inputs: model(**inputs)[0].mean().expand(3))
        with pytest.raises(ValueError, match="use one of the two"):
            dynamic.scout("aa", batch(2), lambda inputs: model(**inputs, language_ids=torch.tensor([0, 0]))[0])
        fm.detach(model)
        fm.attach(model, fm.Subnetworks.random(model.config, ["xx"], 0.5, 0, units="both"))
        with pytest.raises(ValueError, match="the model now has subnetworks of"):
            dynamic.scout("aa", batch(2), loss_of(model))
