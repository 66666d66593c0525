"""What a run goes on from, in safetensors and JSON: weights, the optimiser's state, random states. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmask.files import FileError, read_tensors
from fastmask.optim import LiveAdamW
from fastmask.optim.compact import HELD
from fastmask.training.random_state import RandomState, set_random_state

__all__ = [
    "load_optimizer",
    "load_random_state",
    "load_weights",
    "save_optimizer",
    "save_random_states",
    "save_weights",
]


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the `state_dict` of a module; tied weights are written under each of their names."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in module.state_dict().items():
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    save_file(tensors, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Put back what `save_weights` wrote.

    Raises:
        FileError: the file is damaged, or of another module.
    """
    try:
        module.load_state_dict(read_tensors(path)[0])
    except RuntimeError as error:
        raise FileError(path, f"does not fit the model: {' '.join(str(error).split())}") from None


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write the state of an optimiser whose state is tensors, as AdamW's is, and the settings of its groups."""
    content = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, state in content["state"].items()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"groups": json.dumps(content["param_groups"])})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put back what `save_optimizer` wrote into an optimiser over the same parameters.

    Raises:
        FileError: the file is damaged, or of an optimiser over other parameters.
    """
    tensors, header = read_tensors(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            shape = parameters[int(number)].shape
            # torch takes any: a moment of the wrong shape would be noticed in the next step, or not at all.
            compact = f"{number}.{HELD}" in tensors and isinstance(
                getattr(optimizer, "optimizer", optimizer), LiveAdamW
            )  # which sees for itself what fits
            if tensor.numel() != 1 and tensor.shape != shape and not compact:
                raise ValueError(f"{key} has the shape {tuple(tensor.shape)} (expected {tuple(shape)})")
            state.setdefault(int(number), {})[name] = tensor
        groups = [
            # JSON has no tuples, which the betas are.
            {name: tuple(value) if isinstance(own.get(name), tuple) else value for name, value in given.items()}
            for given, own in zip(json.loads(header["groups"]), optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FileError(path, f"does not fit the optimiser: {error}") from None


def save_random_states(states: Sequence[RandomState], path: Path) -> None:
    """Write the random state of each process."""
    tensors = {f"{number}.{name}": tensor for number, state in enumerate(states) for name, tensor in state[0].items()}
    save_file(tensors, path, metadata={str(number): json.dumps(state[1]) for number, state in enumerate(states)})


def load_random_state(path: Path, process: int, device: torch.device) -> None:
    """Set the random state of this process to what `save_random_states` wrote for it.

    Raises:
        FileError: the file is damaged, or has none for this process.
    """
    tensors, header = read_tensors(path)
    prefix = f"{process}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        set_random_state((mine, json.loads(header[str(process)])), device)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise FileError(path, f"holds no random state of process {process}: {error}") from None
