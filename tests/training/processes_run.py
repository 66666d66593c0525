"""What the tests of several processes run: the same cases with one process and, under `torchrun`, with two.

    torchrun --nproc-per-node=2 processes_run.py FOLDER CASE [CASE ...]

Dropout is off, because each process draws its own; weights are float64, so that rounding does not grow. (The scores,
and with them the losses, are float32 in any case.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy_run import LANGUAGES, toy_config, toy_data, toy_task

import fastmask as fm
from fastmask.gradients import sum_over_processes
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.loop import train
from fastmask.training.methods import SwitchPoint, subnetworks_of

META = {"inner_steps": 2, "support_sentences": 2, "query_sentences": 2, "checkpoint_every": 3}
META |= {"inner_lr": 0.05, "inner_encoder_lr": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "random": {"method": "random"},
    "dead": {"method": "static"},
    "full-fomaml": {"method": "full", "meta": "fomaml", **META},
    "random-fomaml": {"method": "random", "meta": "fomaml", **META},
    "random-reptile": {"method": "random", "meta": "reptile", **META},
    "one-language": {"method": "random", "meta": "fomaml", **META, "meta_batch": 1},
    "frozen": {"method": "random", "freeze_embeddings": True},
    "found": {"method": "static", "density": 0.5, "score_sentences": 8},
    "dynamic": {"method": "dynamic", "density": 0.5, "score_sentences": 8, "update_every": 2},
    "live": {"method": "random", "optimizer": "live"},
}
"""`dead`: subnetworks that have whole layers dead. `one-language`: nothing to do for the second process. `found`: by
discovery, which the processes share."""


class Stopped(Exception):  # noqa: N818
    """After the first step."""


def subnetworks(point: SwitchPoint) -> Any:
    if point.config.density is not None:
        return subnetworks_of(point)
    subnets = fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES, 0.5, seed=0, units="both")
    if point.config.method == "static":
        subnets.heads[:, 1] = subnets.neurons[:, 0] = False  # for all
        subnets.heads[0] = subnets.neurons[0] = False  # all of it for one
    return subnets


def exact_task() -> Parsing:
    """In float64, without dropout."""
    task = toy_task(dropout=0.0)
    task.model.double()
    return task


def run(folder: Path, case: str, **changes: Any) -> None:
    """A whole run of a case in FOLDER/CASE, and one that stops after its first step, all masked, in CASE-gradient."""
    settings = {**CASES[case], **changes}
    train(exact_task(), toy_data(), toy_config(folder / case, **settings), subnetworks)

    def stop(step: int) -> None:
        raise Stopped

    first = {**settings, "discover_at": 0.0, "checkpoint_every": 1, "max_grad_norm": 1e9}
    config = toy_config(folder / f"{case}-gradient", **first)
    try:
        train(exact_task(), toy_data(), config, subnetworks, stop)
    except Stopped:
        return
    raise RuntimeError("not stopped")


def sums(folder: Path) -> None:
    """Sum gradients of which each process has some; save what comes of it."""
    rank = torch.distributed.get_rank()
    shapes = {"both": (5, 3), "first": (2,), "second": (7,), "none": (4,), "half": (3,), "large": (40,), "frozen": (2,)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    parameters["half"] = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    parameters["frozen"].requires_grad_(False)
    for name in ("both", "half", "large", *(["first"] if rank == 0 else ["second"])):
        generator = torch.Generator().manual_seed(10 * rank + len(name))
        p = parameters[name]
        p.grad = torch.randint(-8, 8, p.shape, generator=generator).to(p.dtype)
    given = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    sum_over_processes(parameters.values())
    summed = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    torch.save({"given": given, "summed": summed}, folder / f"sums-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if name == "sums":
            sums(target)
        else:
            run(target, name)
