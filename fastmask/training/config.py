"""All settings of a training run, which a YAML file or the command line fills in, and what it spends by them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastmask.discovery import SCORES
from fastmask.meta.learner import ALGORITHMS
from fastmask.settings import ConfigError, Settings, items_of, setting
from fastmask.subnetworks.subnetworks import UNITS
from fastmask.tasks import task_class
from fastmask.tasks.task import Task, TaskSettings

METHODS = ("full", "static", "dynamic", "random", "permuted", "shuffled", "shared", "vector")
METAS = ("none", *ALGORITHMS)
DEVICES = ("auto", "cpu", "cuda")

_GROUPS = ("data", "model", "subnetworks", "meta-learning", "optimization", "logging")
_data, _model, _masks, _meta, _optim, _logging = (partial(setting, group=title) for title in _GROUPS)


@dataclass
class TrainConfig(Settings):
    """Settings of a run. Every field's `metadata` has "help", its "group" and the limits that are checked."""

    task: str = _data("parsing", "parsing, tagging, classification, lm, translation, or your own as module:Class")
    data: str | None = _data(None, "a folder, a file or a name on the Hub; a demonstration if not given")
    languages: str | None = _data(None, "codes, names or treebanks, as in en,UD_Czech-CAC; all if not given", list=True)
    task_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the task's own", "group": "data"})
    max_length: int = _data(512, "maximum words or pieces per example; a task drops or truncates longer ones", low=4)
    train_sentences: int = _data(0, "training examples per language, drawn alike in all runs; 0: all", low=0)
    temperature: float = _data(0.0, "languages are drawn by their size ** temperature; 0: uniformly", low=0, high=1)

    model: str = _model("small", "encoder on disk or on the Hub, or small: one that is trained from scratch (parsing)")
    precision: str = _model("no", "matrix products in float32 (no) or bfloat16 (bf16)", choices=("no", "bf16"))
    device: str = _model("auto", "where to compute; auto: on a GPU if there is one", choices=DEVICES)
    threads: int | None = _model(None, "number of CPU threads; PyTorch's choice if not given", low=1)

    method: str = _masks(
        "static",
        "which subnetworks to train: none (full), one found per language (static), the same but updated during "
        "training (dynamic, which has not been better than static), or a control: random ones, found ones moved to "
        "other units (permuted), another language's (shuffled), one for all languages (shared), or the full network "
        "with a learned vector per language (vector)",
        choices=METHODS,
    )
    units: str = _masks("both", "what subnetworks are made of", choices=UNITS)
    density: float | None = _masks(None, "share of units to keep; set by tau if not given", above=0, high=1)
    masks: str | None = _masks(None, "file of subnetworks to train, from `fastmask discover`, instead of finding them")
    score: str = _masks(
        "gradient",
        "how units are ranked: by the gradients of their gates, by the language's share of their activity (entropy), "
        "by these gradients minus those of other languages (relative), or by Shapley values of heads",
        choices=SCORES,
    )
    score_sentences: int = _masks(256, "training examples per language used to score units", low=1)
    draws: int = _masks(1, "how often to draw those examples; a language keeps the units that most draws keep", low=1)
    tau: float = _masks(
        0.95, "share of the full network's dev score (without dev data: of exp(-loss)) to keep", above=0, high=1
    )
    discover_at: float = _masks(
        0.6, "share of the steps that train the full network, before the switch to subnetworks", low=0, below=1
    )
    update_every: int = _masks(100, "steps between updates of dynamic subnetworks", low=1)
    freeze_masks: float = _masks(
        0.25, "dynamic masks no longer change in this last share of the steps that follow the switch", low=0, high=1
    )
    update_sentences: int = _masks(16, "training examples per language that an update scores units on", low=1)

    meta: str = _meta(
        "none", "what to train on after the switch: plain batches (none), or episodes of meta-learning", choices=METAS
    )
    meta_budget: str = _meta(
        "sentences",
        "what runs with and without meta-learning share: examples drawn (sentences), or optimizer steps (updates)",
        choices=("sentences", "updates"),
    )
    inner_steps: int = _meta(5, "SGD steps per episode on the support set of each language", low=1)
    inner_lr: float = _meta(0.03, "learning rate of the inner steps, outside the encoder", above=0)
    inner_encoder_lr: float | None = _meta(
        None,
        "learning rate of inner steps in the encoder; 0.01 for the small one, 0.001 for others if not given",
        low=0,
    )
    support_sentences: int = _meta(20, "examples in a support batch", low=1)
    query_sentences: int = _meta(20, "examples in a query batch, which gives the meta-gradient (FOMAML)", low=1)
    meta_batch: int | None = _meta(None, "languages sampled for each episode; all if not given", low=1)
    meta_lr: float | None = _meta(
        None, "peak learning rate of the outer steps, outside a pretrained encoder; lr if not given", above=0, high=1
    )
    meta_encoder_lr: float | None = _meta(
        None, "peak learning rate of the outer steps for a pretrained encoder; encoder_lr if not given", above=0, high=1
    )

    steps: int = _optim(1500, "number of training steps; 450 in the demonstration", low=1)
    batch_size: int = _optim(32, "examples per step, over all languages and processes; 64 in the demonstration", low=1)
    seed: int = _optim(0, "random seed for weights, order of examples, dropout and random masks", low=0, high=2**32 - 1)
    lr: float = _optim(1e-3, "peak learning rate, outside a pretrained encoder", above=0, high=1)
    encoder_lr: float | None = _optim(
        None, "peak learning rate of a pretrained encoder; 2e-4 * 384 / its width if not given", above=0, high=1
    )
    warmup: float = _optim(0.05, "share of the steps over which the learning rate warms up", low=0, below=1)
    schedule: str = _optim("cosine", "learning rate's decay after warmup", choices=("cosine", "linear", "constant"))
    freeze_embeddings: bool = _optim(
        False, "do not train or adapt the input embeddings (of a pretrained encoder: pieces, positions, token types)"
    )
    optimizer: str = _optim(
        "adamw",
        "AdamW (adamw), or one that skips weights and rows of embeddings that no example of the batch uses (live)",
        choices=("adamw", "live"),
    )
    conflict: str = _optim(
        "none",
        "where gradients of two languages conflict, do nothing (none), or remove what opposes the other (pcgrad)",
        choices=("none", "pcgrad"),
    )
    weight_decay: float = _optim(0.01, "weight decay of AdamW, applied to matrices only", low=0, high=1)
    max_grad_norm: float = _optim(1.0, "maximum norm of the gradient; larger ones are clipped", above=0)

    out: str = _logging("runs/run", "folder of the run: settings, metrics, checkpoints, masks, model")
    resume: bool = _logging(False, "continue from the last checkpoint in `out`, with the settings of that run")
    eval_every: int = _logging(250, "steps between evaluations on dev data; 0: only at the end", low=0)
    dev_sentences: int = _logging(100, "dev examples per language to score, drawn alike in all runs; 0: all", low=0)
    checkpoint_every: int = _logging(250, "steps between checkpoints; 0: only at the switch and at the end", low=0)
    keep_checkpoints: int = _logging(
        2, "latest checkpoints to keep, besides the one at the switch; 0: all, for `fastmask analyze`", low=0
    )
    log_every: int = _logging(10, "steps between lines of the metrics file", low=1)
    tensorboard: bool = _logging(False, "write TensorBoard files to `out`")

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
    def episode_sizes(self) -> tuple[int, int]:
        """Support and query sentences of a language in an episode; Reptile has a batch for each inner step."""
        if self.meta == "reptile":
            return self.support_sentences * self.inner_steps, 0
        return self.support_sentences, self.query_sentences

    def __post_init__(self) -> None:
        """Check types, ranges, and what must fit together."""
        super().__post_init__()
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
            raise ConfigError("inner_encoder_lr is 0.0 (expected > 0 with meta reptile, whose outer step it makes)")

    def identity(self) -> dict[str, Any]:
        """The settings that make a run this run and no other: all but where it is and how it is computed."""
        # Of masks the content counts, which checkpoints know (`MASKS_INPUT`), wherever the file is.
        free = {"resume", "out", "data", "masks", "threads", "tensorboard", "device", "keep_checkpoints"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the settings that make a resumed run another run: name -> (own value, the other's)."""
        own, others = self.identity(), other.identity()
        return {name: (own[name], others[name]) for name in own if own[name] != others[name]}


@dataclass(frozen=True)
class Budget:
    """What a run spends, by which runs with and without meta-learning are compared.

    An episode draws, for each of its languages, a support batch once however many inner steps it takes (Reptile draws
    one for each of them), and FOMAML's query batch. Gradient passes are forward and backward passes over a whole batch:
    one for a plain step; K, and for FOMAML one more, for each language of an episode. Updates of masks are not counted.
    """

    steps: int  # of the run, in all
    plain_steps: int  # of them, optimizer steps on one mixed batch each
    episodes: int  # optimizer steps on the meta-gradient of one episode each; 0 without meta-learning
    outer_steps: int  # steps of the optimizer in all: `plain_steps` + `episodes`
    episode_sentences: int  # different sentences that one episode draws
    sentences: int  # drawn in all; several epochs draw one several times
    gradient_passes: int

    @classmethod
    def of(cls, config: TrainConfig, n_languages: int) -> Budget:
        """That of a run with `n_languages` training languages; ConfigError if they, or the steps, hold no episode."""
        plain, episodes, drawn, passes = config.steps, 0, 0, 0
        if config.meta != "none":
            members = n_languages if config.meta_batch is None else config.meta_batch
            if members > n_languages:
                raise ConfigError(f"meta_batch is {members} (expected at most the number of languages, {n_languages})")
            support, query = config.episode_sizes
            drawn, passes = members * (support + query), members * (config.inner_steps + (query > 0))
            plain, left = config.shared_steps, config.steps - config.shared_steps
            episodes = left if config.meta_budget == "updates" else left * config.batch_size // drawn
            if episodes < 1:
                raise ConfigError(
                    f"an episode draws {drawn} sentences ({members} languages, {support} support and {query} query "
                    f"sentences), and the {left} steps after the switch have only {left * config.batch_size}: expected "
                    "more steps, fewer of support_sentences, query_sentences or meta_batch, or meta_budget updates"
                )
        sentences, gradient_passes = plain * config.batch_size + episodes * drawn, plain + episodes * passes
        return cls(config.steps, plain, episodes, plain + episodes, drawn, sentences, gradient_passes)

    def step_after(self, episode: int) -> int:
        """The run's step after episode number `episode` (from 1); the last one comes with the last episode."""
        return self.plain_steps + (self.steps - self.plain_steps) * episode // self.episodes

    def __str__(self) -> str:
        """One line for people."""
        of_episodes = f" ({self.plain_steps:,} plain, {self.episodes:,} episodes)" if self.episodes else ""
        return (
            f"{self.outer_steps:,} optimizer steps{of_episodes}, {self.sentences:,} training examples drawn, "
            f"{self.gradient_passes:,} gradient passes"
        )
