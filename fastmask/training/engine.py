"""How steps are taken: device, processes, optimizer, learning rates, random states."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn

from fastmask.optim import LiveAdamW, can_be_sparse
from fastmask.settings import ConfigError
from fastmask.tasks.task import Task
from fastmask.training.config import TrainConfig

T = TypeVar("T")

ADAMW_RATE = 3e-5  # of AdamW on a support set

# ---- device and processes


def device_of(name: str) -> torch.device:
    """The device for one of `DEVICES`; "auto" is a GPU where there is one. Raises ValueError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch finds no GPU here (expected cpu, or auto)")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def accelerator_for(device: str, precision: str) -> Any:
    """An `accelerate.Accelerator`; a second one in the same process may have another precision than the first.

    Raises:
        ValueError: as `device_of`. ConfigError: accelerate is set to split the model over processes.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=device_of(device).type == "cpu")
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is set to {kind.value} (expected DistributedDataParallel, or a loop of your own: languages of "
            "different processes run different layers here)"
        )
    return accelerator


def on_first(accelerator: Any, work: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; all get what it returns, and all fail if it does."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
            broadcast_object_list(outcome)
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise RuntimeError(f"the first process failed: {outcome[1]}")
    return cast(T, outcome[0])


# ---- optimizer and learning rates


def build_optimizer(task: Task, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer over the trainable parameters; vectors (biases, LayerNorm) do not decay. Rates: `peak_rates`."""
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
        for ((_, decays), parameters), rate in zip(_groups(task).items(), peak_rates(task, config), strict=True)
    ]
    if config.optimizer == "live":
        return LiveAdamW(settings, model=task.model)
    # One pass over the weights instead of a dozen: 8 ms a step instead of 40 for the small model on a CPU.
    return torch.optim.AdamW(settings, fused=task.device.type in ("cpu", "cuda"))


def peak_rates(task: Task, config: TrainConfig, episodes: bool = False) -> list[float]:
    """Peak learning rate of each group of `build_optimizer`, in plain steps or as the outer rate of episodes.

    By default that of a pretrained encoder is the one tuned at width 384 (docs/results/0-tuning-encoder.md); Adam's
    goes with the inverse of the width (Yang et al. 2021, https://arxiv.org/abs/2203.03466).
    """
    rate = (episodes and config.meta_lr) or config.lr
    encoder_rate = (episodes and config.meta_encoder_lr) or config.encoder_lr or 2e-4 * 384 / _width(task.encoder)
    return [encoder_rate if of_encoder else rate for of_encoder, _ in _groups(task)]


def _width(encoder: Any) -> int:
    """Features of a token; those of the text part where a config has several."""
    config: Any = getattr(encoder, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "hidden_size", 768))


def inner_rates(task: Task, config: TrainConfig, optimizer: str = "sgd") -> tuple[float, float]:
    """The rates of steps on a support set, outside and inside of the encoder; of SGD tuned on Croatian and Telugu."""
    if optimizer == "adamw":
        return ADAMW_RATE, ADAMW_RATE
    encoder = config.inner_encoder_lr
    return config.inner_lr, (1e-3 if task.pretrained else 1e-2) if encoder is None else encoder


def _groups(task: Task) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """Trainable parameters by (of a pretrained encoder?, a matrix?)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            key = (task.pretrained and name.startswith(task.encoder_name), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return groups


def add_parameter(optimizer: torch.optim.Optimizer, task: Task, parameter: nn.Parameter) -> None:
    """Train one more matrix of the model, in the group of those that are not of a pretrained encoder."""
    group = list(_groups(task)).index((False, True))
    optimizer.param_groups[group]["params"].append(parameter)


def learning_rate_factor(step: int, steps: int, warmup: int, kind: str = "cosine") -> float:
    """The factor of the peak learning rate at `step` (0 is the first one), of "cosine", "linear" or "constant" `kind`.

    It climbs over `warmup` steps to 1, falls to 0 at `steps`, and stays there: a cosine that is not held climbs again.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]


def looked_up_tables(task: Task) -> list[nn.Module]:
    """The trainable input embeddings of which a step needs only the rows that a batch looks up: nothing else uses them.

    `LiveAdamW` steps those rows alone: momentum and weight decay of a row wait until it is looked up again, as in
    `torch.optim.SparseAdam`. A row counts as looked up if its gradient is not all zeros.
    """
    uses = Counter(parameter for _, parameter in task.model.named_parameters(remove_duplicate=False))
    try:
        tables = task.input_embeddings()
    except ValueError:  # none are known
        return []
    weights: dict[nn.Module, Any] = {table: table.weight for table in tables if can_be_sparse(table)}
    return [table for table, weight in weights.items() if weight.requires_grad and uses[weight] == 1]


# ---- random states of python, numpy and torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The random state of this process, which computes on `device`, as JSON."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the global state, which libraries draw from
    state = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy],
        "torch": torch.get_rng_state().tolist(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device).tolist()} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on as the process did whose state it is; that of a GPU is left alone where it computed on none."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8, device="cpu"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8, device="cpu"), device)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Put the random state back at the end, so that what runs inside does not show in what follows."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
