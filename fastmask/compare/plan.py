"""What a comparison consists of: its settings, and its jobs with what each of them needs.

Everything of one seed starts from the same full network, trained in mixed batches for the first `discover_at` share of
the steps (job ``seed-0/start``, which also finds the subnetworks). Each cell, ``seed-0/static-fomaml`` say, then goes
on from that checkpoint exactly as an unbroken ``fastmask train --method static --meta fomaml`` would: same steps, same
sentences, same schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmask.files import Record, is_leftover, read_yaml, write_yaml
from fastmask.settings import ConfigError, Settings, items_of, named_errors, setting
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import METAS, METHODS, TrainConfig
from fastmask.unseen.adapting import OPTIMIZERS
from fastmask.unseen.choosing import CHOICES

__all__ = ["RESERVED", "SETTINGS_FILE", "CompareConfig", "Job", "Plan", "check_languages", "jobs_of"]

SETTINGS_FILE = "compare.yaml"
RESERVED = ("data", "languages", "method", "meta", "masks", "out", "seed", "resume", "tensorboard", "keep_checkpoints")
"""Settings of training that the comparison itself decides."""


@dataclass
class CompareConfig(Settings):
    """Settings of a comparison beside those of training, which all cells share."""

    train: str = setting("", "comma-separated codes or treebank names of the training languages", list=True)
    unseen: str = setting("", "those of the languages that are only adapted to and tested on", list=True)
    seeds: int = setting(3, "how many seeds; 0, 1, 2, ...", low=1, high=1000)
    methods: str = setting(",".join(METHODS), "which subnetworks to compare", choices=METHODS, list=True)
    metas: str = setting("none,fomaml", "with which meta-learning", choices=METAS, list=True)
    choose: str = setting(
        "nearest", "how an unseen language gets its subnetwork before it is adapted to", choices=CHOICES
    )
    shots: int = setting(20, "sentences in a support set of an unseen language", low=1)
    support_sets: int = setting(3, "random support sets for each unseen language", low=1)
    adapt_steps: int = setting(5, "gradient steps on a support set", low=1)
    adapt_optimizer: str = setting("sgd", "what takes those steps", choices=OPTIMIZERS)
    adapt_lr: float = setting(0.01, "learning rate of those steps, outside the encoder", above=0)
    adapt_encoder_lr: float = setting(0.003, "learning rate of those steps, encoder", low=0)
    test_sentences: int = setting(200, "test sentences per language, drawn once; 0: all", low=0)

    @property
    def method_list(self) -> list[str]:
        """The methods, in the order asked for."""
        return list(dict.fromkeys(items_of(self.methods)))

    @property
    def meta_list(self) -> list[str]:
        """The kinds of meta-learning, in the order asked for."""
        return list(dict.fromkeys(items_of(self.metas)))


@dataclass(frozen=True)
class Job:
    """One unit of work, a folder in the comparison's.

    Attributes:
        name: ``seed-0/start`` or ``seed-0/METHOD-META``.
        seed: of everything random in it.
        method: None for the start that all cells of a seed share.
        meta: "none", "fomaml" or "reptile".
        needs: name of the job that must be done first, or None.
    """

    name: str
    seed: int
    method: str | None = None
    meta: str = "none"
    needs: str | None = None


class _Stored(Record):
    """What ``compare.yaml`` holds."""

    comparison: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A comparison in a folder: ``compare.yaml`` holds all of it but where the data is.

    Attributes:
        out: the folder.
        data: where the data is.
        config: settings of the comparison.
        training: settings of every run in it, as given; the rest are the defaults of `TrainConfig`.
    """

    out: Path
    data: str
    config: CompareConfig
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Reject settings that the comparison decides itself."""
        for name in self.training:
            if name in RESERVED:
                raise ConfigError(f"{name} is a setting of single runs (a comparison decides it)")
        for job in self.jobs:
            self.train_config(job, self.out)

    @classmethod
    def stored(cls, out: Path, data: str = "") -> Plan:
        """The comparison that a folder holds.

        Raises:
            FileNotFoundError: it holds none.
            FileError: ``compare.yaml`` is damaged.
            ConfigError: a setting in it is wrong.
            FastmaskKeyError: a name in it that is no setting.
        """
        file = out / SETTINGS_FILE
        stored: _Stored = read_yaml(file, _Stored)
        with named_errors(file):
            return cls(out, data, CompareConfig.from_dict(stored.comparison), stored.training)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What ``compare.yaml`` holds."""
        return {"comparison": dataclasses.asdict(self.config), "training": dict(self.training)}

    @property
    def jobs(self) -> list[Job]:
        """Every job, the starts first."""
        return jobs_of(self.config)

    def folder(self, job: Job | str) -> Path:
        """Where a job keeps its files."""
        return self.out / (job if isinstance(job, str) else job.name)

    def train_config(self, job: Job, out: Path) -> TrainConfig:
        """The settings of the run that `job` trains in the folder `out`.

        Raises:
            ConfigError: they do not fit one another.
        """
        return TrainConfig.from_dict(
            {
                **self.training,
                "data": self.data,
                "languages": self.config.train,
                "method": job.method or "static",
                "meta": job.meta,
                "seed": job.seed,
                "out": str(out),
                "resume": True,
            }
        )

    @property
    def task(self) -> type[Task]:
        """The class of the task of every run."""
        return self.train_config(self.jobs[0], self.out).task_class

    def load(self, languages: str, **splits: Any) -> Splits:
        """Rows of some of the languages, see `Task.load`."""
        config = self.train_config(self.jobs[0], self.out)
        return config.task_class.load(self.data, languages, config.task_settings, **splits)

    def open(self) -> None:
        """Write the settings, or see that the folder holds this very comparison.

        Raises:
            ConfigError: it holds something else, or a comparison with other settings.
            FileError: ``compare.yaml`` is damaged.
        """
        file, mine = self.out / SETTINGS_FILE, self.settings
        if file.is_file():
            theirs = Plan.stored(self.out).settings
            differences = [
                f"{name} was {theirs[part].get(name)!r} and is {mine[part].get(name)!r}"
                for part in mine
                for name in sorted({*mine[part], *theirs[part]} - {"threads", "device"})
                if mine[part].get(name) != theirs[part].get(name)
            ]
            if differences:
                raise ConfigError(
                    f"{file} has other settings: {', '.join(differences)} "
                    "(expected the same to go on with it, or a new folder)"
                )
            return
        if self.out.is_dir() and not all(is_leftover(path.name) for path in self.out.iterdir()):
            raise ConfigError(f"out is {str(self.out)!r}, which is not empty and holds no comparison")
        write_yaml(file, mine, follow=False)


def jobs_of(config: CompareConfig) -> list[Job]:
    """The jobs of a comparison: for each seed the start, then its cells. Seeds come one after the other."""
    jobs = []
    for seed in range(config.seeds):
        start = Job(f"seed-{seed}/start", seed)
        cells = [
            Job(f"seed-{seed}/{method}-{meta}", seed, method, meta, start.name)
            for meta in config.meta_list
            for method in config.method_list
        ]
        jobs += [start, *cells]
    return jobs


def check_languages(plan: Plan) -> None:
    """See that both lists name languages, and none twice.

    Raises:
        ConfigError: an empty list, or a language that is in both.
        FileNotFoundError, FastmaskKeyError: no such data, or a language that is not there; the nearest are named.
    """
    for name in ("train", "unseen"):
        if not items_of(getattr(plan.config, name)):
            raise ConfigError(f"{name} names no language (expected codes or treebank names, as in en,UD_Czech-CAC)")
    train, unseen = (plan.load(languages, splits=("test",)) for languages in (plan.config.train, plan.config.unseen))
    both = [code for code in unseen if code in train]
    if both:
        raise ConfigError(f"{', '.join(both)} is in both train and unseen (expected an unseen language to be unseen)")
