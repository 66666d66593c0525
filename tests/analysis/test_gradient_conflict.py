"""Gradient conflict: gradients of parameters and their products, against literal dense gradients of every language."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, tiny
from torch import nn

import fastmask as fm
from fastmask.analysis.conflict import gradients_of, products

LANGUAGES = ["aa", "bb", "cc"]


def loss_of(model):
    labels = torch.randint(0, 2, (20, 7), generator=torch.Generator().manual_seed(8))

    def loss(inputs):
        logits = model(**inputs).logits
        return F.cross_entropy(logits.transpose(1, 2), labels[: len(logits)], reduction="none").mean(1)

    return loss


def data(batches=2):
    """Batches of unequal sizes, other tokens in each."""
    found = {}
    for row, name in enumerate(LANGUAGES):
        found[name] = []
        for number in range(batches):
            inputs = batch(3 + number + row)
            inputs["input_ids"] = (inputs["input_ids"] * (row + 2) + 3 * number) % 45 + 5
            found[name].append(inputs)
    return found


def attached_model(model_type="bert", units="both"):
    model = tiny(model_type, "tokens")
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units=units))


HALVES = (slice(0, None, 2), slice(1, None, 2))


def literal_gradients(model, batches, name, part=slice(None)):
    """Dense gradient of one language's mean loss: {parameter: gradient}."""
    loss = loss_of(model)
    with fm.language(model, name):
        losses = torch.cat([loss(b) for b in batches[name][part]])
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def owned(model, row):
    """{parameter: bool} of what one language owns of the masked parameters."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, fm.MaskedLinear):
            keep = module.mask.to_dense()[row]
            found[f"{name}.weight"] = keep.t() if module.transposed else keep
            if module.mask.kind == "rows" and module.bias is not None:
                found[f"{name}.bias"] = keep[:, 0]
    return found


@pytest.mark.parametrize("units", ["heads", "both"])
@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_equals_literal_dense_gradients(model_type, units):
    """Cosines and shares of conflict are those of the languages' dense gradients."""
    model, batches = attached_model(model_type, units), data()
    result = fm.analysis.gradient_conflict(model, loss_of(model), batches)
    dense = [literal_gradients(model, batches, name) for name in LANGUAGES]
    halves = [[literal_gradients(model, batches, name, part) for part in HALVES] for name in LANGUAGES]
    encoder = {f"{model.base_model_prefix}.{n}" for n, _ in model.base_model.named_parameters()}
    keeps = [owned(model, row) for row in range(3)]
    exact = 1e-7 if model_type == "llama" else 1e-10  # Llama's norms compute in float32, whatever comes in
    layer_1 = {"bert": ".layer.1.", "llama": ".layers.1.", "gpt2": ".h.1."}[model_type]

    def vectors(scope, i, j, of_i, of_j):
        both = []
        for grads in (of_i, of_j):
            chosen = []
            for name, grad in grads.items():
                if (scope == "encoder" and name not in encoder) or (scope == "layer 1" and layer_1 not in name):
                    continue
                if scope == "shared":
                    if name not in keeps[0]:
                        continue
                    grad = grad[keeps[i][name] & keeps[j][name]]
                chosen.append(grad.flatten())
            both.append(torch.cat(chosen))
        return both

    for scope in ("all", "encoder", "shared", "layer 1"):
        for i, j in itertools.combinations(range(3), 2):
            a, b = vectors(scope, i, j, dense[i], dense[j])
            cosines = [
                F.cosine_similarity(*vectors(scope, i, j, halves[i][first], halves[j][1 - first]), 0)
                for first in (0, 1)
            ]
            t = result.table
            row = t[(t.scope == scope) & (t.language_a == LANGUAGES[i]) & (t.language_b == LANGUAGES[j])].iloc[0]
            product, here = a * b, (a != 0) & (b != 0)
            assert row.cosine == pytest.approx(float(sum(cosines)) / 2, abs=exact), scope
            # A key's bias shifts all scores of a query alike: its gradient is rounding, and so are its signs.
            noise = int(((a.abs() < 1e-14) & (a != 0) | (b.abs() < 1e-14) & (b != 0)).sum())
            assert noise <= 24 * 2
            assert abs(row.coordinates - int(here.sum())) <= noise
            assert abs(row.conflict * row.coordinates - int((product[here] < 0).sum())) <= noise + 1e-6


def test_one_language_with_itself():
    """A language's agreement with itself is the cosine of its even and odd batches."""
    model, batches = attached_model(), data(batches=3)
    found = fm.analysis.gradient_conflict(model, loss_of(model), batches).more["languages"]
    for name in LANGUAGES:
        row = found[(found.scope == "all") & (found.language == name)].iloc[0]
        even, odd = (
            torch.cat([g.flatten() for g in literal_gradients(model, batches, name, part).values()]) for part in HALVES
        )
        assert row.split_half == pytest.approx(float(F.cosine_similarity(even, odd, 0)))
        assert (row.examples, row.batches) == (sum(len(b["input_ids"]) for b in batches[name]), 3)


def test_equal_gradients_agree_fully():
    """They have cosine 1 and no conflict; a model without subnetworks has no weights that both own."""
    model, batches = fm.detach(attached_model()), data(batches=1)
    result = fm.analysis.gradient_conflict(model, loss_of(model), {name: batches["aa"] * 2 for name in LANGUAGES})
    assert np.allclose(result.table.cosine, 1)
    assert np.allclose(result.more["languages"].split_half, 1)
    assert (result.table.conflict == 0).all()
    assert "shared" not in set(result.table.scope)


def test_leaves_the_model_as_it_was():
    """Gradients, mode and hooks are unchanged, so it can run in the middle of training."""
    model, batches = attached_model().train(), data()
    loss = loss_of(model)
    with fm.language(model, "aa"):
        loss(batches["aa"][0]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fm.analysis.gradient_conflict(model, loss, batches)
    assert model.training
    assert {name for name, p in model.named_parameters() if p.grad is not None} == before.keys()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
    assert not any(module._forward_hooks for module in model.modules())


class Tangle(nn.Module):
    """A weight used twice, an embedding tied to the output, one with a padding index, and a part that is not used."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 6, padding_idx=0), nn.Embedding(10, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 30)
        self.out.weight = self.words.weight
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        a = self.first(x).tanh()
        b = self.second(a).tanh() * self.scale
        return self.out(self.first(b) + a).logsumexp(2).mean(1)


@pytest.mark.parametrize("held", [1, 4000, 2**40], ids=["one parameter at a time", "some", "all"])
def test_gradients_equal_backward(held, monkeypatch):
    """However many parameters are differentiated together, every gradient must be whole, in its rows and halves."""
    monkeypatch.setattr("fastmask.analysis.conflict.HELD", held)
    torch.manual_seed(1)
    net = Tangle().double()
    generator = torch.Generator().manual_seed(2)
    samples = {name: [torch.randint(0, 30, (4, 5), generator=generator) for _ in range(3)] for name in LANGUAGES[:2]}
    found = {}
    for name, rows, gradients in gradients_of(net, lambda _, ids: net(ids).sum(), samples):
        assert name not in found
        found[name] = rows, gradients
    assert len(found["places.weight"][0]) == 5  # only rows that were looked up
    for place, batches in enumerate(samples.values()):
        for half in (0, 1):
            net.zero_grad()
            sum(net(ids).sum() for ids in batches[half::2]).backward()
            for name, parameter in net.named_parameters():
                if parameter.grad is None:
                    assert name not in found
                    continue
                rows, gradients = found[name]
                whole = torch.zeros(parameter.shape[0] if parameter.ndim else 1, gradients.shape[3]).double()
                whole[rows] = gradients[place, half]
                torch.testing.assert_close(whole.view_as(parameter), parameter.grad, rtol=1e-9, atol=1e-12)


def test_holds_as_much_as_it_may(monkeypatch):
    """The gradients of all languages must not be alive for the whole model at once, or large models need too much."""
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])
    monkeypatch.setattr("fastmask.analysis.conflict.HELD", 5 * 2 * (16 * 16 + 16) * 4)  # of one layer
    batches = {name: [torch.full((2, 16), v + 1.0)] * 2 for v, name in enumerate("abcde")}
    alive: list = []
    for name, _, gradients in gradients_of(net, lambda _, x: net(x).sum(), batches):
        if name.endswith("weight"):
            alive = [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(gradients))
            assert len(alive) <= 2, name


def test_products_in_chunks(monkeypatch):
    """However many coordinates are summed at a time, the sums must be those of all of them."""
    gradients = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    owned = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = products(gradients, owned)
    monkeypatch.setattr("fastmask.analysis.conflict.CHUNK", 7)
    np.testing.assert_allclose(products(gradients, owned), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"aa": d["aa"]}, "two languages or more"),
        (lambda d: {**d, "bb": []}, "language 'bb' has 0 batches .expected two or more"),
        (lambda d: {**d, "bb": d["bb"][:1]}, "language 'bb' has 1 batches .expected two or more"),
        (lambda d: {**d, "aab": d["aa"]}, "unknown language 'aab'; did you mean 'aa'"),
    ],
)
def test_bad_input(change, message):
    """Bad input is refused before anything is computed."""
    model = attached_model()
    with pytest.raises((ValueError, KeyError), match=message):
        fm.analysis.gradient_conflict(model, loss_of(model), change(data()))


def test_loss_of_another_shape():
    """A loss that is not one number for each example is refused."""
    model = attached_model()
    with pytest.raises(ValueError, match="one loss for each example"):
        fm.analysis.gradient_conflict(model, lambda b: loss_of(model)(b).mean(), data())
