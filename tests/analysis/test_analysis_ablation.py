"""Ablation of single units against the plain model with masked weights."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from covering import covering
from literal_gates import literal_gradients
from tiny_models import batch, multiplied, tiny

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models.attach import attached

LANGUAGES = ["aa", "bb"]
TARGET = torch.randn(24, generator=torch.Generator().manual_seed(2)).double()


def loss_of(model):
    return lambda inputs: ((model(**inputs)[0] - TARGET) ** 2).mean((1, 2))


def setting(model_type="bert", units="both", density=0.5):
    model = tiny(model_type)
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, density, seed=3, units=units))
    sizes = {"aa": [3, 2], "bb": [4]}
    batches = {name: [batch(size, 5 + at) for at, size in enumerate(given)] for name, given in sizes.items()}
    return model, batches


def literal_change(model, batches, name, units, layer, unit):
    """Change of the loss of the plain model, weights multiplied by masks, when one unit is flipped."""
    subnets = attached(model).subnets
    plain = fm.detach(copy.deepcopy(model))
    flipped = getattr(subnets, units).clone()
    row = subnets.index(name)
    flipped[row, layer, unit] ^= True
    masks = {"heads": subnets.heads, "neurons": subnets.neurons}
    other = fm.Subnetworks(subnets.languages, **{**masks, units: flipped})
    losses = []
    for masks_used in (other, subnets):
        outputs = [multiplied(plain, masks_used, b, [row] * len(b["input_ids"])) for b in batches[name]]
        losses.append(torch.cat([((y - TARGET) ** 2).mean((1, 2)) for y in outputs]))
    return (losses[0] - losses[1]).detach()


def test_a_language_that_owns_everything_runs_under_its_name():
    """What else it has, as a vector, is found by its id; others run the full network."""
    model, batches = setting()
    subnets = attached(fm.detach(model) and fm.attach(model, attached_masks(all_of="aa"))).subnets
    assert subnets.heads[0].all()
    assert not subnets.heads[1].all()
    ran = {"aa": set(), "bb": set()}

    def loss(inputs):
        name = "aa" if any(inputs is given for given in batches["aa"]) else "bb"
        ran[name].add(attached(model).router.default.get())
        return loss_of(model)(inputs)

    fm.analysis.ablation(model, loss, batches)
    assert ran == {"aa": {0}, "bb": {-1}}


def attached_masks(all_of):
    subnets = fm.Subnetworks.random(tiny("bert").config, LANGUAGES, 0.5, seed=3, units="both")
    row = subnets.index(all_of)
    heads, neurons = subnets.heads.clone(), subnets.neurons.clone()
    heads[row] = neurons[row] = True
    return fm.Subnetworks(LANGUAGES, heads=heads, neurons=neurons)


@pytest.mark.parametrize(
    ("model_type", "units"),
    covering(["bert", "roberta", "distilbert", "llama", "qwen3"], ["heads", "neurons"]),
)
def test_equals_masked_weights(model_type, units):
    """Flipping a unit costs what a mask with that unit flipped costs the plain model."""
    model, batches = setting(model_type)
    result = fm.analysis.ablation(model, loss_of(model), batches, units=units)
    size = getattr(attached(model).subnets, units).shape[2]
    assert len(result.table) == 2 * 2 * size
    exact = 1e-6 if model_type in ("llama", "qwen3") else 1e-10  # their norms compute in float32
    chosen = result.table if units == "heads" else result.table.iloc[::7]
    for row in chosen.itertuples():
        expected = literal_change(model, batches, row.language, units, row.layer, row.unit)
        assert row.change == pytest.approx(float(expected.mean()), abs=exact)
        assert row.error == pytest.approx(float(expected.std()) / len(expected) ** 0.5, abs=exact)
        owned = bool(getattr(attached(model).subnets, units)[LANGUAGES.index(row.language), row.layer, row.unit])
        assert row.owned == owned
        assert row.worth == (row.change if owned else -row.change)
    assert result.table.change.abs().max() > 1e-4


def test_scores_are_those_of_pruning_and_the_first_order_estimate():
    """The scores compared with the measured losses are those that pruning goes by."""
    model, batches = setting(density=0.75)
    result = fm.analysis.ablation(model, loss_of(model), batches)
    table = result.table
    scores = importance(model, batches["aa"], loss_of(model), "aa")["heads"]
    for row in table[(table.language == "aa") & table.owned].itertuples():
        assert row.score == pytest.approx(float(scores[row.layer, row.unit]), rel=1e-5)
    # A unit that is nearly nothing: the loss is linear in its gate, and the estimate is exact.
    layer = model.get_submodule("encoder.layer.1.attention.output.dense")
    with torch.no_grad():
        layer.weight *= 1e-5
    small = fm.analysis.ablation(model, loss_of(model), batches).table
    small = small[small.layer == 1]
    assert small.worth.abs().max() > 1e-9
    np.testing.assert_allclose(small.predicted, small.worth, rtol=1e-2, atol=1e-10)


@pytest.mark.parametrize("units", ["heads", "neurons", "both"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_scores_equal_the_literal_gradients(model_type, units):
    """Gates of live and dead units, and of groups of query heads, get the gradient of their definition."""
    model, batches = setting(model_type, units)
    plain, subnets = fm.detach(copy.deepcopy(model)), attached(model).subnets
    masks = {kind: keep[0] for kind in ("heads", "neurons") if (keep := getattr(subnets, kind)) is not None}
    grads = [literal_gradients(plain, inputs, masks) for inputs in batches["aa"]]
    for kind, keep in masks.items():
        table = fm.analysis.ablation(model, loss_of(model), batches, units=kind).table
        table = table[table.language == "aa"]
        of_kind = torch.cat([of_batch[kind] for of_batch in grads])
        score = of_kind.abs().mean(0)
        score /= (score * keep).norm(dim=1, keepdim=True)
        places = list(table.layer), list(table.unit)
        np.testing.assert_allclose(table.score, score[places], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(table.predicted, -of_kind.mean(0)[places], rtol=1e-10, atol=1e-10)
        assert (table.score[~table.owned] > 0).all()


def test_the_last_unit_of_a_layer():
    """Removing the only head of a layer is measured like any other removal."""
    model = tiny("bert")
    heads = torch.zeros(2, 2, 4, dtype=torch.bool)
    heads[:, :, 1] = True
    fm.attach(model, fm.Subnetworks(LANGUAGES, heads=heads))
    _, batches = setting()
    table = fm.analysis.ablation(model, loss_of(model), batches).table
    row = table[(table.language == "bb") & (table.layer == 1) & (table.unit == 1)].iloc[0]
    expected = literal_change(model, batches, "bb", "heads", 1, 1).mean()
    assert row.change == pytest.approx(float(expected), abs=1e-10)


def test_agreement_by_hand():
    """The table of agreement correlates the score with the loss that was measured."""
    model, batches = setting()
    result = fm.analysis.ablation(model, loss_of(model), batches, units="neurons")
    agreement = result.more["agreement"].set_index(["language", "group"])
    table = result.table
    mine = table[(table.language == "bb") & table.owned]
    from scipy.stats import spearmanr

    assert agreement.score_rho["bb", "owned"] == pytest.approx(spearmanr(mine.score, mine.worth).statistic)
    assert agreement.predicted_rho["bb", "owned"] == pytest.approx(spearmanr(mine.predicted, mine.worth).statistic)
    assert agreement.n["bb", "owned"] == len(mine)
    means = agreement.xs("owned", level="group").score_rho
    assert means["all"] == pytest.approx((means["aa"] + means["bb"]) / 2)


def test_leaves_the_model_as_it_was():
    """Masks, hooks and mode are unchanged after an ablation, and after one that failed."""
    model, batches = setting()
    model.train()
    subnets, ids = attached(model).subnets, torch.tensor([0, 1, 1])
    before = model(**batch(3), language_ids=ids)[0]

    calls = itertools.count()

    def fails(inputs):
        losses = loss_of(model)(inputs)
        if next(calls) == 9:  # with some of the units flipped
            raise RuntimeError("out of something")
        return losses

    for loss in (loss_of(model), fails):
        with nullcontext() if loss is not fails else pytest.raises(RuntimeError, match="out of something"):
            fm.analysis.ablation(model, loss, batches)
        assert model.training
        assert attached(model).subnets is subnets
        assert torch.equal(model(**batch(3), language_ids=ids)[0], before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_that_is_not_finite():
    """It ends the analysis, and the language is named."""
    model, batches = setting()
    with pytest.raises(FloatingPointError, match="scoring 'aa'"):
        fm.analysis.ablation(model, lambda inputs: loss_of(model)(inputs) * float("inf"), batches)


def test_masks_over_single_weights_are_refused():
    """They are not in force where every unit is computed."""
    model = tiny("bert")
    weights = {"encoder.layer.1.intermediate.dense": torch.ones(2, 20, 24, dtype=torch.bool)}
    fm.attach(model, fm.Subnetworks(LANGUAGES, torch.ones(2, 2, 4, dtype=torch.bool), weights=weights))
    with pytest.raises(ValueError, match="masks over single weights"):
        fm.analysis.ablation(model, loss_of(model), {"aa": [batch(2)]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": "head"}, "unknown masked part 'head'; did you mean 'heads'"),
        ({"units": "neurons"}, "unknown masked part 'neurons'. Known: heads"),
        ({"batches": {"ab": []}}, "unknown language 'ab'"),
        ({"batches": {"aa": []}}, "no batch of language 'aa'"),
    ],
)
def test_bad_input(change, message):
    """Bad input is refused before anything is computed."""
    model, batches = setting(units="heads")
    with pytest.raises((ValueError, KeyError), match=message):
        fm.analysis.ablation(model, loss_of(model), **{"batches": batches, **change})
