"""Importance scores and iterative pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertModel,
    MBartConfig,
    MBartForConditionalGeneration,
)

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models.structure import structure_of
from fastmask.subnetworks import Subnetworks

LAYERS, HEADS, FFN = 2, 4, 12


@pytest.fixture
def model():
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def data(n=7, length=5, seed=1):
    return torch.randint(1, 30, (n, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model):
    target = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    return lambda ids: ((model(input_ids=ids)[0] - target) ** 2).mean((1, 2))


def literal_importance(model, ids, heads, neurons):
    """Slow and obvious: one sentence at a time, gates multiplied in by hooks on the plain model."""
    totals = {"heads": torch.zeros(LAYERS, HEADS).double(), "neurons": torch.zeros(LAYERS, FFN).double()}
    target = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    for sentence in ids:
        head_gates = heads.double().requires_grad_()
        neuron_gates = neurons.double().requires_grad_()
        handles = []
        for index, layer in enumerate(model.encoder.layer):
            for module, gates in ((layer.attention.output.dense, head_gates), (layer.output.dense, neuron_gates)):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, g=gates, i=index: (
                            args[0] * g[i].repeat_interleave(args[0].shape[-1] // g.shape[1]),
                        )
                    )
                )
        loss = ((model(input_ids=sentence[None])[0] - target) ** 2).mean()
        for total, grad in zip(totals.values(), torch.autograd.grad(loss, (head_gates, neuron_gates)), strict=True):
            total += grad.abs()
        for handle in handles:
            handle.remove()
    for total, keep in zip(totals.values(), (heads, neurons), strict=True):
        total *= keep
    return {kind: total / total.norm(dim=1, keepdim=True) for kind, total in totals.items()}


def test_equals_the_literal_definition(model):
    """The score of a unit is the mean over sentences of |dL/dxi|, even if other units are skipped."""
    subnets = Subnetworks.random(model.config, ["a", "b"], 0.5, seed=3, units="both")
    ids = data()
    expected = literal_importance(copy.deepcopy(model).eval(), ids, subnets.heads[1], subnets.neurons[1])
    fm.attach(model, subnets)
    scores = importance(model, ids.split(3), loss_of(model), "b")
    torch.testing.assert_close(scores["heads"].double(), expected["heads"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores["neurons"].double(), expected["neurons"], rtol=1e-5, atol=1e-6)


def test_does_not_depend_on_the_batch_size(model):
    """Scores do not depend on how sentences fall into batches, as those of published code do."""
    fm.attach(model, Subnetworks.full(model.config, ["a"], units="both"))
    ids = data()
    one, three, seven = (importance(model, ids.split(size), loss_of(model), "a") for size in (1, 3, 7))
    for other in (three, seven):
        torch.testing.assert_close(one["heads"], other["heads"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one["neurons"], other["neurons"], rtol=1e-5, atol=1e-6)


def test_leaves_the_model_as_it_was(model):
    """Scoring leaves no gradients, frozen parameters, hooks or eval mode behind."""
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    model.train()
    fm.attach(model, Subnetworks.full(model.config, ["a"]))
    importance(model, [data()], loss_of(model), "a")
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    trainable = [p.requires_grad for p in model.parameters()]
    assert trainable.count(False) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_prunes_to_tau(model):
    """Pruning stops at tau: here the metric is a known function of the live heads."""
    rounds = []

    def metric(name):
        subnets = model._fastmask.subnets
        live = int(subnets.heads[subnets.index(name)].sum())
        return {8: 100.0, 7: 99.0, 6: 97.0, 5: 90.0}[live]

    found = fm.discover(
        model, {"a": [data()], "b": [data(seed=2)]}, loss_of(model), metric, tau=0.95, on_round=rounds.append
    )
    assert found.languages == ("a", "b")
    assert found.heads.sum((1, 2)).tolist() == [6, 6]
    assert [(r.language, r.units["heads"], r.kept) for r in rounds[:4]] == [
        ("a", 8, True),
        ("a", 7, True),
        ("a", 6, True),
        ("a", 5, False),
    ]
    assert type(model).__module__.startswith("transformers.")


def test_drops_the_least_important_first(model):
    """A head that provably does nothing is dropped first."""
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight[:, 4:8] = 0  # head 1 of layer 1
        model.encoder.layer[0].output.dense.weight[:, [2, 9]] = 0
    found = fm.discover(model, {"a": [data()]}, loss_of(model), units="both", density=0.9)
    assert not found.heads[0, 1, 1]
    assert not found.neurons[0, 0, [2, 9]].any()


@pytest.mark.parametrize("density", [0.5, 0.25, 0.01])
def test_prunes_to_density_with_a_floor(model, density):
    """A subnetwork has the size that was asked for, and at least one head in each layer."""
    found = fm.discover(model, {"a": [data()]}, loss_of(model), units="both", density=density)
    assert found.heads.sum() == max(LAYERS, round(density * LAYERS * HEADS))
    assert found.neurons.sum() == max(LAYERS, round(density * LAYERS * FFN))
    assert (found.heads.sum(-1) >= 1).all()
    assert (found.neurons.sum(-1) >= 1).all()


def test_prunes_down_to_the_floor_when_the_metric_never_falls(model):
    """Where tau is never reached, pruning ends at one unit in each layer."""
    found = fm.discover(model, {"a": [data()]}, loss_of(model), lambda name: 1.0, drop=0.4)
    assert found.heads.sum(-1).tolist() == [[1, 1]]


def test_same_data_same_masks(model):
    """Discovery must not depend on the random state, nor change it."""
    state = torch.get_rng_state()
    first = fm.discover(model, {"a": [data()]}, loss_of(model), density=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert fm.discover(model, {"a": [data()]}, loss_of(model), density=0.5) == first


def test_without_development_data_the_loss_decides(model):
    """A language without development data must go by its loss, under that name, as far as tau lets the loss rise."""
    rounds = []

    def losses(ids):
        live = int(model._fastmask.subnets.heads[0].sum())
        return loss_of(model)(ids) * 0 + {8: 2.0, 7: 2.02, 6: 2.05}.get(live, 2.06)

    dev = {"b": 50.0}
    found = fm.discover(model, {"a": [data()], "b": [data()]}, losses, dev.get, tau=0.95, on_round=rounds.append)
    assert found.heads.sum((1, 2)).tolist() == [6, 2]  # -ln(0.95) = 0.0513; the metric of b never falls
    of_a = [(r.units["heads"], r.value, r.by_loss, r.kept) for r in rounds if r.language == "a"]
    assert of_a == [
        (8, pytest.approx(2.0), True, True),
        (7, pytest.approx(2.02), True, True),
        (6, pytest.approx(2.05), True, True),
        (5, pytest.approx(2.06), True, False),
    ]
    assert all((r.value, r.by_loss) == (50.0, False) for r in rounds if r.language == "b")
    rounds.clear()
    fm.discover(model, {"a": [data()]}, loss_of(model), density=0.5, on_round=rounds.append)
    assert all((r.value, r.by_loss) == (None, False) for r in rounds)


def test_the_loss_is_that_of_the_masked_model(model):
    """The loss that decides must be the mean over the scoring examples, of the network with masked weights."""
    rounds, plain = [], copy.deepcopy(model).eval()
    model.train()
    batches = {"a": data().split([3, 4])}
    found = fm.discover(model, batches, loss_of(model), lambda name: None, units="both", on_round=rounds.append)
    assert 0 < found.heads.sum() < LAYERS * HEADS
    with torch.no_grad():
        for index, layer in enumerate(plain.encoder.layer):
            layer.attention.output.dense.weight *= found.heads[0, index].repeat_interleave(16 // HEADS)
            layer.output.dense.weight *= found.neurons[0, index]
        expected = float(loss_of(plain)(data()).mean())
    last = [round for round in rounds if round.kept][-1]
    assert last.by_loss
    assert last.value == pytest.approx(expected, rel=1e-10)
    assert model.training
    assert type(model).__module__.startswith("transformers.")


def test_scores_are_the_last_ones(model):
    """A unit's score must be the one it was dropped by, or the last one it survived."""
    scores = {}
    found = fm.discover(model, {"a": [data()]}, loss_of(model), density=0.5, drop=0.2, on_scores=scores.__setitem__)
    assert [*scores["a"]] == ["heads"]
    keep = torch.ones(1, LAYERS, HEADS, dtype=torch.bool)
    literal = torch.zeros(LAYERS, HEADS)
    while keep.sum() > 4:
        fm.attach(model, Subnetworks(["a"], keep))
        now = importance(model, [data()], loss_of(model), "a")["heads"]
        fm.detach(model)
        literal = torch.where(keep[0], now, literal)
        worst = now.masked_fill(~keep[0] | (now == now.masked_fill(~keep[0], -1).amax(1, keepdim=True)), torch.inf)
        keep = keep.clone()
        keep.view(-1)[worst.flatten().argmin()] = False
    assert torch.equal(keep, found.heads)
    torch.testing.assert_close(scores["a"]["heads"], literal)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0}, ValueError, "tau must be"),
        ({"tau": 0.9, "metric": None}, ValueError, "needs a development metric"),
        ({"density": 2.0}, ValueError, "density must be"),
        ({"drop": 1.0}, ValueError, "drop must be"),
        ({"units": "layers"}, KeyError, "unknown kind of unit"),
        ({"score": "gradients"}, KeyError, "unknown score 'gradients'; did you mean 'gradient'"),
        ({"score": "entropy"}, ValueError, "compares languages: expected two or more, given a"),
        ({"score": "entropy", "batches": {"a": [data()], "b": []}}, ValueError, "no batch to score the units of 'b'"),
        ({"score": "shapley", "units": "both"}, ValueError, "takes too long for neurons"),
        ({"score": "shapley", "batches": {"a": []}}, ValueError, "no batch to score"),
        ({"batches": {}}, ValueError, "no language"),
        ({"batches": {"a": []}}, ValueError, "no batch to score"),
    ],
)
def test_bad_options(model, options, error, message):
    """A wrong option is refused."""
    arguments = {"batches": {"a": [data()]}, "metric": lambda name: 1.0, **options}
    with pytest.raises(error, match=message):
        fm.discover(model, arguments.pop("batches"), loss_of(model), arguments.pop("metric"), **arguments)
    assert type(model).__module__.startswith("transformers.")


def albert():
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 4}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=30, num_hidden_layers=3, **sizes)).double().eval()


def mbart():
    torch.manual_seed(0)
    config = MBartConfig(vocab_size=30, d_model=16, max_position_embeddings=16)
    for side in ("encoder", "decoder"):
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 12)):
            setattr(config, f"{side}_{name}", size)
    return MBartForConditionalGeneration(config).double().eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "options"), [(albert, {}), (mbart, {"use_cache": True}), (mbart, {})], ids=["shared", "slots", "packed"]
)
def test_scores_of_layers_that_are_shared_and_of_units_in_their_slots(make, options):
    """A layer that runs several times in a pass would be refused; units that a cache keeps apart, taken for others.

    A gate multiplies what a unit hands on, so its derivative is that of the weights behind the unit, times these.
    """
    model = make()
    subnets = fm.Subnetworks.random(model, ["a", "b"], 0.5, seed=1, units="both")
    tokens = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(2))
    structure, wanted = structure_of(model), {"heads": [], "neurons": []}
    plain = fm.merge(fm.attach(copy.deepcopy(model), subnets), "b")
    for kind, layers in wanted.items():
        for group in structure.groups(kind):
            weight = plain.get_submodule(group.columns[0]).weight
            scores = torch.zeros(group.units, dtype=torch.float64)
            for row in range(3):
                (dw,) = torch.autograd.grad(plain(tokens[row : row + 1]).logits.square().mean(), weight)
                scores += (dw * weight).sum(0).view(group.units, -1).sum(1).abs().detach()
            layers.append(scores / scores.norm())
    fm.attach(model, subnets)
    found = importance(model, [0], lambda _: model(tokens, **options).logits.square().mean((1, 2)), "b")
    torch.testing.assert_close(found["heads"].double(), torch.stack(wanted["heads"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["neurons"].double(), torch.stack(wanted["neurons"]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="it ran it 2 times"):
        importance(model, [0], lambda _: (model(tokens).logits + model(tokens).logits).square().mean((1, 2)), "b")


def test_rounds_towards_a_density_are_of_one_size(model):
    """A small remainder does not cost a round of its own, and both kinds of units reach their size together."""
    rounds = []
    fm.discover(model, {"a": [data()]}, loss_of(model), units="both", density=0.4, drop=0.27, on_round=rounds.append)
    # 5 of 8 heads and 14 of 24 neurons go, about 2 and 6 a round: two rounds, where full steps would need three.
    assert [(of.number, of.units) for of in rounds] == [
        (1, {"heads": 5, "neurons": 17}),
        (2, {"heads": 3, "neurons": 10}),
    ]
    rounds.clear()
    fm.discover(model, {"a": [data()]}, loss_of(model), units="neurons", density=0.5, on_round=rounds.append)
    assert [of.units["neurons"] for of in rounds] == [20, 16, 12]  # a fifth of 24 each, towards a density
    rounds.clear()
    fm.discover(model, {"a": [data()]}, loss_of(model), lambda _: 1.0, units="neurons", on_round=rounds.append)
    assert [of.units["neurons"] for of in rounds[:3]] == [24, 22, 20]  # a tenth, down to tau
    rounds.clear()
    found = fm.discover(model, {"a": [data()]}, loss_of(model), density=1.0, on_round=rounds.append)
    assert not rounds
    assert found.heads.all()


def test_scores_that_are_not_finite_are_refused(model):
    """A loss that is not a number does not end as the full network."""
    loss = loss_of(model)
    with pytest.raises(FloatingPointError, match="de: scores of heads are not finite"):
        fm.discover(model, {"de": [data()]}, lambda ids: loss(ids) * float("nan"), density=0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_metric_that_says_nothing(model, value):
    """A share of a metric that is not above 0 is no bound: pruning stops by the loss, as without a metric."""
    wanted = fm.discover(model, {"de": [data()]}, loss_of(model), metric=lambda name: None, units="both")
    with pytest.warns(UserWarning, match="de: the metric of the full network is .* pruning goes by the loss"):
        found = fm.discover(model, {"de": [data()]}, loss_of(model), metric=lambda name: value, units="both")
    assert found == wanted


def test_a_density_is_of_the_units_that_there_are(model):
    """Layers with different numbers of heads: half of five heads are two or three."""
    keep = torch.ones(1, LAYERS, HEADS, dtype=torch.bool)
    keep[0, 1, 1:] = False
    small = fm.extract(fm.attach(model, Subnetworks(["x"], heads=keep)), "x")
    found = fm.discover(small, {"de": [data()]}, loss_of(small), density=0.5)
    assert int(found.heads.sum()) in (2, 3)
