"""Weights, optimiser and random states on disk: they come back to the bit, and what does not fit is named."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import LANGUAGES, toy_parser

import fastmask as fm
from fastmask.files import FileError
from fastmask.training import checkpoints
from fastmask.training.engine import random_state

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
    checkpoints.save_weights(model, tmp_path / "w")
    assert load_file(tmp_path / "w").keys() == model.state_dict().keys()
    checkpoints.load_weights(other, tmp_path / "w")
    assert other.second.weight is other.first.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(FileError, match=r"w: does not fit the model: .*Missing key"):
        checkpoints.load_weights(torch.nn.Linear(4, 4), tmp_path / "w")


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
def test_an_optimiser_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """After loading, the next steps are the same to the bit; settings come back in their types."""

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
    checkpoints.save_weights(first, tmp_path / "w")
    checkpoints.save_optimizer(one, tmp_path / "o")
    one.param_groups[0]["lr"] = 7.0  # in memory only
    checkpoints.load_weights(second, tmp_path / "w")
    checkpoints.load_optimizer(other, tmp_path / "o")
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["betas"] == (0.8, 0.99)
    assert all(type(new[k]) is type(old[k]) for new, old in zip(other.param_groups, one.param_groups, strict=True)
               for k in old)  # fmt: skip
    one.param_groups[0]["lr"] = 0.1
    steps(first, one, range(3, 6))
    steps(second, other, range(3, 6))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_a_state_of_another_model(tmp_path: Path) -> None:
    """Moments of another shape, of parameters that are not there, or of other groups are refused."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    checkpoints.save_optimizer(optimizer, tmp_path / "o")
    with pytest.raises(FileError, match=r"o: does not fit the optimiser: 0.exp_avg.* \(3, 4\) \(expected \(3, 5\)\)"):
        checkpoints.load_optimizer(torch.optim.AdamW(torch.nn.Linear(5, 3).parameters()), tmp_path / "o")
    with pytest.raises(FileError, match="o: does not fit the optimiser"):
        checkpoints.load_optimizer(torch.optim.AdamW(torch.nn.Linear(4, 3, bias=False).parameters()), tmp_path / "o")
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(FileError, match="o: does not fit the optimiser"):
        checkpoints.load_optimizer(torch.optim.AdamW(groups), tmp_path / "o")
    save_file({}, tmp_path / "empty")
    with pytest.raises(FileError, match="empty: does not fit the optimiser"):
        checkpoints.load_optimizer(optimizer, tmp_path / "empty")


def draws() -> list[Any]:
    """Numbers of every kind; Gaussian ones leave half a pair behind."""
    numpy = np.random
    return [
        random.random(), random.gauss(0, 1), numpy.rand(), numpy.randn(),
        torch.rand(3).tolist(), torch.randn(1).item(),
    ]  # fmt: skip


def test_random_states_come_back(tmp_path: Path) -> None:
    """Every process resumes with its own random numbers, of Python, numpy and torch."""
    draws()
    states, expected = [], []
    for _ in range(2):
        states.append(random_state(CPU))
        expected.append(draws())
    checkpoints.save_random_states(states, tmp_path / "r")
    for process in (1, 0):
        draws()
        checkpoints.load_random_state(tmp_path / "r", process, CPU)
        assert draws() == expected[process]
    with pytest.raises(FileError, match="r: holds no random state of process 2"):
        checkpoints.load_random_state(tmp_path / "r", 2, CPU)
    tensors = load_file(tmp_path / "r")
    save_file({**tensors, "0.torch": tensors["0.torch"][:-1]}, tmp_path / "short", {"0": '{"python": [3, null]}'})
    with pytest.raises(FileError, match="short: holds no random state of process 0"):
        checkpoints.load_random_state(tmp_path / "short", 0, CPU)
