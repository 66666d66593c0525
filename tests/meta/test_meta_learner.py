"""Episodes equal the literal loop to the last digits, and leave theta as it was to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_meta import MaskedNet, functional_loss, literal_episode, token_loss
from torch import nn

import fastmask as fm
from fastmask.meta import Task
from tests.models.tiny_models import tiny, unit_masks
from tests.parsing.toy_parser import rows, small_parser

LANGUAGES = ["aa", "bb", "cc"]
K = 4


def batch(seed, size=3, length=6, classes=2, vocabulary=50):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[-1, length - 2 :] = 0
    labels = torch.randint(0, classes, (size, length), generator=generator)
    return {"inputs": None, "labels": labels, "kwargs": {"input_ids": ids, "attention_mask": attention}}


def hf_loss(model):
    return lambda batch: token_loss(model(**batch["kwargs"]).logits, batch["labels"])


def literal_loss(model):
    run = functional_loss(model)
    return lambda parameters, batch: run(parameters, {"inputs": batch["kwargs"], "labels": batch["labels"]})


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(model, before):
    for name, parameter in model.named_parameters():
        # As integers: -0 is not 0, and NaN is itself.
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[parameter.element_size()]
        assert torch.equal(parameter.detach().view(kind), before[name].view(kind)), name


def assert_gradients(model, expected, tolerance=1e-10):
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def model_and_head(kind):
    if kind == "bert":
        return tiny("bert", "tokens"), 2
    model = tiny("llama", "causal", tie_word_embeddings=kind == "tied llama")
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            # Its float32 would turn the last digit of a float64 into one of the first eight.
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model, 50


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
@pytest.mark.parametrize("kind", ["bert", "llama", "tied llama"])
def test_heads_and_neurons_equal_the_literal_loop(kind, algorithm):
    """Meta-gradients are not those of the method, or theta moves in an episode."""
    model, classes = model_and_head(kind)
    plain = copy.deepcopy(model)
    subnets = fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")
    head = "classifier" if kind == "bert" else "lm_head"
    rates = {head: 0.05, "": 0.02} if kind != "tied llama" else 0.03
    by_name = {
        name: rates if isinstance(rates, float) else rates[head if name.startswith(head) else ""]
        for name, _ in plain.named_parameters()
    }
    languages = ["aa", "cc", None]  # a mixed meta-batch: two subnetworks and the full network
    batches = [[batch(10 * i + j, classes=classes) for j in range(3)] for i in range(3)]
    tasks = [Task(name, three[:2], three[2]) for name, three in zip(languages, batches, strict=True)]
    multipliers = [unit_masks(plain, subnets, LANGUAGES.index(name)) if name else {} for name in languages]
    expected, losses = literal_episode(
        plain,
        literal_loss(plain),
        [(m, t.support, t.query) for m, t in zip(multipliers, tasks, strict=True)],
        K,
        by_name,
        algorithm,
    )

    fm.attach(model, subnets)
    before = parameters_of(model)
    learner = fm.MetaLearner(model, hf_loss(model), algorithm=algorithm, inner_steps=K, inner_learning_rate=rates)
    results = learner.episode(tasks)
    assert_same_bits(model, before)
    assert_gradients(model, expected)
    for result, name, values in zip(results, languages, losses, strict=True):
        assert result.language == name
        torch.testing.assert_close(result.support_losses, torch.tensor(values[:-1], dtype=torch.float64))
        torch.testing.assert_close(result.query_loss, torch.tensor(values[-1], dtype=torch.float64))
        assert not result.support_losses.requires_grad
        assert not result.query_loss.requires_grad
    assert losses[0][0] != losses[0][2]  # the first batch again, two steps later


def masked_layer(kind, generator, shape=(8, 12)):
    N, K_in = shape
    keep = lambda *size: torch.rand(*size, generator=generator) < 0.5  # noqa: E731
    mask = {
        "rows": lambda: fm.Mask.rows(keep(3, N), K_in),
        "columns": lambda: fm.Mask.columns(keep(3, K_in), N),
        "wide columns": lambda: fm.Mask.columns(keep(3, K_in // 4).repeat_interleave(4, 1), N),
        "blocks": lambda: fm.Mask.blocks(keep(3, N // 2, K_in // 3), (2, 3)),
        "weights": lambda: fm.Mask.weights(keep(3, N, K_in)),
        "nothing": lambda: fm.Mask.weights(torch.zeros(3, N, K_in, dtype=torch.bool)),
        "everything": lambda: fm.Mask.rows(torch.ones(3, N, dtype=torch.bool), K_in),
    }[kind]()
    return fm.MaskedLinear(K_in, N, mask, dtype=torch.float64)


KINDS = ["rows", "columns", "wide columns", "blocks", "weights", "nothing", "everything"]


def masked_net(kind, tied=False):
    torch.manual_seed(4)
    shape = (12, 12) if tied else (8, 12)
    net = MaskedNet(masked_layer(kind, torch.Generator().manual_seed(2), shape), tied).double()
    with torch.no_grad():
        net.masked.weight[0, :6] = -0.0  # a pruned weight's sign must survive, too
    return net


def net_tasks(languages):
    generator = torch.Generator().manual_seed(9)

    def sample(language):
        return torch.randn(4, 5, generator=generator, dtype=torch.float64), language

    return [Task(language, [sample(language), sample(language)], sample(language)) for language in languages]


def net_loss(net):
    return lambda sample: net(*sample).square().mean()


def net_multipliers(net, language):
    if language < 0:
        return {}
    keep = net.masked.mask.to_dense()[language].double()
    multipliers = {"masked.weight": keep}
    if net.masked.mask.kind == "rows":
        multipliers["masked.bias"] = keep[:, 0]
    return multipliers


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_kind_equals_the_literal_loop(kind, algorithm):
    """A kind of mask is adapted, copied or put back in the wrong place."""
    net = masked_net(kind)
    plain = copy.deepcopy(net)
    plain.multiplied = True
    tasks = net_tasks([2, 0, -1, 1])
    expected, _ = literal_episode(
        plain,
        lambda parameters, sample: torch.func.functional_call(plain, parameters, sample).square().mean(),
        [(net_multipliers(net, t.language), t.support, t.query) for t in tasks],
        K,
        dict.fromkeys(dict(plain.named_parameters()), 0.1),
        algorithm,
    )
    before = parameters_of(net)
    learner = fm.MetaLearner(net, net_loss(net), algorithm=algorithm, inner_steps=K, inner_learning_rate=0.1)
    learner.episode(tasks)
    assert_same_bits(net, before)
    assert_gradients(net, expected, 1e-12)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_a_masked_weight_that_is_tied_is_put_back_whole(kind):
    """A weight that is masked in one place and whole in another stays half adapted."""
    net = masked_net(kind, tied=True)
    before = parameters_of(net)
    with fm.MetaLearner(net, net_loss(net), inner_learning_rate=0.1).adapt(0, net_tasks([0])[0].support):
        dead = ~net.masked.mask.to_dense()[0]
        assert (net.masked.weight != before["masked.weight"])[dead].any()
    assert_same_bits(net, before)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_weights_survive_a_gradient_of_nan(kind):
    """An inner loop that diverges spoils weights outside the language's copy for good."""
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
    """An interrupted episode leaves a model that is half adapted."""
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
    """A step is taken while gradients are still being computed; an error there must not leave it behind."""
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
    """An episode replaces `.grad`, or a meta-batch split over calls (or processes) has another meta-gradient."""
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
    """Languages teach heads that they do not own."""
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
    """The sign or the scale of Reptile's gradient is wrong."""
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
    """Reptile asks for sentences that it does not use."""
    net = masked_net("rows")
    learner = fm.MetaLearner(net, net_loss(net), algorithm="reptile", inner_learning_rate=0.1)
    (result,) = learner.episode([Task(0, net_tasks([0])[0].support)])
    assert result.query_loss is None
    assert net.masked.weight.grad.any()


def test_a_model_without_masks():
    """The method `full` cannot be combined with meta-learning."""
    model = tiny("bert", "tokens")
    plain = copy.deepcopy(model)
    learner = fm.MetaLearner(model, hf_loss(model), inner_steps=2, inner_learning_rate=0.1)
    learner.episode([Task("xx", [batch(1)], batch(2))])
    rates = dict.fromkeys(dict(plain.named_parameters()), 0.1)
    expected, _ = literal_episode(plain, literal_loss(plain), [({}, [batch(1)], batch(2))], 2, rates, "fomaml")
    assert_gradients(model, expected)


def test_frozen_and_unused_parameters_are_left_alone():
    """A frozen embedding is adapted, or a parameter outside the loss's graph stops the episode."""
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
    """Few-shot evaluation changes the model, or its result cannot be kept."""
    net = masked_net("rows")
    before = parameters_of(net)
    learner = fm.MetaLearner(net, net_loss(net), inner_steps=3, inner_learning_rate=0.1)
    support = net_tasks([1])[0].support
    with learner.adapt(1, support) as adapted:
        assert adapted.model is net
        assert adapted.support_losses.shape == (3,)
        inside = parameters_of(net)
        assert not torch.equal(inside["masked.weight"], before["masked.weight"])
    assert_same_bits(net, before)
    with pytest.raises(Stop), learner.adapt(1, support, keep=True):
        raise Stop
    assert_same_bits(net, before)
    with learner.adapt(1, [], steps=0) as adapted:
        assert adapted.support_losses.shape == (0,)
        assert_same_bits(net, before)
    with learner.adapt(1, support, keep=True):
        pass
    assert_same_bits(net, inside)
    assert net.masked.weight.grad is None


def test_buffers_are_put_back():
    """Running statistics of fast weights leak into theta, or a buffer that was replaced stays replaced."""

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
    """A resumed episode draws other dropout masks, or the learner seeds generators behind the caller's back."""
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
    """A large vocabulary is copied whole, or rows of a later support batch are not put back."""
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
    """Meta-learning does not run under autocast."""
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
    """Under float16 inner steps are the scale times too large, or `.grad` is not what `scaler.unscale_` expects."""
    net = masked_net("columns")
    options = {"algorithm": algorithm, "inner_steps": 3, "inner_learning_rate": 0.1}
    fm.MetaLearner(net, net_loss(net), **options).episode(net_tasks([0, 1]))
    plain = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fm.MetaLearner(net, net_loss(net), scaler=scaler, **options).episode(net_tasks([0, 1]))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad / 1024, plain[name], rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing():
    """A layer that is recomputed in the backward pass sees weights that have already taken their step."""
    model, _ = model_and_head("llama")
    plain = copy.deepcopy(model)
    subnets = fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")
    fm.attach(model, subnets)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    task = Task("bb", [batch(1, classes=50)], batch(2, classes=50))
    fm.MetaLearner(model, hf_loss(model), inner_steps=K, inner_learning_rate=0.05).episode([task])
    rates = dict.fromkeys(dict(plain.named_parameters()), 0.05)
    tasks = [(unit_masks(plain, subnets, 1), task.support, task.query)]
    expected, _ = literal_episode(plain, literal_loss(plain), tasks, K, rates, "fomaml")
    assert_gradients(model, expected)


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_the_parser_equals_the_literal_loop(algorithm):
    """The model this library trains (subnetworks on a part of it, a bag of trigrams) is adapted wrongly."""
    parser = small_parser().double()
    plain = copy.deepcopy(parser)
    subnets = fm.Subnetworks.random(parser.encoder.config, LANGUAGES, 0.5, seed=3, units="both")
    fm.attach(parser.encoder, subnets)
    encoded = parser.features.encode(rows(), parser.vocabulary)
    first, second = (parser.features.collate(encoded.select([i, 2])) for i in range(2))
    tasks = [Task("aa", [first, second], second), Task("cc", [second], first)]
    every = [
        {f"encoder.{name}": m for name, m in unit_masks(plain.encoder, subnets, number).items()} for number in (0, 2)
    ]
    rates = {"encoder": 0.01, "": 0.05}
    expected, _ = literal_episode(
        plain,
        lambda parameters, batch: torch.func.functional_call(plain, parameters, (batch,)).loss,
        [(m, t.support, t.query) for m, t in zip(every, tasks, strict=True)],
        K,
        {name: rates["encoder" if name.startswith("encoder.") else ""] for name, _ in plain.named_parameters()},
        algorithm,
    )
    before = parameters_of(parser)
    learner = fm.MetaLearner(
        parser, lambda batch: parser(batch).loss, algorithm=algorithm, inner_steps=K, inner_learning_rate=rates
    )
    learner.episode(tasks)
    assert_same_bits(parser, before)
    expected["encoder.embeddings.word_embeddings.weight"] = torch.zeros_like(  # frozen
        before["encoder.embeddings.word_embeddings.weight"]
    )
    assert_gradients(parser, expected)
    assert parser.trigrams.weight.grad.any()
