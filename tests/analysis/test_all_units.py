"""Gates of all units, live and dead, of one language's subnetwork."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_gates import literal_gradients, loss_of
from tiny_models import batch, tiny

import fastmask as fm
from fastmask.analysis.all_units import all_gate_gradients
from fastmask.models.attach import attached
from fastmask.models.layers import AttachedLinear


def masked_model(model_type="bert", units="both"):
    model = tiny(model_type)
    return fm.attach(model, fm.Subnetworks.random(model.config, ["aa", "bb", "cc"], 0.5, 3, units=units))


def masks_of(subnets, row):
    kinds = {"heads": subnets.heads, "neurons": subnets.neurons}
    return {kind: keep[row] for kind, keep in kinds.items() if keep is not None}


@pytest.mark.parametrize("units", ["heads", "neurons", "both"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_equals_the_literal_definition(model_type, units):
    """Gates of live and dead units, and of groups of query heads, get the gradient of their definition."""
    model = masked_model(model_type, units)
    plain, subnets, inputs = fm.detach(copy.deepcopy(model)), attached(model).subnets, batch(5)
    found = all_gate_gradients(model, "bb", inputs, loss_of(model))
    grads = literal_gradients(plain, inputs, masks_of(subnets, 1))
    assert found.examples == 5
    assert found.absolute.keys() == grads.keys()
    for kind, grad in grads.items():
        torch.testing.assert_close(found.absolute[kind], grad.abs().sum(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.signed[kind], grad.sum(0), rtol=1e-10, atol=1e-10)
        dead = ~masks_of(subnets, 1)[kind]
        assert (found.absolute[kind][dead] > 0).all()


def test_computes_the_function_of_the_subnetwork():
    """A pass through all units computes what the trained subnetwork computes."""
    model = masked_model()
    seen = []

    def loss(inputs):
        seen.append(model(**inputs)[0])
        return seen[-1].mean((1, 2))

    all_gate_gradients(model, "cc", batch(3), loss)
    with fm.language(model, "cc"):
        torch.testing.assert_close(seen[0], model(**batch(3))[0], rtol=1e-12, atol=1e-12)


def test_masks_over_weights_stay_in_force():
    """Masks over single weights stay in force while all other units are computed."""
    model = tiny("bert")
    name = "encoder.layer.1.intermediate.dense"
    keep = torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(0)) < 0.4
    heads = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    heads[..., 0] = True
    plain = copy.deepcopy(model)
    plain.get_submodule(name).weight.data *= keep[1]
    fm.attach(model, fm.Subnetworks(["a", "b"], heads, weights={name: keep}))
    found = all_gate_gradients(model, "b", batch(4), loss_of(model))
    expected = literal_gradients(plain, batch(4), {"heads": heads[1]})["heads"].abs().sum(0)
    torch.testing.assert_close(found.absolute["heads"], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_live_units_score_as_in_discovery(model_type):
    """Live units have the score of static discovery."""
    model = masked_model(model_type)
    found = all_gate_gradients(model, "aa", batch(5), loss_of(model))
    expected = fm.importance(model, [batch(5)], loss_of(model), "aa")
    for kind, keep in masks_of(attached(model).subnets, 0).items():
        live = found.absolute[kind].masked_fill(~keep, 0)
        live = (live / live.norm(dim=-1, keepdim=True)).float()
        torch.testing.assert_close(live, expected[kind], rtol=1e-5, atol=1e-6)


def test_leaves_the_model_as_it_was():
    """No gradients, frozen parameters, hooks, eval mode or full-network router are left behind."""
    model = masked_model().train()
    model.encoder.layer[0].eval()
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    routers = {id(m.router) for m in model.modules() if isinstance(m, AttachedLinear)}
    modes = [m.training for m in model.modules()]
    all_gate_gradients(model, "aa", batch(3), loss_of(model))
    with pytest.raises(RuntimeError, match="inside the loss"):
        all_gate_gradients(model, "aa", batch(3), lambda inputs: (_ for _ in ()).throw(RuntimeError("inside the loss")))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {id(m.router) for m in model.modules() if isinstance(m, AttachedLinear)} == routers
    assert all(m.activation == "gelu" for name, m in model.named_modules() if name.endswith("0.output.dense"))


def test_half_precision_sums_in_float32():
    """In bfloat16, too, a gate's gradient is summed over tokens in float32."""
    model = masked_model().to(torch.bfloat16)
    found = all_gate_gradients(model, "aa", batch(4), lambda inputs: model(**inputs)[0].float().square().mean((1, 2)))
    assert all(sums.dtype == torch.float64 and bool(sums.isfinite().all()) for sums in found.absolute.values())


def test_bad_input():
    """Subnetworks over weights only, and a loss that is not finite, are refused."""
    weights = {"encoder.layer.0.intermediate.dense": torch.ones(1, 20, 24, dtype=torch.bool)}
    only_weights = fm.attach(tiny("bert"), fm.Subnetworks(["a"], weights=weights))
    with pytest.raises(ValueError, match="only weights"):
        all_gate_gradients(only_weights, "a", batch(2), loss_of(only_weights))
    model = masked_model()
    with pytest.raises(FloatingPointError, match="scoring 'aa'"):
        all_gate_gradients(model, "aa", batch(2), lambda inputs: model(**inputs)[0].mean((1, 2)) * float("inf"))
