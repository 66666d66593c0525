"""Analyses that run a model under other masks than a language's own: cross-evaluation, specificity, ablation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from fastmask import analysis
from fastmask.models import attach
from fastmask.reports.page import Part
from fastmask.reports.runs import BASELINE, CONTROL, Row, Run, SkipError, batches_of, labelled, rows_for, task_of
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import random_like, without_own
from fastmask.tasks.task import Task

CROSSED, ABLATED = 120, 128  # examples of each language that models run on
Values = dict[tuple[str, str], float]  # (language, network) -> score


def cross(part: Part) -> None:
    """The score of every language under every subnetwork, mean over seeds: of the first variant that has some.

    A model that was trained through any masks prefers each language's own, so where there is a variant of method
    `random`, it is done as well, to compare with.
    """
    study, seed = part.study.kept, part.options.seed
    for of, table, languages, names in _under_masks(part, cross_values, study.unseen):
        means, unseen = table.groupby(["language", "subnetwork"])["score"].mean().to_dict(), set(languages) - set(names)
        result = analysis.cross_evaluation(
            lambda *pair, of=means: of[pair], languages, names, seed=seed, higher_is_better=study.higher_is_better
        )
        note = (
            f"{_scored(part, of, table)}{f', of which {len(unseen)} are unseen' if unseen else ''}. full: the full "
            "network of the same weights; random: a random mask with as many units in each layer as the language's own "
            "has, and of a language without one as another's has."
        )
        part.add(of, replace(result, more={**result.more, "seeds": table}), of, note=note)


def specificity(part: Part) -> None:
    """What every language loses without another one's own units, mean over seeds: of the variants of `cross`."""
    study = part.study.kept
    if not next(iter(study.masked.values()))[0][1].units:
        raise SkipError("the subnetworks mask neither heads nor neurons")
    for of, table, languages, _ in _under_masks(part, lesion_values, ""):
        means = table.groupby(["language", "subnetwork"])["score"].mean().to_dict()
        result = analysis.specificity(
            lambda *pair, of=means: of[pair],
            languages,
            seed=part.options.seed,
            higher_is_better=study.higher_is_better,
        )
        note = (
            f"{_scored(part, of, table)}. The whole network of the same weights; a language's own units: those of its "
            "mask that fewer than half of the other languages have; random: as many in each layer, of all units."
        )
        off = [_switched_off(run) for run in study.variants[of]]  # of each seed
        rows = result.more["languages"].assign(units=[np.mean([each[name] for each in off]) for name in languages])
        part.add(of, replace(result, more={**result.more, "languages": rows, "seeds": table}), of, note=note)


def _switched_off(run: Run) -> dict[str, int]:
    """How many heads and neurons are each language's own."""
    assert run.masks is not None
    left = without_own(run.masks)
    counts = torch.stack([(~keep).sum((1, 2)) for keep in left.units.values()]).sum(0)
    return dict(zip(left.languages, counts.tolist(), strict=True))


def _under_masks(
    part: Part, values_of: Callable[[Task, Subnetworks, dict[str, list[Row]], int], Values], more: str
) -> Iterator[tuple[str, pd.DataFrame, list[str], Sequence[str]]]:
    """(variant, scores by seed, languages, those with a subnetwork) of the first variant with masks, and of `random`.

    The languages are those of the runs and `more`, the training languages first.
    """
    study, options = part.study.kept, part.options
    variant, runs = next(iter(study.masked.items()))
    networks = {variant: [run for run, _ in runs]}
    control = next((name for name, own in study.variants.items() if own[0].config.method == CONTROL), variant)
    networks.setdefault(control, study.variants[control])
    names = runs[0][1].languages
    rows = rows_for(part, runs[0][0], "test", CROSSED, more)
    if len(names) < 2:
        raise SkipError("there is one language, whose subnetwork can be exchanged with no other")
    rows = {name: rows[name] for name in sorted(rows, key=lambda name: name not in names)}
    if not rows:
        raise SkipError("none of the languages has a test split")
    rows = labelled(part, task_of(runs[0][0], options, attached=False)[0], rows)
    for of, of_seeds in networks.items():
        cells = []
        for run in of_seeds:
            with part.attempt(f"{of}, seed {run.config.seed}"):
                task, subnets = task_of(run, options, attached=False)
                assert subnets is not None
                values = values_of(task, subnets, rows, options.seed)
                cells += [(run.config.seed, *pair, score) for pair, score in values.items()]
        if cells:
            yield of, pd.DataFrame(cells, columns=["seed", "language", "subnetwork", "score"]), list(rows), names


def _scored(part: Part, of: str, table: pd.DataFrame) -> str:
    seeds = table.seed.nunique()
    return (
        f"{part.study.metric}, mean over {seeds} seed{'s' if seeds > 1 else ''} of {of}; at most "
        f"{part.options.sentences or CROSSED} test {part.study.example_word} of each language"
    )


def cross_values(task: Task, subnets: Subnetworks, rows: Mapping[str, Sequence[Row]], seed: int) -> Values:
    """The score of each language's rows under each subnetwork, the full network ("full") and a random mask ("random").

    The random mask of a language without a subnetwork has the sizes of the next language's in turn.
    """
    names, controls = subnets.languages, _attach_with_random(task, subnets, seed)

    def networks(place: int, language: str) -> dict[str, str | None]:
        own = language if language in names else names[place % len(names)]
        return {**{name: name for name in names}, BASELINE: None, CONTROL: controls[own]}

    return _scores_under(task, rows, networks)


def lesion_values(task: Task, subnets: Subnetworks, rows: Mapping[str, Sequence[Row]], seed: int) -> Values:
    """The score of each language's rows in the whole network ("nothing" is switched off), and in what is left of it.

    ``(language, other)`` is the score without `other`'s own units, ``(language, "random")`` without as many random ones
    as are the language's own.
    """
    controls = _attach_with_random(task, without_own(subnets, task.encoder), seed)
    return _scores_under(
        task, rows, lambda _, language: {"nothing": None, **{name: name for name in rows}, CONTROL: controls[language]}
    )


def _attach_with_random(task: Task, subnets: Subnetworks, seed: int) -> dict[str, str]:
    """Attach subnetworks, and as large random ones; returns the names of those by language."""
    names = {name: f"{CONTROL} {name}" for name in subnets.languages}
    attach(
        task.encoder, Subnetworks.stack([subnets, random_like(subnets, mask_seed(seed), task.encoder).rename(names)])
    )
    return names


def _scores_under(
    task: Task, rows: Mapping[str, Sequence[Row]], networks: Callable[[int, str], dict[str, str | None]]
) -> Values:
    """The score of each language's rows in each of the attached networks that are named for it; None: the full one."""
    values = {}
    for place, (language, given) in enumerate(rows.items()):
        examples = task.examples(given)
        for name, network in networks(place, language).items():
            values[language, name] = task.scored(examples, network)[task.metric]
    return values


def mask_seed(seed: int) -> int:
    """The seed of the random masks: not `seed` itself, by which a run of method random may have drawn its own."""
    return int(np.random.default_rng([seed, zlib.crc32(b"cross-evaluation")]).integers(2**31))


def ablation(part: Part) -> None:
    """Every head flipped in every language's subnetwork, in the first seed of the first variant that has some."""
    variant, ((run, masks), *_) = next(iter(part.study.kept.masked.items()))
    if masks.heads is None:
        raise SkipError("the subnetworks do not mask heads")
    rows = rows_for(part, run, "test", ABLATED)
    task, _ = task_of(run, part.options)
    rows = labelled(part, task, {name: own for name, own in rows.items() if name in masks.languages})
    batches = {name: batches_of(task, own, name, "test") for name, own in rows.items()}
    if batches:
        result = analysis.ablation(
            task.encoder, lambda batch: task.loss(batch).each, batches, whole=task.model, seed=part.options.seed
        )
        note = f"{task.example_word.capitalize()} of the test split; loss: that of training."
        part.add(f"heads of {variant}, seed {run.config.seed}", result, variant, note=note)
