"""Which subnetworks a run trains: found per language (`static`, `dynamic`), or one of the controls made from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from fastmask.discovery import COMPARING, Draw, Importance, Round, combine, discover, importance
from fastmask.dynamic import DynamicSubnetworks
from fastmask.models import attach, detach
from fastmask.models.contexts import evaluating
from fastmask.models.structure import structure_of
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import permuted_like, random_like, shared_like, shuffled
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import TrainConfig
from fastmask.training.engine import preserved_random_state

SCORING_BATCH = 32  # sentences; the scores do not depend on it


@dataclass(frozen=True)
class SwitchPoint:
    """Where a run changes from the full network to subnetworks."""

    task: Task  # with the full network as trained so far, nothing attached; weights must come back unchanged
    datasets: Splits  # by language and split, as given to `train`
    train: dict[str, Any]  # the training examples of every language
    config: TrainConfig


def subnetworks_of(
    point: SwitchPoint,
    on_round: Callable[[Round], None] | None = None,
    on_draws: Callable[[list[Draw]], None] | None = None,
) -> Subnetworks:
    """The subnetworks that the run's method trains, from where they are switched on; the same in every process.

    Several draws are joined by vote, after `on_draws` has been called with all of them. Processes share the languages.
    """
    config, process = point.config, PartialState()
    if config.masks is not None:
        found = Subnetworks.load(config.masks).select(point.train)
    else:
        dev = {code: splits["dev"] for code, splits in point.datasets.items() if "dev" in splits}
        mine = list(point.train)[process.process_index :: process.num_processes]
        draws = gather_object(draws_for(point.task, point.train, dev, config, on_round, only=mine))
        if on_draws is not None:
            on_draws(draws)
        vote = "majority" if config.density is None else "most"
        found = combine(draws, vote).select(list(point.train))
    return _trained(found, point.task, config)


def _trained(found: Subnetworks, task: Task, config: TrainConfig) -> Subnetworks:
    """What the method makes of the subnetworks that were found; most methods are controls."""
    if config.method == "random":  # the number of live units of every language and layer
        return random_like(found, config.seed, task.encoder)
    if config.method == "permuted":  # also what languages have in common
        return permuted_like(found, config.seed, task.encoder)
    if config.method == "shuffled":  # every language the mask of one that is most unlike it
        return shuffled(found)
    if config.method == "shared":  # the same for all, as large in every layer as theirs are on average
        return shared_like(found)
    return found  # `static` trains them, and `dynamic` starts from them


def check_subnetworks(task: Task, config: TrainConfig, languages: Iterable[str]) -> None:
    """See, before anything is trained, that `subnetworks_of` will return something that fits the model.

    Raises OSError, ValueError or KeyError for a masks file, a density, a score or a method that does not.
    """
    if config.method in ("full", "vector"):  # every language owns all units
        return
    languages = list(languages)
    if config.method == "shuffled" and len(languages) < 2:
        raise ValueError(f"method is 'shuffled' (expected another one with a single language, {languages[0]})")
    if config.masks is None:
        if config.score in COMPARING and len(languages) < 2:
            only = f"expected another with a single language, {languages[0]}"
            raise ValueError(f"score is {config.score!r}, which compares languages ({only})")
        if config.score == "shapley" and config.units != "heads":
            raise ValueError(f"score is 'shapley', which is of heads, and units is {config.units!r} (expected heads)")
        if config.method == "dynamic" and config.density == 1:
            raise ValueError("density is 1.0 (expected less with method dynamic: there would be no unit to swap)")
        _check_density(task, config)
        return
    attach(task.encoder, _trained(Subnetworks.load(config.masks).select(languages), task, config))
    try:
        if config.method == "dynamic":
            DynamicSubnetworks(task.encoder)
    finally:
        detach(task.encoder)


def _check_density(task: Task, config: TrainConfig) -> None:
    """A subnetwork needs a unit in every layer; a density that asks for less cannot be kept."""
    structure = structure_of(task.encoder)
    for kind in ("heads", "neurons") if config.units == "both" else (config.units,):
        sizes = structure.sizes(kind)
        kept = sum(sizes) if config.density is None else round(config.density * sum(sizes))
        if kept < len(sizes):
            raise ValueError(
                f"density is {config.density}: that is {kept} of the {sum(sizes)} {kind}, "
                f"which would kill a layer (expected at least {len(sizes) / sum(sizes):g}: one in each layer)"
            )


def draws_for(
    task: Task,
    train: Mapping[str, Any],
    dev: Mapping[str, Any],
    config: TrainConfig,
    on_round: Callable[[Round], None] | None = None,
    only: Sequence[str] | None = None,
) -> list[Draw]:
    """Find one subnetwork for each language of `train`, or of `only` some, `config.draws` times; nothing is attached.

    With `only`, which may be none, other processes call this with the other languages, and a score that compares
    languages is of all of them.

    Units are scored on training examples of each language, drawn by the run's seed, the draw, and the language's place.
    Without a density, pruning goes by tau, a share of the score (`Task.metric`) on the rows of `dev`; a language that
    has none, and a task whose metric is better when lower, by the loss on the scoring examples (`discover`).
    """
    _check_density(task, config)
    names = list(train) if only is None else only
    by_score = [name for name in train if name in dev and config.density is None and task.higher_is_better]
    some = {name: task.examples(some_rows(dev[name], config.dev_sentences)) for name in by_score}
    scored = {name: examples for name, examples in some.items() if task.has_answers(examples)}

    def metric(name: str) -> float | None:
        return task.score(scored[name], task.predict(scored[name]))[task.metric] if name in scored else None

    def batches(name: str, draw: int) -> list[Any]:
        """Of random examples, alike in length."""
        examples, generator = train[name], np.random.default_rng([config.seed, list(train).index(name), draw])
        rows = generator.permutation(len(examples))[: config.score_sentences]
        rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
        firsts = range(0, len(rows), SCORING_BATCH)
        return [task.collate(examples.select(rows[first : first + SCORING_BATCH])) for first in firsts]

    def gather(mine: dict[str, Importance]) -> dict[str, Importance]:
        """Of all processes, in the order of the languages: sums then do not depend on which process had which."""
        every = dict(gather_object(list(mine.items())))
        return {name: every[name] for name in train}

    found = []
    for draw in range(config.draws):
        if not names:  # more processes than languages
            if config.score in COMPARING:
                gather({})  # the others wait for it
            continue
        scores: dict[str, Any] = {}
        with evaluating(task.model):  # batches, too: some tasks draw what is predicted while they train
            subnets = discover(
                task.encoder,
                {name: batches(name, draw) for name in names},
                lambda batch: task.loss(batch.to(task.device)).each,
                metric,
                score=config.score,
                units=config.units,
                tau=config.tau,
                density=config.density,
                on_round=on_round,
                on_scores=scores.__setitem__,
                gather=None if only is None else gather,
            )
        found.append(Draw(subnets, scores))
    return found


def training_data(task: Task, datasets: Splits, config: TrainConfig) -> dict[str, Any]:
    """The training examples of every language: `config.train_sentences` of its rows, those that can be trained on.

    Warns where a language has fewer.
    """
    rows = {name: splits["train"] for name, splits in datasets.items()}
    if limit := config.train_sentences:
        rows = {name: some_rows(of, limit) for name, of in rows.items()}
        if fewer := [f"{name} {len(of):,}" for name, of in rows.items() if len(of) < limit]:
            warnings.warn(f"fewer training rows than train_sentences, {limit:,}: {', '.join(fewer)}", stacklevel=2)
    return {name: task.training_examples(of, name) for name, of in rows.items()}


def some_rows(rows: Iterable[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """`limit` random rows in their order, all for 0; always the same ones, so that all runs score alike.

    The first rows of a treebank are often of one source.
    """
    known: Any = rows if hasattr(rows, "__getitem__") else list(rows)
    if not limit or limit >= len(known):
        return list(known)
    return [known[int(row)] for row in np.sort(np.random.default_rng(0).permutation(len(known))[:limit])]


def scores_for_update(task: Task, train: Mapping[str, Any], config: TrainConfig, step: int) -> dict[str, Importance]:
    """Score the units of all subnetworks attached to the encoder, for an update of dynamic masks after `step` steps.

    On training examples drawn by the seed, the step and the language's place, so a resumed run has the same ones.
    """
    found, process = [], PartialState()
    with preserved_random_state(task.device), evaluating(task.model):
        for place, (name, examples) in list(enumerate(train.items()))[process.process_index :: process.num_processes]:
            generator = np.random.default_rng([config.seed, step, place])
            rows = generator.permutation(len(examples))[: config.update_sentences]
            batch = task.collate(examples.select(rows)).to(task.device)
            found.append((name, importance(task.encoder, [batch], lambda batch: task.loss(batch).each, name)))
    return dict(gather_object(found))
