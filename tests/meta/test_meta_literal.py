"""Meta-gradients equal the literal loop's to the last digits, and theta stays as it was to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_meta import literal_episode
from torch import nn
from toy_episodes import (
    KINDS,
    LANGUAGES,
    assert_gradients,
    assert_same_bits,
    batch,
    hf_loss,
    literal_loss,
    masked_net,
    net_loss,
    net_tasks,
    parameters_of,
)

import fastmask as fm
from fastmask.meta import Task
from tests.models.tiny_models import tiny, unit_masks
from tests.tasks.toy_parser import rows, small_parser

K = 4


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
    """Meta-gradients are those of the literal loop, and theta does not move in an episode."""
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
    """Every kind of mask is adapted, copied and put back in the right place."""
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


def test_a_model_without_masks():
    """The full network can be meta-learned."""
    model = tiny("bert", "tokens")
    plain = copy.deepcopy(model)
    learner = fm.MetaLearner(model, hf_loss(model), inner_steps=2, inner_learning_rate=0.1)
    learner.episode([Task("xx", [batch(1)], batch(2))])
    rates = dict.fromkeys(dict(plain.named_parameters()), 0.1)
    expected, _ = literal_episode(plain, literal_loss(plain), [({}, [batch(1)], batch(2))], 2, rates, "fomaml")
    assert_gradients(model, expected)


def test_gradient_checkpointing():
    """A layer that is recomputed in the backward pass sees the weights of its forward pass."""
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
    """The parser (subnetworks on a part of it, a bag of trigrams) is adapted as the literal loop does."""
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
