"""What the tests of several processes run: the same cases with one process and, under `torchrun`, with two.

    torchrun --nproc-per-node=2 processes_run.py FOLDER CASE [CASE ...]

Dropout is off, and which tokens are masked is up to the text, because each process draws its own; weights are float64,
so that rounding does not grow. (The scores, and with them the losses, are float32 in any case.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tasks"))

import tiny_tasks
from datasets import Dataset
from toy_run import LANGUAGES, toy_config, toy_data, toy_task

import fastmask as fm
from fastmask.discovery import COMPARING
from fastmask.gradients import sum_over_processes
from fastmask.tasks.lm import LanguageModelling
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import TrainConfig
from fastmask.training.engine import accelerator_for
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
    "relative": {"method": "static", "density": 0.5, "score_sentences": 8, "score": "relative"},
    "dynamic": {"method": "dynamic", "density": 0.5, "score_sentences": 8, "update_every": 2},
    "live": {"method": "random", "optimizer": "live"},
}
"""`dead`: subnetworks that have whole layers dead. `one-language`: nothing to do for the second process. `found`: by
discovery, which the processes share; `relative`: by scores that compare what the processes have measured."""

OF_TASKS = ("tagging", "tagging-fomaml", "masked", "masked-fomaml")
"""Cases of `tiny_tasks`, which has the model in FOLDER/tiny, with subnetworks by discovery; plain and in episodes."""


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


def exact_other_task(config: TrainConfig, data: Splits) -> Task:
    """The same of another task."""
    task = config.task_class.build(config, data)
    task.model.double()
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if isinstance(task, LanguageModelling):
        draws = task._draws

        def by_the_text(*batch: Any) -> torch.Tensor:
            training, task.model.training = task.model.training, False
            try:
                return draws(*batch)
            finally:
                task.model.training = training

        task._draws = by_the_text
    return task


def started(folder: Path, case: str, out: str, **changes: Any) -> tuple[Task, Splits, TrainConfig]:
    """The task, the data and the settings of a case, whose run is FOLDER/OUT."""
    if case in CASES:
        return exact_task(), toy_data(), toy_config(folder / out, **{**CASES[case], **changes})
    name, _, meta = case.partition("-")
    # Batches are of one length: an odd one has parts with more and fewer tokens to average over.
    settings = {"method": "static", "meta": meta or "none", "eval_every": 3, "batch_size": 5, **changes}
    config = tiny_tasks.config_of(name, folder / "tiny" / name, folder / out, **settings)
    data = {
        code: {
            split: Dataset.from_list(tiny_tasks.rows_of(tiny_tasks.CASES[name], code, split))
            for split in ("train", "dev")
        }
        for code in tiny_tasks.LANGUAGES
    }
    return exact_other_task(config, data), data, config


def run(folder: Path, case: str) -> None:
    """A whole run of a case in FOLDER/CASE, and one that stops after its first step, all masked, in CASE-gradient."""
    train(*started(folder, case, case), subnetworks)

    def stop(step: int) -> None:
        raise Stopped

    first = {"discover_at": 0.0, "checkpoint_every": 1, "max_grad_norm": 1e9}
    try:
        train(*started(folder, case, f"{case}-gradient", **first), subnetworks, stop)
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


def masks(folder: Path) -> None:
    """Find subnetworks by scores that compare languages; save them, and how often each process ran the model."""
    process = accelerator_for("cpu", "no")
    task, calls, loss = exact_task(), 0, Parsing.loss
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an untrained parser's output layer is zero, and so is every gradient
        for parameter in task.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))

    def counted(batch: Any, model: Any = None) -> Any:
        nonlocal calls
        calls += 1
        return loss(task, batch, model)

    task.loss = counted
    data = {name: task.training_examples(splits["train"], name) for name, splits in toy_data().items()}
    for score in COMPARING:
        config = toy_config(folder, method="static", density=0.5, score=score, score_sentences=8, draws=2)
        found = subnetworks_of(SwitchPoint(task, toy_data(), data, config))
        if process.is_main_process:
            found.save(folder / f"{score}.safetensors")
    (folder / f"calls-{process.process_index}").write_text(str(calls))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if name in ("sums", "masks"):
            {"sums": sums, "masks": masks}[name](target)
        else:
            run(target, name)
