"""All settings of a training run, which a YAML file or the command line fills in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastmask.dynamic.dynamic import STRATEGIES
from fastmask.meta.learner import ALGORITHMS
from fastmask.subnetworks.subnetworks import UNITS
from fastmask.tasks.parsing.vocabulary import SUBTYPES
from fastmask.training.device import DEVICES
from fastmask.training.schedule import SCHEDULES
from fastmask.training.settings import ConfigError, Settings, items_of, setting

__all__ = ["DEVICES", "METAS", "METHODS", "PRECISIONS", "UNITS", "ConfigError", "TrainConfig"]

METHODS = ("full", "static", "dynamic", "random", "shuffled", "shared")
METAS = ("none", *ALGORITHMS)
PRECISIONS = ("no", "bf16")
OPTIMIZERS = ("adamw", "live")


@dataclass
class TrainConfig(Settings):
    """Settings of a run. Every field's `metadata` has "help" and the limits that `validate` checks."""

    data: str | None = setting(None, "folder of UD treebanks (UD_*/); the embedded synthetic languages if not given")
    languages: str | None = setting(
        None, "comma-separated codes or treebank names, as in en,ar,UD_Czech-CAC", list=True
    )
    method: str = setting(
        "static",
        "which subnetworks: none, found per language, found and then updated while training, or a control: random, "
        "another language's, one shared",
        choices=METHODS,
    )
    out: str = setting("runs/run", "folder of the run: settings, metrics, checkpoints, masks, model")
    model: str = setting("small", "'small' (trained from scratch), or an encoder on disk or on the Hub")
    units: str = setting("both", "what a subnetwork is made of", choices=UNITS)
    density: float | None = setting(
        None, "share of units kept; a subnetwork is found by tau if not given", above=0, high=1
    )
    masks: str | None = setting(None, "file of subnetworks to train instead of finding them (`fastmask discover`)")
    score_sentences: int = setting(256, "training sentences per language that units are scored on", low=1)
    tau: float = setting(
        0.95,
        "prune while dev LAS is at least tau times the full network's (without dev data, the loss may rise by -ln tau)",
        above=0,
        high=1,
    )
    strategy: str = setting("swap", "how dynamic subnetworks are updated", choices=STRATEGIES)
    update_every: int = setting(100, "steps between updates of dynamic subnetworks", low=1)
    scout_sentences: int = setting(8, "training sentences per language that an update looks at, in each process", low=1)
    meta: str = setting(
        "none",
        "after the switch train in plain mixed batches (none), or in episodes of meta-learning: FOMAML or Reptile",
        choices=METAS,
    )
    inner_steps: int = setting(5, "SGD steps on a language's support sentences in an episode", low=1)
    inner_lr: float = setting(
        0.005, "learning rate of those steps, of everything but the encoder (published for mBERT: 1e-4)", above=0
    )
    inner_encoder_lr: float = setting(
        0.005,
        "the same of the encoder, with the word embeddings of the small one (published for mBERT: 1e-5)",
        low=0,
    )
    support_sentences: int = setting(8, "sentences of a support batch", low=1)
    query_sentences: int = setting(8, "sentences that a language's meta-gradient is computed on (FOMAML)", low=1)
    meta_batch: int | None = setting(None, "languages per episode, drawn anew for each; all if not given", low=1)
    meta_lr: float | None = setting(
        None,
        "peak learning rate of the episodes' outer steps (not of a pretrained encoder); lr if not given",
        above=0,
        high=1,
    )
    steps: int = setting(1500, "optimiser steps in all; 600 if not given on the embedded languages", low=1)
    batch_size: int = setting(32, "sentences per step, over all languages and processes", low=1)
    seed: int = setting(0, "of weights, sentence order, dropout and random masks", low=0, high=2**32 - 1)
    precision: str = setting("no", "numbers in matrix products: float32 (no) or bfloat16 (bf16)", choices=PRECISIONS)
    resume: bool = setting(False, "go on from the last checkpoint in `out`, with the settings of that run")
    lr: float = setting(3e-4, "peak learning rate (of everything but a pretrained encoder)", above=0, high=1)
    encoder_lr: float = setting(3e-5, "peak learning rate of a pretrained encoder", above=0, high=1)
    warmup: float = setting(0.05, "share of the steps in which the learning rate climbs", low=0, below=1)
    schedule: str = setting("cosine", "how the learning rate falls to the end", choices=SCHEDULES)
    optimizer: str = setting(
        "adamw",
        "AdamW, or one that leaves alone what no language of a batch owns (live)",
        choices=OPTIMIZERS,
    )
    weight_decay: float = setting(0.01, "AdamW's, on matrices only", low=0, high=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
    eval_every: int = setting(250, "steps between dev scores; 0: only at the end", low=0)
    dev_sentences: int = setting(100, "dev sentences per language that are scored during training; 0: all", low=0)
    checkpoint_every: int = setting(250, "steps between checkpoints; 0: only at the switch and at the end", low=0)
    keep_checkpoints: int = setting(
        2, "how many of the last checkpoints stay, beside that of the switch; 0: all, for `fastmask analyze`", low=0
    )
    log_every: int = setting(10, "steps between lines of the metrics file", low=1)
    temperature: float = setting(
        0.0, "languages are drawn in proportion to size ** temperature; 0: equally", low=0, high=1
    )
    discover_at: float = setting(
        0.6, "share of the steps, on the full network, after which subnetworks and episodes begin", low=0, below=1
    )
    subtypes: str = setting("drop", "subtypes of relations (nsubj:pass)", choices=SUBTYPES)
    max_length: int = setting(512, "words or pieces per training sentence; longer ones are left out of training", low=4)
    tensorboard: bool = setting(False, "write TensorBoard files into `out`")
    device: str = setting("auto", "where to compute: a GPU where there is one (auto), cpu or cuda", choices=DEVICES)
    threads: int | None = setting(None, "CPU threads; PyTorch's choice if not given", low=1)

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
    def warmup_steps(self) -> int:
        """Steps in which the learning rate climbs."""
        return round(self.steps * self.warmup)

    def validate(self) -> None:
        """Check types, ranges, and what must fit together.

        Raises:
            ConfigError: the first setting that is wrong.
        """
        super().validate()
        if self.switch_step is not None and self.switch_step >= self.steps:
            raise ConfigError(
                f"discover_at is {self.discover_at} "
                f"(expected less: it leaves none of the {self.steps} steps for what comes after the switch)"
            )
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
