"""Weights, optimizer and random states on disk: they come back to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_run import LANGUAGES, toy_parser

import fastmask as fm
from fastmask.files import read_tensors, write_tensors
from fastmask.training import run_folder
from fastmask.training.engine import random_state, set_random_state

CPU = torch.device("cpu")


class Tied(torch.nn.Module):
    """Two names of one weight, a transposed one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.turned = torch.nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("count", torch.tensor(3))


def test_tied_and_transposed_weights(tmp_path: Path) -> None:
    """A state has every name of a tied weight, and all values come back."""
    model, other = Tied(), Tied()
    write_tensors(tmp_path / "w", model.state_dict())
    assert load_file(tmp_path / "w").keys() == model.state_dict().keys()
    other.load_state_dict(read_tensors(tmp_path / "w")[0])
    assert other.second.weight is other.first.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def optimizers(model: Any) -> dict[str, Any]:
    decays = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [{"params": decays, "lr": 0.1, "betas": (0.8, 0.99)}, {"params": others, "lr": 0.01}]
    return {
        "adamw": lambda: torch.optim.AdamW(groups),
        "fused": lambda: torch.optim.AdamW(groups, fused=True),
        "live": lambda: fm.LiveAdamW(groups, model=model),
    }


@pytest.mark.parametrize("name", ["adamw", "fused", "live"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """After loading, the next steps are the same to the bit."""

    def steps(model: Any, optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for at, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                if at != seed:  # one has no gradient, as what no language owns
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name == "live":
                optimizer.announce([seed % 2])
            optimizer.step()
            optimizer.zero_grad()

    first, second = (toy_parser() for _ in range(2))
    for parser in (first, second):
        fm.attach(parser.encoder, fm.Subnetworks.random(parser.encoder.config, LANGUAGES, 0.5, seed=0))
    one, other = (optimizers(parser)[name]() for parser in (first, second))
    steps(first, one, range(3))
    write_tensors(tmp_path / "w", first.state_dict())
    write_tensors(tmp_path / "o", run_folder.optimizer_tensors(one))
    second.load_state_dict(read_tensors(tmp_path / "w")[0])
    run_folder.load_optimizer(other, read_tensors(tmp_path / "o")[0])
    assert other.param_groups[0]["betas"] == (0.8, 0.99)
    steps(first, one, range(3, 6))
    steps(second, other, range(3, 6))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def draws() -> list[Any]:
    """Numbers of every kind; Gaussian ones leave half a pair behind."""
    numpy = np.random
    return [
        random.random(), random.gauss(0, 1), numpy.rand(), numpy.randn(),
        torch.rand(3).tolist(), torch.randn(1).item(),
    ]  # fmt: skip


def test_random_states_come_back() -> None:
    """A process resumes with its own random numbers, of Python, numpy and torch, after they were JSON."""
    draws()
    states, expected = [], []
    for _ in range(2):
        states.append(json.loads(json.dumps(random_state(CPU))))
        expected.append(draws())
    for process in (1, 0):
        draws()
        set_random_state(states[process], CPU)
        assert draws() == expected[process]
