"""Which subnetworks a run trains: found per language (`static`, `dynamic`), or one of the controls made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmask.discovery import Importance, Quality, Round, discover, measure
from fastmask.dynamic import DynamicSubnetworks
from fastmask.models import attach, detach
from fastmask.models.structure import Geometry
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import random_like, shared_like, shuffled
from fastmask.tasks.parsing.batch import Batch, Encoded
from fastmask.tasks.parsing.evaluation import Prepared, evaluate, prepare
from fastmask.tasks.parsing.parser import Parser
from fastmask.training.config import TrainConfig
from fastmask.training.loop import SwitchPoint

__all__ = ["check_subnetworks", "discover_for_parser", "quality_for_parser", "subnetworks_of"]

SCORING_BATCH = 32  # sentences; the scores do not depend on it


def subnetworks_of(point: SwitchPoint, on_round: Callable[[Round], None] | None = None) -> Subnetworks:
    """The subnetworks that the run's method trains, at the step where they are switched on.

    `dynamic` starts as `static` does. The others are controls made from the static subnetworks: `random` keeps the
    number of live units of every language and layer, `shuffled` gives every language the mask of another one, and
    `shared` gives all of them the same mask, as large in every layer as theirs are on average.
    """
    config = point.config
    if config.masks is not None:
        found = Subnetworks.load(config.masks).select(point.train)
    else:
        dev = {code: splits["dev"] for code, splits in point.datasets.items() if "dev" in splits}
        found = discover_for_parser(point.parser, point.train, dev, config, config.seed, on_round)
    return _trained(found, config)


def check_subnetworks(parser: Parser, config: TrainConfig, languages: Iterable[str]) -> None:
    """See, before anything is trained, that `subnetworks_of` will return something that fits the parser.

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
        _check_density(parser, config)
        return
    attach(parser.encoder, _trained(Subnetworks.load(config.masks).select(languages), config))
    try:
        if config.method == "dynamic":
            DynamicSubnetworks(parser.encoder, config.strategy)
    finally:
        detach(parser.encoder)


def _check_density(parser: Parser, config: TrainConfig) -> None:
    """A subnetwork needs a unit in every layer; a density that asks for less cannot be kept."""
    if config.density is None:
        return
    geometry = Geometry.of(parser.encoder)
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
    if config.method == "random":
        return random_like(found, config.seed)
    if config.method == "shuffled":
        return shuffled(found, config.seed)
    if config.method == "shared":
        return shared_like(found)
    return found


def discover_for_parser(
    parser: Parser,
    train: Mapping[str, Encoded],
    dev: Mapping[str, Any],
    config: TrainConfig,
    seed: int,
    on_round: Callable[[Round], None] | None = None,
    on_scores: Callable[[str, Importance], None] | None = None,
) -> Subnetworks:
    """Find one subnetwork for each language of `train` in a parser whose encoder is not attached.

    Args:
        parser: fine-tuned; comes back as it was.
        train: training sentences by language; `config.score_sentences` of each are drawn to score units on.
        dev: development rows by language, for tau, which is a share of their LAS; a language without any goes by the
            loss on its scoring sentences (`discovery.Quality`).
        config: `units`, `density`, `tau`, `score_sentences` and `dev_sentences` are read.
        seed: of the draw of scoring sentences.
        on_round: called after each round of pruning.
        on_scores: see `discovery.discover`.

    Raises:
        ValueError: a density that would leave a layer without a live head or neuron.
    """
    _check_density(parser, config)
    with _scoring(parser, train, dev if config.density is None else {}, config, seed) as by:
        return discover(
            parser.encoder,
            by.batches,
            by.loss,
            by.las,
            units=config.units,
            tau=config.tau,
            density=config.density,
            on_round=on_round,
            on_scores=on_scores,
        )


def quality_for_parser(
    parser: Parser,
    train: Mapping[str, Encoded],
    dev: Mapping[str, Any],
    config: TrainConfig,
    seed: int,
    subnets: Subnetworks,
) -> dict[str, tuple[Quality, Quality]]:
    """By language of `train`, how good the full network and its subnetwork are.

    That is what `discover_for_parser` would go by with the same arguments.
    """
    full = subnets.map(torch.ones_like)
    with _scoring(parser, train, dev, config, seed) as by:
        return {
            name: (
                measure(parser.encoder, full, name, by.batches[name], by.loss, by.las),
                measure(parser.encoder, subnets, name, by.batches[name], by.loss, by.las),
            )
            for name in train
        }


@dataclass(frozen=True)
class _Scoring:
    """What pruning goes by: batches of scoring sentences, the loss of each sentence, and dev LAS where there is one."""

    batches: dict[str, list[Batch]]
    loss: Callable[[Batch], torch.Tensor]
    las: Callable[[str], float | None]


@contextmanager
def _scoring(
    parser: Parser, train: Mapping[str, Encoded], dev: Mapping[str, Any], config: TrainConfig, seed: int
) -> Iterator[_Scoring]:
    """Draw and prepare the sentences; the parser is in eval mode for the time."""
    device = next(parser.parameters()).device
    batches = {
        language: _batches(parser, encoded, config.score_sentences, np.random.default_rng([seed, position]))
        for position, (language, encoded) in enumerate(train.items())
    }
    limit = config.dev_sentences or None
    prepared: dict[str, Prepared] = {code: prepare(parser, rows, limit) for code, rows in dev.items() if code in train}

    def loss(batch: Batch) -> torch.Tensor:
        losses = parser(batch.to(device)).loss_per_sentence
        assert losses is not None  # training sentences have gold heads
        return losses

    def las(language: str) -> float | None:
        if language not in prepared:
            return None
        return evaluate(parser, {language: prepared[language]})[language].las

    was_training = parser.training
    parser.eval()
    try:
        yield _Scoring(batches, loss, las)
    finally:
        parser.train(was_training)


def _batches(parser: Parser, encoded: Encoded, count: int, generator: np.random.Generator) -> list[Batch]:
    """Batches of `count` random sentences, alike in length."""
    rows = generator.permutation(len(encoded))[:count]
    rows = rows[np.argsort(encoded.lengths[rows], kind="stable")]
    return [
        parser.features.collate(encoded.select(rows[first : first + SCORING_BATCH]))
        for first in range(0, len(rows), SCORING_BATCH)
    ]
