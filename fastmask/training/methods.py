"""Which subnetworks a run trains: found per language (`static`, `dynamic`), or one of the controls made from them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.discovery import COMPARING, Draw, Quality, Round, combine, discover, measure
from fastmask.dynamic import DynamicSubnetworks
from fastmask.files import FileError, read_sealed, write_sealed
from fastmask.models import attach, detach
from fastmask.models.attach import attached
from fastmask.models.modes import evaluating
from fastmask.models.structure import Geometry
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import permuted_like, random_like, shared_like, shuffled
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import TrainConfig
from fastmask.training.engine import gathered, preserved_random_state

__all__ = [
    "DynamicMasks",
    "SwitchPoint",
    "check_subnetworks",
    "digest_of_masks",
    "draws_for",
    "quality_for",
    "some_rows",
    "subnetworks_of",
]

SCORING_BATCH = 32  # sentences; the scores do not depend on it


@dataclass(frozen=True)
class SwitchPoint:
    """Where a run changes from the full network to subnetworks.

    Attributes:
        task: its model is the full network after `step` steps, nothing attached. Weights must come back unchanged.
        datasets: by language and split, as given to `train`.
        train: the training examples of every language.
        config: the run's settings.
        step: steps done.
        process: which of `processes` this is; each finds the subnetworks of some of the languages.
        processes: how many there are.
    """

    task: Task
    datasets: Splits
    train: dict[str, Any]
    config: TrainConfig
    step: int
    process: int = 0
    processes: int = 1


def subnetworks_of(
    point: SwitchPoint,
    on_round: Callable[[Round], None] | None = None,
    on_draws: Callable[[list[Draw]], None] | None = None,
) -> Subnetworks:
    """The subnetworks that the run's method trains, at the step where they are switched on.

    `dynamic` starts as `static` does. The others are controls made from the static subnetworks: `random` keeps the
    number of live units of every language and layer, `permuted` also what languages have in common, `shuffled` gives
    every language the mask of one that is most unlike it, and `shared` gives all of them the same mask, as large in
    every layer as theirs are on average. Several draws are joined by vote, after `on_draws` has been called with all of
    them. Several processes share the languages; each of them returns the same.
    """
    config = point.config
    if config.masks is not None:
        found = Subnetworks.load(config.masks).select(point.train)
    else:
        dev = {code: splits["dev"] for code, splits in point.datasets.items() if "dev" in splits}
        mine = list(point.train)[point.process :: point.processes]
        draws = gathered(draws_for(point.task, point.train, dev, config, on_round, only=mine) if mine else [])
        if on_draws is not None:
            on_draws(draws)
        found = combine(draws, density=config.density).select(list(point.train))
    return _trained(found, config)


def check_subnetworks(task: Task, config: TrainConfig, languages: Iterable[str]) -> None:
    """See, before anything is trained, that `subnetworks_of` will return something that fits the model.

    Raises:
        OSError, ValueError, KeyError: the masks file cannot be read, is of another model or lacks a language, or the
            density would leave a layer without a live head or neuron.
    """
    if config.method == "full":
        return
    languages = list(languages)
    if config.method == "shuffled" and len(languages) < 2:
        raise ValueError(f"method is 'shuffled' (expected another one with a single language, {languages[0]})")
    if config.masks is None:
        _check_density(task, config)
        return
    attach(task.encoder, _trained(Subnetworks.load(config.masks).select(languages), config))
    try:
        if config.method == "dynamic":
            DynamicSubnetworks(task.encoder, config.strategy)
    finally:
        detach(task.encoder)


def _check_density(task: Task, config: TrainConfig) -> None:
    """A subnetwork needs a unit in every layer; a density that asks for less cannot be kept."""
    if config.density is None:
        return
    geometry = Geometry.of(task.encoder)
    for kind in ("heads", "neurons"):
        if config.units not in (kind, "both"):
            continue
        sizes = geometry.sizes(kind)
        kept = round(config.density * sum(sizes))
        if kept < len(sizes):
            raise ValueError(
                f"density is {config.density}: that is {kept} of the {sum(sizes)} {kind}, which would kill a layer "
                f"(expected at least {len(sizes) / sum(sizes):g}: one in each of the {len(sizes)} layers)"
            )


def _trained(found: Subnetworks, config: TrainConfig) -> Subnetworks:
    """The subnetworks of the run's method, from those found."""
    controls = {
        "random": lambda: random_like(found, config.seed),
        "permuted": lambda: permuted_like(found, config.seed),
        "shuffled": lambda: shuffled(found),
        "shared": lambda: shared_like(found),
    }
    return controls[config.method]() if config.method in controls else found


def draws_for(
    task: Task,
    train: Mapping[str, Any],
    dev: Mapping[str, Any],
    config: TrainConfig,
    on_round: Callable[[Round], None] | None = None,
    only: Sequence[str] | None = None,
) -> list[Draw]:
    """Find one subnetwork for each language of `train`, `config.draws` times, in a model with nothing attached.

    Args:
        task: fine-tuned; comes back as it was.
        train: training examples by language; `config.score_sentences` of each are drawn to score units on. Which ones
            depends on the run's seed, the draw, and the language's place.
        dev: development rows by language, for tau, which is a share of their score (`Task.metric`); a language without
            any, and a task whose metric is better when lower, goes by the loss on the scoring examples
            (`discovery.Quality`).
        config: `score`, `units`, `density`, `tau`, `draws`, `score_sentences`, `dev_sentences` and `seed` are read.
        on_round: called after each round of pruning.
        only: of some languages of `train`, if given; the same as of all.

    Raises:
        ValueError: a density that would leave a layer without a live head or neuron.
    """
    _check_density(task, config)
    # A score that compares languages needs all of them, whichever are asked for.
    names = list(train) if only is None or config.score in COMPARING else only
    found = []
    for draw in range(config.draws):
        scores: dict[str, Any] = {}
        with _scoring(task, train, dev if config.density is None else {}, config, draw) as by:
            subnets = discover(
                task.encoder,
                {name: by.batches[name] for name in names},
                by.loss,
                by.metric,
                score=config.score,
                units=config.units,
                tau=config.tau,
                density=config.density,
                on_round=on_round,
                on_scores=scores.__setitem__,
            )
        found.append(Draw(subnets if only is None else subnets.select(only), scores))
    return found


def quality_for(
    task: Task, train: Mapping[str, Any], dev: Mapping[str, Any], config: TrainConfig, subnets: Subnetworks
) -> dict[str, tuple[Quality, Quality]]:
    """By language of `train`, how good the full network and its subnetwork are.

    That is what `draws_for` would go by in its first draw. `subnets` may have further languages.
    """
    full = subnets.map(torch.ones_like)
    with _scoring(task, train, dev, config, draw=0) as by:
        return {
            name: (
                measure(task.encoder, full, name, by.batches[name], by.loss, by.metric),
                measure(task.encoder, subnets, name, by.batches[name], by.loss, by.metric),
            )
            for name in train
        }


@dataclass(frozen=True)
class _Scoring:
    """What pruning goes by: batches of scoring examples, the loss of each, and a dev score where there is one."""

    batches: dict[str, list[Any]]
    loss: Callable[[Any], Tensor]
    metric: Callable[[str], float | None]


@contextmanager
def _scoring(
    task: Task, train: Mapping[str, Any], dev: Mapping[str, Any], config: TrainConfig, draw: int
) -> Iterator[_Scoring]:
    """Draw and prepare the examples; the model is in eval mode for the time."""
    batches = {
        language: _batches(task, examples, config.score_sentences, np.random.default_rng([config.seed, position, draw]))
        for position, (language, examples) in enumerate(train.items())
    }
    wanted = {code: rows for code, rows in dev.items() if code in train} if task.higher_is_better else {}
    prepared = {code: task.examples(some_rows(rows, config.dev_sentences)) for code, rows in wanted.items()}

    def loss(batch: Any) -> Tensor:
        return task.loss(batch.to(task.device)).each

    def metric(language: str) -> float | None:
        if language not in prepared:
            return None
        return task.score(prepared[language], task.predict(prepared[language]))[task.metric]

    with evaluating(task.model):
        yield _Scoring(batches, loss, metric)


def some_rows(rows: Iterable[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """`limit` random rows in their order, all for 0; always the same ones, so that all runs score alike.

    The first rows of a treebank are often of one source.
    """
    known: Any = rows if hasattr(rows, "__getitem__") else list(rows)
    count = len(known)
    if not limit or limit >= count:
        return list(known)
    return [known[int(row)] for row in np.sort(np.random.default_rng(0).permutation(count)[:limit])]


def _batches(task: Task, examples: Any, count: int, generator: np.random.Generator) -> list[Any]:
    """Batches of `count` random examples, alike in length."""
    rows = generator.permutation(len(examples))[:count]
    rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
    return [
        task.collate(examples.select(rows[first : first + SCORING_BATCH]))
        for first in range(0, len(rows), SCORING_BATCH)
    ]


def digest_of_masks(config: TrainConfig) -> str | None:
    """SHA-256 of the masks that are given to a run, if any are: of what they say, as equal ones differ in bytes."""
    if config.masks is None or config.method == "full":
        return None
    subnets = Subnetworks.load(config.masks)
    kinds = {"heads": subnets.heads, "neurons": subnets.neurons, **(subnets.weights or {})}
    digest = hashlib.sha256(repr(subnets.languages).encode())
    for name, keep in sorted(kinds.items()):
        if keep is not None:
            digest.update(f"{name} {tuple(keep.shape)} ".encode() + keep.numpy().tobytes())
    return digest.hexdigest()


class DynamicMasks:
    """The masks of a run whose encoder has subnetworks attached, updated about every `config.update_every` steps.

    That is: when the run's step, which an episode may move by several, reaches or passes a multiple of it, up to
    `config.last_mask_step`: masks that change at the end would never be trained.

    Each update scouts `config.scout_sentences` training examples of every language. Which ones depends on the seed,
    the step and the language alone, so a resumed run scouts the same.
    """

    def __init__(self, task: Task, train: Mapping[str, Any], config: TrainConfig, accelerator: Any) -> None:
        self.task, self.train, self.config, self.accelerator = task, train, config, accelerator
        self.masks = DynamicSubnetworks(task.encoder, config.strategy, every=1, until=config.last_mask_step)
        self._began = (0.0, time.perf_counter())

    @property
    def subnetworks(self) -> Subnetworks:
        """The masks as they are now."""
        subnets: Subnetworks = attached(self.task.encoder).subnets
        return subnets

    @property
    def scouting_share(self) -> float:
        """Share of the time, since this object was made or resumed, that went into looking for better masks."""
        seconds, since = self._began
        return (self.masks.seconds - seconds) / (time.perf_counter() - since)

    def update(self, step: int) -> list[str]:
        """Update the masks after `step` steps, unless they are frozen; returns the languages whose masks changed."""
        if not self.masks.due(step):
            return []
        # Dropout would add noise to the scores.
        with evaluating(self.task.model), preserved_random_state(self.accelerator.device):
            for position, (language, examples) in enumerate(self.train.items()):
                self.masks.scout(language, self._batch(step, position, examples), self._loss)
        return self.masks.update(step, self._sum_over_processes)

    def _batch(self, step: int, position: int, examples: Any) -> Any:
        seed = [self.config.seed, step, position, self.accelerator.process_index]
        rows = np.random.default_rng(seed).permutation(len(examples))[: self.config.scout_sentences]
        return self.task.collate(examples.select(rows)).to(self.accelerator.device)

    def _loss(self, batch: Any) -> Tensor:
        return self.task.loss(batch).each

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return summed.to(tensor.device)

    def save(self, path: Path) -> None:
        """Write averages, scores and the history of all masks, for `fastmask.analysis.movement.read_history`."""
        state = self.masks.state_dict()
        write_sealed(path, state["tensors"], {"header": json.dumps(state["header"])})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; the masks attached to the encoder become those of the file.

        Raises:
            FileError: the file is damaged, or of other masks.
        """
        tensors, header = read_sealed(path)
        try:
            self.masks.load_state_dict({"tensors": tensors, "header": json.loads(header["header"])})
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(path, f"does not fit the run's subnetworks: {error}") from None
        self._began = (self.masks.seconds, time.perf_counter())
