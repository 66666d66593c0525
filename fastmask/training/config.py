"""All settings of a training run, which a YAML file or the command line fills in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastmask.discovery.pruning import SCORES
from fastmask.dynamic.dynamic import STRATEGIES
from fastmask.meta.learner import ALGORITHMS
from fastmask.settings import ConfigError, Settings, items_of, setting
from fastmask.subnetworks.subnetworks import UNITS
from fastmask.tasks.registry import task_class
from fastmask.tasks.task import Task, TaskSettings

__all__ = ["DEVICES", "METAS", "METHODS", "PRECISIONS", "UNITS", "ConfigError", "TrainConfig"]

METHODS = ("full", "static", "dynamic", "random", "permuted", "shuffled", "shared", "vector")
METAS = ("none", *ALGORITHMS)
META_BUDGETS = ("sentences", "updates")
PRECISIONS = ("no", "bf16")
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "live")
CONFLICTS = ("none", "pcgrad")


@dataclass
class TrainConfig(Settings):
    """Settings of a run. Every field's `metadata` has "help", its "group" and the limits that `validate` checks."""

    task: str = setting("parsing", "parsing, tagging, classification, lm, translation, or module:Class", group="data")
    data: str | None = setting(
        None, "where the data is: a folder, a file or a name on the Hub; a demonstration if not given", group="data"
    )
    languages: str | None = setting(
        None,
        "comma-separated codes or treebank names, as in en,ar,UD_Czech-CAC; all if not given",
        list=True,
        group="data",
    )
    task_options: dict[str, Any] = setting({}, "settings of the task, by name", group="data")  # noqa: RUF009
    max_length: int = setting(
        512,
        "words or pieces per training example; longer ones are left out or cut, as the task says",
        low=4,
        group="data",
    )
    temperature: float = setting(
        0.0, "languages are drawn in proportion to size ** temperature; 0: equally", low=0, high=1, group="data"
    )
    model: str = setting(
        "small", "an encoder on disk or on the Hub; 'small' is trained from scratch (parsing)", group="model"
    )
    precision: str = setting(
        "no", "numbers in matrix products: float32 (no) or bfloat16 (bf16)", choices=PRECISIONS, group="model"
    )
    device: str = setting(
        "auto", "where to compute: a GPU where there is one (auto), cpu or cuda", choices=DEVICES, group="model"
    )
    threads: int | None = setting(None, "CPU threads; PyTorch's choice if not given", low=1, group="model")
    method: str = setting(
        "static",
        "which subnetworks: none, found per language, found and then updated while training, or a control: random, "
        "found ones over other units, another language's, one shared, or the full network with a vector per language",
        choices=METHODS,
        group="subnetworks",
    )
    units: str = setting("both", "what a subnetwork is made of", choices=UNITS, group="subnetworks")
    density: float | None = setting(
        None, "share of units kept; found by tau if not given", above=0, high=1, group="subnetworks"
    )
    masks: str | None = setting(
        None, "file of subnetworks to train instead of finding them (`fastmask discover`)", group="subnetworks"
    )
    score: str = setting(
        "gradient",
        "what ranks units: gradients of their gates, these minus other languages' (relative), whose activity they are "
        "(entropy), or Shapley values of heads",
        choices=SCORES,
        group="subnetworks",
    )
    score_sentences: int = setting(
        256, "training examples per language that units are scored on", low=1, group="subnetworks"
    )
    draws: int = setting(
        1, "draws of those examples; a language keeps the units that most of them keep", low=1, group="subnetworks"
    )
    tau: float = setting(
        0.95,
        "prune while the dev score is at least tau of the full network's (without one, the loss may rise by -ln tau)",
        above=0,
        high=1,
        group="subnetworks",
    )
    discover_at: float = setting(
        0.6,
        "share of the steps, on the full network, after which subnetworks and episodes begin",
        low=0,
        below=1,
        group="subnetworks",
    )
    strategy: str = setting("swap", "how dynamic subnetworks are updated", choices=STRATEGIES, group="subnetworks")
    update_every: int = setting(100, "steps between updates of dynamic subnetworks", low=1, group="subnetworks")
    freeze_masks: float = setting(
        0.25,
        "share of the steps after the switch, at their end, in which dynamic subnetworks stay as they are",
        low=0,
        high=1,
        group="subnetworks",
    )
    scout_sentences: int = setting(
        8,
        "training examples per language that an update looks at, in each process",
        low=1,
        group="subnetworks",
    )
    meta: str = setting(
        "none",
        "after the switch train in plain mixed batches (none), or in episodes of meta-learning: FOMAML or Reptile",
        choices=METAS,
        group="meta-learning",
    )
    meta_budget: str = setting(
        "sentences",
        "what runs with and without meta-learning have in common: the examples that they draw (a support set counts "
        "once), or the optimiser's steps (one episode for each)",
        choices=META_BUDGETS,
        group="meta-learning",
    )
    inner_steps: int = setting(5, "SGD steps on a language's support set in an episode", low=1, group="meta-learning")
    inner_lr: float = setting(
        0.01,
        "learning rate of those steps, of everything but the encoder (published for mBERT: 1e-4)",
        above=0,
        group="meta-learning",
    )
    inner_encoder_lr: float = setting(
        0.003,
        "the same of the encoder, with the word embeddings of the small one (published for mBERT: 1e-5)",
        low=0,
        group="meta-learning",
    )
    support_sentences: int = setting(20, "examples of a support batch", low=1, group="meta-learning")
    query_sentences: int = setting(
        20, "examples that a language's meta-gradient is computed on (FOMAML)", low=1, group="meta-learning"
    )
    meta_batch: int | None = setting(
        None, "languages per episode, drawn anew for each; all if not given", low=1, group="meta-learning"
    )
    meta_lr: float | None = setting(
        None,
        "peak learning rate of the episodes' outer steps (not of a pretrained encoder); lr if not given",
        above=0,
        high=1,
        group="meta-learning",
    )
    meta_encoder_lr: float | None = setting(
        None,
        "the same of a pretrained encoder; encoder_lr if not given",
        above=0,
        high=1,
        group="meta-learning",
    )
    steps: int = setting(
        1500, "optimiser steps in all; 600 if not given on the demonstration", low=1, group="optimisation"
    )
    batch_size: int = setting(32, "examples per step, over all languages and processes", low=1, group="optimisation")
    seed: int = setting(
        0, "of weights, order of examples, dropout and random masks", low=0, high=2**32 - 1, group="optimisation"
    )
    lr: float = setting(
        1e-3, "peak learning rate (of everything but a pretrained encoder)", above=0, high=1, group="optimisation"
    )
    encoder_lr: float = setting(
        3e-5, "peak learning rate of a pretrained encoder", above=0, high=1, group="optimisation"
    )
    warmup: float = setting(
        0.05, "share of the steps in which the learning rate climbs", low=0, below=1, group="optimisation"
    )
    schedule: str = setting("cosine", "how the learning rate falls to the end", choices=SCHEDULES, group="optimisation")
    freeze_embeddings: bool = setting(
        False,
        "leave the input embeddings as they are (of a pretrained encoder: pieces, positions, token types), in training "
        "and adaptation",
        group="optimisation",
    )
    optimizer: str = setting(
        "adamw",
        "AdamW, or one that leaves alone what no language of a batch owns, and the rows of the input embeddings that "
        "it does not look up (live)",
        choices=OPTIMIZERS,
        group="optimisation",
    )
    conflict: str = setting(
        "none",
        "what is done where gradients of two languages point against each other: nothing, or the part that does is "
        "taken off (pcgrad; a gradient for each language, in plain batches)",
        choices=CONFLICTS,
        group="optimisation",
    )
    weight_decay: float = setting(0.01, "AdamW's, on matrices only", low=0, high=1, group="optimisation")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0, group="optimisation")
    out: str = setting("runs/run", "folder of the run: settings, metrics, checkpoints, masks, model", group="logging")
    resume: bool = setting(
        False, "go on from the last checkpoint in `out`, with the settings of that run", group="logging"
    )
    eval_every: int = setting(250, "steps between dev scores; 0: only at the end", low=0, group="logging")
    dev_sentences: int = setting(
        100,
        "random dev examples per language to score in training, the same in all runs; 0: all",
        low=0,
        group="logging",
    )
    checkpoint_every: int = setting(
        250, "steps between checkpoints; 0: only at the switch and at the end", low=0, group="logging"
    )
    keep_checkpoints: int = setting(
        2,
        "how many of the last checkpoints stay, beside that of the switch; 0: all, for `fastmask analyze`",
        low=0,
        group="logging",
    )
    log_every: int = setting(10, "steps between lines of the metrics file", low=1, group="logging")
    tensorboard: bool = setting(False, "write TensorBoard files into `out`", group="logging")

    @property
    def task_class(self) -> type[Task]:
        """The class of `task`."""
        return task_class(self.task)

    @property
    def task_settings(self) -> TaskSettings:
        """`task_options`, with the task's defaults for what they do not name."""
        return self.task_class.settings.from_dict(self.task_options)

    @property
    def language_list(self) -> list[str]:
        """The entries of `languages`."""
        return items_of(self.languages or "")

    @property
    def shared_steps(self) -> int:
        """The first steps, in plain batches on the full network: all methods take them alike."""
        return round(self.steps * self.discover_at)

    @property
    def switch_step(self) -> int | None:
        """`shared_steps` if something changes then: subnetworks, episodes; None for method `full` without meta."""
        return None if self.method == "full" and self.meta == "none" else self.shared_steps

    @property
    def last_mask_step(self) -> int:
        """The last step after which dynamic subnetworks may be updated; weights are trained behind every update."""
        return self.steps - max(1, round(self.freeze_masks * (self.steps - self.shared_steps)))

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate climbs."""
        return round(self.steps * self.warmup)

    def validate(self) -> None:
        """Check types, ranges, and what must fit together.

        Raises:
            ConfigError: the first setting that is wrong.
        """
        super().validate()
        self.task_options = dataclasses.asdict(self.task_settings)  # whole, so that runs can be compared
        if self.switch_step is not None and self.switch_step >= self.steps:
            raise ConfigError(
                f"discover_at is {self.discover_at} "
                f"(expected less: it leaves none of the {self.steps} steps for what comes after the switch)"
            )
        if self.method == "vector" and not self.task_class.has_vectors:
            raise ConfigError(f"method is 'vector' (expected another one: task {self.task} has no language vectors)")
        if self.conflict != "none" and self.meta != "none":
            raise ConfigError(f"conflict is {self.conflict!r} (expected none in episodes of {self.meta})")
        if self.meta == "reptile" and self.inner_encoder_lr == 0:
            raise ConfigError(
                "inner_encoder_lr is 0.0 (expected > 0 with meta reptile, whose outer step is made of the inner ones)"
            )

    def identity(self) -> dict[str, Any]:
        """The settings that make a run this run and no other: all but where it is and how it is computed."""
        free = {"resume", "out", "data", "threads", "tensorboard", "device", "keep_checkpoints"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the settings that make a resumed run another run: name -> (own value, the other's)."""
        own, others = self.identity(), other.identity()
        return {name: (own[name], others[name]) for name in own if own[name] != others[name]}
