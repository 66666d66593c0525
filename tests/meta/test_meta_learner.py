"""Episodes leave theta alone whatever happens; adapting, buffers, random numbers, embeddings, half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_episodes import (
    KINDS,
    LANGUAGES,
    assert_same_bits,
    batch,
    hf_loss,
    masked_net,
    net_loss,
    net_tasks,
    parameters_of,
    token_loss,
)

import fastmask as fm
from fastmask.meta import Task
from tests.models.tiny_models import tiny


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_a_masked_weight_that_is_tied_is_put_back_whole(kind):
    """A weight that is masked in one place and whole in another is put back whole."""
    net = masked_net(kind, tied=True)
    before = parameters_of(net)
    with fm.MetaLearner(net, net_loss(net), inner_learning_rate=0.1).adapt(0, net_tasks([0])[0].support):
        dead = ~net.masked.mask.to_dense()[0]
        assert (net.masked.weight != before["masked.weight"])[dead].any()
    assert_same_bits(net, before)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_weights_survive_a_gradient_of_nan(kind):
    """An inner loop that diverges does not touch weights outside the language's copy."""
    net = masked_net(kind)
    before = parameters_of(net)
    learner = fm.MetaLearner(net, lambda sample: net_loss(net)(sample) * float("nan"), inner_learning_rate=0.1)
    with learner.adapt(0, net_tasks([0])[0].support):
        dead = ~net.masked.mask.to_dense()[0]
        assert not net.masked.weight[dead].isnan().any()
        assert net.masked.weight[~dead].isnan().all()
    assert_same_bits(net, before)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("when", range(6))
def test_theta_is_put_back_after_an_error(error, when):
    """After an interrupted episode the model is what it was."""
    net = masked_net("weights")
    before = parameters_of(net)
    calls = 0

    def loss(sample):
        nonlocal calls
        calls += 1
        if calls == when + 1:
            raise error
        return net_loss(net)(sample)

    learner = fm.MetaLearner(net, loss, inner_steps=2, inner_learning_rate=0.1)
    with pytest.raises(error):
        learner.episode(net_tasks([0, 1]))
    assert_same_bits(net, before)
    assert not net.masked.weight._backward_hooks


def test_theta_is_put_back_after_an_error_in_a_backward_pass():
    """It is, too, if the error comes in a backward pass, in which steps are taken."""
    net = masked_net("rows")
    before = parameters_of(net)

    def stop(gradient):
        raise KeyboardInterrupt

    def loss(sample):
        hidden = net.first(sample[0])
        hidden.register_hook(stop)  # by then the layers above have taken their step
        return net.last(net.masked(torch.tanh(hidden), torch.zeros(4, dtype=torch.int64))).square().mean()

    learner = fm.MetaLearner(net, loss, inner_learning_rate=0.1)
    with pytest.raises(KeyboardInterrupt):
        learner.episode(net_tasks([0]))
    assert_same_bits(net, before)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_gradients_accumulate_over_languages_and_calls():
    """Episodes add to `.grad`, so a meta-batch may be split over calls or processes."""
    net = masked_net("rows")
    learner = fm.MetaLearner(net, net_loss(net), inner_steps=2, inner_learning_rate=0.1)
    tasks = net_tasks([0, 1, 2])
    learner.episode(tasks)
    together = {name: p.grad.clone() for name, p in net.named_parameters()}
    learner.episode(iter(tasks[:1]), n_languages=3)
    learner.episode(tasks[1:], n_languages=3)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * together[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_units_nobody_owns_get_exactly_no_meta_gradient(algorithm):
    """No language teaches a head that it does not own."""
    model = tiny("bert", "tokens")
    subnets = fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="heads")
    fm.attach(model, subnets)
    learner = fm.MetaLearner(model, hf_loss(model), algorithm=algorithm, inner_learning_rate=0.1)
    learner.episode([Task(name, [batch(1)], batch(2)) for name in ("aa", "bb")])
    owned = subnets.heads[:2].any(0)
    assert not owned.all()
    for layer in range(2):
        query = model.get_submodule(f"bert.encoder.layer.{layer}.attention.self.query")
        by_head = query.weight.grad.unflatten(0, (4, -1)).flatten(1)
        assert torch.equal(by_head.any(1), owned[layer])


def test_reptile_by_sgd_moves_towards_the_fast_weights():
    """Reptile's gradient has its sign and scale: SGD moves towards the fast weights."""
    net = masked_net("weights")
    theta = parameters_of(net)
    learner = fm.MetaLearner(net, net_loss(net), algorithm="reptile", inner_learning_rate=0.1)
    tasks = net_tasks([0, 1])
    phis = []
    for task in tasks:
        with learner.adapt(task.language, task.support):
            phis.append(parameters_of(net))
    learner.episode(tasks)
    torch.optim.SGD(net.parameters(), lr=0.25).step()
    for name, parameter in net.named_parameters():
        mean = torch.stack([phi[name] - theta[name] for phi in phis]).mean(0)
        torch.testing.assert_close(parameter.detach(), theta[name] + 0.25 * mean, rtol=1e-12, atol=1e-14)


def test_reptile_without_a_query():
    """Reptile needs no query sentences."""
    net = masked_net("rows")
    learner = fm.MetaLearner(net, net_loss(net), algorithm="reptile", inner_learning_rate=0.1)
    (result,) = learner.episode([Task(0, net_tasks([0])[0].support)])
    assert result.query_loss is None
    assert net.masked.weight.grad.any()


def test_frozen_and_unused_parameters_are_left_alone():
    """A frozen embedding is not adapted, and an unused parameter does not stop the episode."""
    net = masked_net("rows")
    net.unused = nn.Parameter(torch.ones(3))
    net.first.weight.requires_grad_(False)
    before = parameters_of(net)
    learner = fm.MetaLearner(net, net_loss(net), inner_learning_rate=0.1)
    with learner.adapt(0, net_tasks([0])[0].support):
        assert torch.equal(net.first.weight, before["first.weight"])
        assert not torch.equal(net.first.bias, before["first.bias"])
    learner.episode(net_tasks([0]))
    assert net.unused.grad is None
    assert net.first.weight.grad is None
    assert_same_bits(net, before)


def test_adapt_keeps_on_request_only_and_never_after_an_error():
    """Few-shot evaluation leaves the model as it was unless its result is to be kept."""
    net = masked_net("rows")
    before = parameters_of(net)
    learner = fm.MetaLearner(net, net_loss(net), inner_steps=3, inner_learning_rate=0.1)
    support = net_tasks([1])[0].support
    with learner.adapt(1, support) as losses:
        assert losses.shape == (3,)
        inside = parameters_of(net)
        assert not torch.equal(inside["masked.weight"], before["masked.weight"])
    assert_same_bits(net, before)
    with pytest.raises(Stop), learner.adapt(1, support, keep=True):
        raise Stop
    assert_same_bits(net, before)
    with learner.adapt(1, [], steps=0) as losses:
        assert losses.shape == (0,)
        assert_same_bits(net, before)
    with learner.adapt(1, support, keep=True):
        pass
    assert_same_bits(net, inside)
    assert net.masked.weight.grad is None


def test_buffers_are_put_back():
    """Running statistics of fast weights are not theta's, and a replaced buffer is put back."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen = self.seen + len(x)
            return self.norm(x)

    module = Counting().train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(6, 5)
    fm.MetaLearner(module, lambda x: module(x).square().sum()).episode([Task(None, [x], x)])
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_dropout_is_a_function_of_the_random_state():
    """A resumed episode draws the same dropout masks, and no generator of the caller is seeded."""
    model = tiny("bert", "tokens").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    learner = fm.MetaLearner(model, hf_loss(model), inner_steps=2, inner_learning_rate=0.1)

    def run(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        learner.episode([Task("xx", [batch(1)], batch(2))])
        return model.classifier.weight.grad.clone()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert model.training


def test_embeddings_copy_looked_up_rows_only():
    """Of a large vocabulary, only rows that support batches look up are copied and put back."""
    model = tiny("bert", "tokens")
    before = parameters_of(model)
    learner = fm.MetaLearner(model, hf_loss(model), inner_steps=4, inner_learning_rate=0.1)
    support = [batch(1, vocabulary=10), batch(2, vocabulary=20)]
    table = model.bert.embeddings.word_embeddings
    with learner.adapt("xx", support):
        touched = (table.weight != before["bert.embeddings.word_embeddings.weight"]).any(1)
        looked_up = torch.cat([b["kwargs"]["input_ids"].flatten() for b in support]).unique()
        assert set(touched.nonzero().flatten().tolist()) == set(looked_up.tolist()) - {table.padding_idx}
        assert not table.sparse
    assert_same_bits(model, before)


def test_bfloat16_autocast():
    """Meta-learning works under autocast."""
    model = tiny("bert", "tokens").float()
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both"))
    before = parameters_of(model)

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch["kwargs"]).logits
        return token_loss(logits.float(), batch["labels"])

    fm.MetaLearner(model, loss, inner_learning_rate=0.1).episode([Task("bb", [batch(1)], batch(2))])
    assert_same_bits(model, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_a_scaler_scales_the_meta_gradient_and_not_the_inner_steps(algorithm):
    """Under float16 `.grad` is scaled, as `scaler.unscale_` expects, and inner steps are not."""
    net = masked_net("columns")
    options = {"algorithm": algorithm, "inner_steps": 3, "inner_learning_rate": 0.1}
    fm.MetaLearner(net, net_loss(net), **options).episode(net_tasks([0, 1]))
    plain = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fm.MetaLearner(net, net_loss(net), scaler=scaler, **options).episode(net_tasks([0, 1]))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad / 1024, plain[name], rtol=1e-9, atol=1e-12)
