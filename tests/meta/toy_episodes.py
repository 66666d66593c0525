"""Small models, batches and losses for the tests of this folder, and what they are compared by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from literal_meta import functional_loss, token_loss
from torch import Tensor, nn

import fastmask as fm
from fastmask import MaskedLinear
from fastmask.meta import Task

LANGUAGES = ["aa", "bb", "cc"]


class MaskedNet(nn.Module):
    """A masked layer of any kind between two plain ones; its last layer may share the masked layer's weight."""

    def __init__(self, layer: MaskedLinear, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, layer.in_features)
        self.masked = layer
        self.last = nn.Linear(layer.out_features, layer.in_features if tied else 3)
        if tied:
            self.last.weight = layer.weight
        self.multiplied = False

    def forward(self, x: Tensor, language: int) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.multiplied:  # by the literal implementation
            hidden = F.linear(hidden, self.masked.weight, self.masked.bias)
        else:
            hidden = self.masked(hidden, torch.full((len(x),), language))
        return self.last(torch.tanh(hidden))


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
