"""All settings of a training run in one dataclass, which a YAML file or the command line fills in."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastmask.dynamic.dynamic import STRATEGIES
from fastmask.errors import unknown
from fastmask.parsing.vocabulary import SUBTYPES
from fastmask.subnetworks.subnetworks import UNITS
from fastmask.training.device import DEVICES
from fastmask.training.schedule import SCHEDULES

__all__ = ["DEVICES", "METHODS", "PRECISIONS", "UNITS", "ConfigError", "TrainConfig"]

METHODS = ("full", "static", "dynamic", "random", "shared")
PRECISIONS = ("no", "bf16")


class ConfigError(ValueError):
    """A setting out of its range or of the wrong type; the message names it, what was given and what is allowed."""


def _option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a setting: `choices`, or `low`/`high` (inclusive unless `above`/`below`), and its help text."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class TrainConfig:
    """Settings of a run. Every field's `metadata` has "help" and the limits that `validate` checks."""

    data: str | None = _option(None, "folder of UD treebanks (UD_*/); the embedded synthetic languages if not given")
    languages: str | None = _option(None, "comma-separated codes or treebank names, as in en,ar,UD_Czech-CAC")
    method: str = _option(
        "static",
        "which subnetworks: none, found per language, found and then updated while training, random, or one shared",
        choices=METHODS,
    )
    out: str = _option("runs/run", "folder of the run: settings, metrics, checkpoints, masks, model")
    model: str = _option("small", "'small' (trained from scratch), or an encoder on disk or on the Hub")
    units: str = _option("both", "what a subnetwork is made of", choices=UNITS)
    density: float | None = _option(
        None, "share of units kept; a subnetwork is found by tau if not given", above=0, high=1
    )
    masks: str | None = _option(None, "file of subnetworks to train instead of finding them (`fastmask discover`)")
    score_sentences: int = _option(256, "training sentences per language that units are scored on", low=1)
    tau: float = _option(
        0.95, "prune while the dev score is at least tau times that of the full network", above=0, high=1
    )
    strategy: str = _option("swap", "how dynamic subnetworks are updated", choices=STRATEGIES)
    update_every: int = _option(100, "steps between updates of dynamic subnetworks", low=1)
    scout_sentences: int = _option(8, "training sentences per language that an update looks at, in each process", low=1)
    steps: int = _option(1500, "optimiser steps in all; 600 if not given on the embedded languages", low=1)
    batch_size: int = _option(32, "sentences per step, over all languages and processes", low=1)
    seed: int = _option(0, "of weights, sentence order, dropout and random masks", low=0, high=2**32 - 1)
    precision: str = _option("no", "numbers in matrix products: float32 (no) or bfloat16 (bf16)", choices=PRECISIONS)
    resume: bool = _option(False, "go on from the last checkpoint in `out`, with the settings of that run")
    lr: float = _option(3e-4, "peak learning rate (of everything but a pretrained encoder)", above=0, high=1)
    encoder_lr: float = _option(3e-5, "peak learning rate of a pretrained encoder", above=0, high=1)
    warmup: float = _option(0.05, "share of the steps in which the learning rate climbs", low=0, below=1)
    schedule: str = _option("cosine", "how the learning rate falls to the end", choices=SCHEDULES)
    weight_decay: float = _option(0.01, "AdamW's, on matrices only", low=0, high=1)
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm", above=0)
    eval_every: int = _option(250, "steps between dev scores; 0: only at the end", low=0)
    dev_sentences: int = _option(100, "dev sentences per language that are scored during training; 0: all", low=0)
    checkpoint_every: int = _option(250, "steps between checkpoints; 0: only at the switch and at the end", low=0)
    log_every: int = _option(10, "steps between lines of the metrics file", low=1)
    temperature: float = _option(
        0.0, "languages are drawn in proportion to size ** temperature; 0: equally", low=0, high=1
    )
    discover_at: float = _option(0.6, "share of the steps after which the subnetworks are switched on", low=0, below=1)
    subtypes: str = _option("drop", "subtypes of relations (nsubj:pass)", choices=SUBTYPES)
    max_length: int = _option(512, "words or pieces per training sentence; longer ones are left out of training", low=4)
    tensorboard: bool = _option(False, "write TensorBoard files into `out`")
    device: str = _option("auto", "where to compute: a GPU where there is one (auto), cpu or cuda", choices=DEVICES)
    threads: int | None = _option(None, "CPU threads; PyTorch's choice if not given", low=1)

    def __post_init__(self) -> None:
        """Validate."""
        self.validate()

    @property
    def language_list(self) -> list[str]:
        """The entries of `languages`."""
        return [item.strip() for item in (self.languages or "").split(",") if item.strip()]

    @property
    def switch_step(self) -> int | None:
        """Steps of the full network before the subnetworks are switched on; None for method `full`."""
        return None if self.method == "full" else round(self.steps * self.discover_at)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate climbs."""
        return round(self.steps * self.warmup)

    def validate(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: the first setting that is wrong.
        """
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata))
        if self.switch_step is not None and self.switch_step >= self.steps:
            raise ConfigError(
                f"discover_at is {self.discover_at} "
                f"(expected less: it leaves none of the {self.steps} steps for the subnetworks)"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from names and values.

        Raises:
            FastmaskKeyError: a name that is no setting; the nearest names are given.
            ConfigError: a value that is wrong.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("setting", name, names)
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML file of settings; what it does not name keeps its default.

        Raises:
            ConfigError: not YAML, or not a mapping, or a value that is wrong.
            FastmaskKeyError: a name that is no setting.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__} (expected settings, one 'name: value' per line)")
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as YAML."""
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the settings that make a resumed run another run: name -> (own value, the other's)."""
        free = {"resume", "out", "data", "threads", "tensorboard", "device"}
        own, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (own[name], others[name]) for name in own if name not in free and own[name] != others[name]}


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """Return `value` in the type of its field, or raise `ConfigError`."""
    if get_origin(hint) is None:
        kind, optional = hint, False
    else:
        kind, optional = next(a for a in get_args(hint) if a is not type(None)), True
    if value is None and optional:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is str and name == "languages" and isinstance(value, (list, tuple)):
        value = ",".join("no" if item is False else str(item) for item in value)  # a YAML list is as good
    if kind is str and value is False:
        value = "no"  # YAML 1.1 reads Norwegian, and "no" mixed precision, as false
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 3e-4 as text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{name} is {value!r} (expected {words[kind]})")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r} (expected one of {', '.join(choices)})")
    checks = [
        ("low", lambda v, b: v >= b, ">="),
        ("above", lambda v, b: v > b, ">"),
        ("high", lambda v, b: v <= b, "<="),
        ("below", lambda v, b: v < b, "<"),
    ]
    bounds = [(limits[key], holds, sign) for key, holds, sign in checks if key in limits]
    if bounds and not (math.isfinite(value) and all(holds(value, bound) for bound, holds, _ in bounds)):
        raise ConfigError(
            f"{name} is {value!r} (expected {' and '.join(f'{sign} {bound}' for bound, _, sign in bounds)})"
        )
    return value
