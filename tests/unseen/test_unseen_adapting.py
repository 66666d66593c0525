"""Steps on a support set: the right ones, on live slices only, and undone to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmask as fm
from fastmask.tasks.parsing.task import Parsing
from fastmask.unseen import AdaptationDiverged, adapted
from tests.tasks.toy_parser import small_parser
from tests.unseen.toy_unseen import assert_same_bits, bits_of, parser_with_subnets, support_of

RATES = {"head_lr": 0.1, "encoder_lr": 0.03}
BELOW = ("encoder.", "trigrams.", "upos.", "root")


def literal(parser, number, optimizer, steps, rates, support):
    """The same steps by a torch optimizer on a copy that is masked by zeroing gradients, and multiplied by masks.

    Heads and neurons that are dead get no gradient in an attached model, so a copy of it will do; only the optimizer
    is torch's own, over all parameters, dense.
    """
    parser = copy.deepcopy(parser)
    below = [p for name, p in parser.named_parameters() if name.startswith(BELOW) and p.requires_grad]
    heads = [p for name, p in parser.named_parameters() if not name.startswith(BELOW)]
    groups = [{"params": below, "lr": rates["encoder_lr"]}, {"params": heads, "lr": rates["head_lr"]}]
    make = {"sgd": torch.optim.SGD, "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0)}[optimizer]
    chosen = make(groups)
    batch = parser.features.collate(support)
    batch.language_ids = torch.full((len(batch.lengths),), number)
    losses = []
    for _ in range(steps):
        chosen.zero_grad()
        loss = parser(batch).loss
        loss.backward()
        chosen.step()
        losses.append(loss.detach())
    return parser, torch.stack(losses)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("number", [1, 3, -1])
def test_the_steps_of_torch(optimizer, number):
    """Steps are those of torch's optimizer, with each group's own rate."""
    parser, _ = parser_with_subnets()
    support = support_of(parser, times=3)
    before = bits_of(parser)
    rates = {"head_lr": 0.01, "encoder_lr": 0.003}
    expected, expected_losses = literal(parser, number, optimizer, 4, rates, support)
    with adapted(Parsing(parser), support, number, steps=4, optimizer=optimizer, **rates) as losses:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)
        assert not losses.requires_grad
        changed = 0
        for name, value in parser.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-9, atol=1e-9, msg=name)
            changed += not torch.equal(value, before[name])
        assert changed > 20
    assert_same_bits(parser, before)


def test_sgd_is_the_inner_loop_of_meta_learning():
    """Few-shot evaluation takes the steps that meta-learning prepares for."""
    parser, _ = parser_with_subnets()
    support = support_of(parser)
    batch = parser.features.collate(support)
    rates = {"encoder": 0.03, "trigrams": 0.03, "upos": 0.03, "root": 0.03, "": 0.1}
    learner = fm.MetaLearner(parser, lambda batch: parser(batch).loss, inner_learning_rate=rates)
    with learner.adapt("bb", [batch], steps=3) as expected_losses:
        expected = bits_of(parser)
    with adapted(Parsing(parser), support, 1, steps=3, **RATES) as losses:
        assert losses.equal(expected_losses)
        assert_same_bits(parser, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_dead_units_keep_their_bits(optimizer):
    """No step moves the weights of a head or neuron that the language does not own."""
    parser, subnets = parser_with_subnets()
    before = bits_of(parser)
    with adapted(Parsing(parser), support_of(parser), 0, steps=3, optimizer=optimizer, **RATES):
        layer = "encoder.encoder.layer.0."
        dead = ~subnets.neurons[0, 0]
        for name, part in ((f"{layer}intermediate.dense.weight", dead), (f"{layer}intermediate.dense.bias", dead)):
            now, then = parser.state_dict()[name], before[name]
            assert torch.equal(now[part], then[part])
            assert not torch.equal(now[~part], then[~part])
        now, then = (state[f"{layer}output.dense.weight"] for state in (parser.state_dict(), before))
        assert torch.equal(now[:, dead], then[:, dead])
        assert not torch.equal(now[:, ~dead], then[:, ~dead])
    assert_same_bits(parser, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_of_the_caller(optimizer):
    """What stands in `.grad` stays there, and does not count."""
    parser, _ = parser_with_subnets()
    support = support_of(parser)
    with adapted(Parsing(parser), support, 0, steps=2, optimizer=optimizer, **RATES):
        expected = bits_of(parser)
    given = {name: torch.ones_like(p) for name, p in parser.named_parameters() if name.startswith("arcs.")}
    for name, gradient in given.items():
        parser.get_parameter(name).grad = gradient
    with adapted(Parsing(parser), support, 0, steps=2, optimizer=optimizer, **RATES):
        assert_same_bits(parser, expected)
        for name, parameter in parser.named_parameters():
            assert parameter.grad is given.get(name)
            assert name not in given or bool((given[name] == 1).all())


def test_kept_unless_something_goes_wrong():
    """Weights are kept where that was asked for, and put back after a failed evaluation."""
    parser, _ = parser_with_subnets()
    support, before = support_of(parser), bits_of(parser)
    with pytest.raises(ZeroDivisionError), adapted(Parsing(parser), support, 0, steps=2, keep=True, **RATES):
        raise ZeroDivisionError
    assert_same_bits(parser, before)
    with adapted(Parsing(parser), support, 0, steps=2, keep=True, **RATES):
        inside = bits_of(parser)
    assert_same_bits(parser, inside)
    assert not torch.equal(inside["arcs.bilinear.weight"], before["arcs.bilinear.weight"])


def test_dropout():
    """Dropout is off; the caller's random numbers and the modes are left as they were."""
    parser, _ = parser_with_subnets(dropout=0.3)
    support = support_of(parser)
    parser.train()
    parser.labels.eval()
    modes = [module.training for module in parser.modules()]
    state = torch.get_rng_state()

    def losses():
        with adapted(Parsing(parser), support, 0, steps=3, **RATES) as found:
            assert [module.training for module in parser.modules()] == modes
            return found

    assert losses().equal(losses())
    assert [module.training for module in parser.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 6])
def test_divergence_leaves_the_model(optimizer, steps):
    """A learning rate that is far too high leaves the model as it was, even if only the last step breaks it."""
    parser, _ = parser_with_subnets()
    before = bits_of(parser)
    rates = {"head_lr": 1e200, "encoder_lr": 1e200}
    with (
        pytest.raises(AdaptationDiverged, match=rf"after 1 of {steps} steps of {optimizer} .*choose lower ones"),
        adapted(Parsing(parser), support_of(parser), 0, steps=steps, optimizer=optimizer, keep=True, **rates),
    ):
        pass
    assert_same_bits(parser, before)


def test_without_subnetworks_and_without_steps():
    """A parser without masks can be adapted, and no steps at all are allowed."""
    parser = small_parser()
    before = bits_of(parser)
    with adapted(Parsing(parser), support_of(parser), -1, steps=2, head_lr=1e-4, encoder_lr=1e-4) as losses:
        assert losses.shape == (2,)
        assert losses[1] < losses[0]
    with adapted(
        Parsing(parser), support_of(parser).select(torch.zeros(0).long().numpy()), -1, steps=0, **RATES
    ) as losses:
        assert losses.shape == (0,)
    assert_same_bits(parser, before)


def test_what_is_wrong():
    parser, _ = parser_with_subnets()
    support, before = support_of(parser), bits_of(parser)
    empty = support.select(torch.zeros(0).long().numpy())
    plain = small_parser()
    for given, number, options, kind, message in (
        (parser, 0, {"optimizer": "adam"}, KeyError, "did you mean 'adamw'"),
        (parser, 4, {}, ValueError, "expected 0 to 3, or -1"),
        (parser, -2, {}, ValueError, "expected 0 to 3, or -1"),
        (parser, 0, {"steps": -1}, ValueError, "number of steps is -1"),
        (parser, 0, {"head_lr": -0.1}, ValueError, "inner learning rate of '' is -0.1"),
        (parser, 0, {"head_lr": 0.0, "encoder_lr": 0.0}, ValueError, "no parameter would be adapted"),
        (plain, 0, {}, ValueError, "no subnetworks attached"),
    ):
        arguments = {"steps": 2, **RATES, **options}
        with pytest.raises(kind, match=message), adapted(Parsing(given), support, number, **arguments):
            pass
    with pytest.raises(ValueError, match="no support example"), adapted(Parsing(parser), empty, 0, steps=1, **RATES):
        pass
    assert_same_bits(parser, before)
