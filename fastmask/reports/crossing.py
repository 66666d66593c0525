"""Cross-evaluation of finished runs, and ablation of the heads of one of them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

import fastmask as fm
from fastmask.models import attach
from fastmask.reports.folders import Run, Study
from fastmask.reports.loading import Row, batches_of, data_for, score_of, task_of
from fastmask.reports.masks import first_masked
from fastmask.reports.sections import Gathered, SkipError
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import random_like
from fastmask.tasks.task import Task

__all__ = ["ablation", "cross", "cross_values", "mask_seed"]

CROSSED, ABLATED = 120, 128  # sentences of each language
SPLIT = "test"
FULL, RANDOM = "full", "random"  # columns beside the languages' own
CONTROL = "random"  # the variant that was trained through random masks


def cross(study: Study, found: Gathered) -> None:
    """The score of every language under every subnetwork, mean over seeds: of the first variant that has some.

    A model that was trained through any masks prefers each language's own, so where there is a variant of method
    `random`, it is done as well, to compare with.
    """
    variant, runs = first_masked(study)
    networks = {variant: [run for run, _ in runs]}
    if (others := study.variants.get(CONTROL)) and variant != CONTROL:
        networks[CONTROL] = others
    options, names = found.options, runs[0][1].languages
    data = data_for(runs[0][0], SPLIT, options.data, study.unseen)
    found.skip_all(data.missing)
    languages = sorted(data.splits, key=lambda name: name not in names)  # the training languages first
    if len(names) < 2:
        raise SkipError("there is one language, whose subnetwork can be exchanged with no other")
    if not languages:
        raise SkipError(f"none of the languages has a {SPLIT} split")
    n = options.sentences or CROSSED
    rows = {language: data.rows(language, SPLIT, n, options.seed) for language in languages}
    for of, of_seeds in networks.items():
        tables = []
        for run in of_seeds:
            with found.attempt(f"{of}, seed {run.config.seed}"):
                tables.append(_of_run(run, rows, found))
        if tables:
            _add(found, study.metric, of, pd.concat(tables, ignore_index=True), languages, names, n)


def _of_run(run: Run, rows: Mapping[str, Sequence[Row]], found: Gathered) -> pd.DataFrame:
    task, subnets = task_of(run, found.options, attached=False)
    assert subnets is not None
    values = cross_values(task, subnets, rows, found.options.seed)
    cells = [(run.config.seed, *pair, score) for pair, score in values.items()]
    return pd.DataFrame(cells, columns=["seed", "language", "subnetwork", "score"])


def _add(
    found: Gathered,
    metric: str,
    variant: str,
    table: pd.DataFrame,
    languages: Sequence[str],
    names: Sequence[str],
    n: int,
) -> None:
    means, seeds = table.groupby(["language", "subnetwork"])["score"].mean(), table.seed.nunique()
    result = fm.analysis.cross_evaluation(
        lambda a, b: float(means[a, b]), languages, names, controls=(FULL, RANDOM), seed=found.options.seed
    )
    unseen = len(set(languages) - set(names))
    note = (
        f"{metric}, mean over {seeds} seed{'s' if seeds > 1 else ''} of {variant}; at most {n} test sentences of each "
        f"language{f', of which {unseen} are unseen' if unseen else ''}. full: the full network of the same weights; "
        "random: a random mask with as many units in each layer as the language's own has, and of a language without "
        "one as another's has."
    )
    found.add(variant, dataclasses.replace(result, more={**result.more, "seeds": table}), variant, note=note)


def cross_values(
    task: Task, subnets: Subnetworks, rows: Mapping[str, Sequence[Row]], seed: int
) -> dict[tuple[str, str], float]:
    """The score of each language's rows under each subnetwork, the full network ("full") and a random mask ("random").

    Args:
        task: nothing is attached to its encoder.
        subnets: of L languages.
        rows: language -> rows with labels. The random mask of a language without a
            subnetwork has the sizes of the next of the L languages in turn.
        seed: of the random masks.
    """
    L = len(subnets.languages)
    controls = random_like(subnets, mask_seed(seed))
    named = controls.map(lambda keep: keep, [f"{RANDOM} {name}" for name in subnets.languages])
    attach(task.encoder, Subnetworks.stack([subnets, named]))
    values = {}
    for place, (language, given) in enumerate(rows.items()):
        own = language if language in subnets.languages else subnets.languages[place % L]
        networks = {**{name: name for name in subnets.languages}, FULL: None, RANDOM: f"{RANDOM} {own}"}
        values.update({(language, name): score for name, score in score_of(task, given, networks).items()})
    return values


def mask_seed(seed: int) -> int:
    """The seed of the random masks: not `seed` itself, by which a run of method random may have drawn its own."""
    return int(np.random.default_rng([seed, zlib.crc32(b"cross-evaluation")]).integers(2**31))


def ablation(study: Study, found: Gathered) -> None:
    """Every head flipped in every language's subnetwork, in the first seed of the first variant that has some."""
    variant, ((run, masks), *_) = first_masked(study)
    if masks.heads is None:
        raise SkipError("the subnetworks do not mask heads")
    options = found.options
    data = data_for(run, SPLIT, options.data)
    found.skip_all(data.missing)
    task, _ = task_of(run, options)
    n = options.sentences or ABLATED
    batches = {
        language: batches_of(task, data.rows(language, SPLIT, n, options.seed), language)
        for language in data.splits
        if language in masks.languages
    }
    if batches:
        result = fm.analysis.ablation(
            task.encoder, lambda batch: task.loss(batch).each, batches, whole=task.model, seed=options.seed
        )
        note = f"Sentences of the {SPLIT} split; loss: that of training."
        found.add(f"heads of {variant}, seed {run.config.seed}", result, variant, note=note)
