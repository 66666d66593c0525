"""Cross-evaluation of finished runs: every language parsed by every language's subnetwork, over all seeds."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

import fastmask as fm
from fastmask.models import attach
from fastmask.reports.folders import Run, Study
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.loading import parser_of
from fastmask.reports.masks import NO_MASKS
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.reports.sentences import Treebanks, treebanks_of
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.controls import random_like
from fastmask.tasks.parsing.evaluation import evaluate, prepare

__all__ = ["SENTENCES", "cross", "cross_values", "first_masked"]

SENTENCES = 120
SPLIT = "test"
FULL, RANDOM = "full", "random"  # columns beside the languages' own
CONTROL = "random"  # the variant that was trained through random masks

Values = dict[tuple[str, str], float]  # (language, subnetwork) -> LAS


def cross(study: Study, options: Options) -> Plan:
    """LAS of every language under every subnetwork, mean over seeds: of the first variant that has some.

    A model that was trained through any masks prefers each language's own, so where there is a variant of method
    `random`, it is done as well, to compare with.
    """
    variant, runs = first_masked(study)
    networks = {variant: runs}
    if (others := study.variants.get(CONTROL)) and variant != CONTROL:
        networks[CONTROL] = others
    masks = study.masked[variant][0][1]
    try:
        treebanks = treebanks_of(runs[0], SPLIT, options.data, study.unseen)
    except FileNotFoundError as error:
        raise SkipError(str(error)) from error
    skipped = [Skipped("cross", name, why) for name, why in treebanks.missing.items()]
    seen = [name for name in treebanks.names if name in masks.languages]
    languages = seen + [name for name in treebanks.names if name not in seen]
    if len(masks.languages) < 2:
        raise SkipError("there is one language, whose subnetwork can be exchanged with no other")
    if not languages:
        raise SkipError(f"none of the languages has a {SPLIT} split")
    cost = 0.0027 * (options.sentences or SENTENCES) * len(languages) * (len(masks.languages) + 2)
    jobs = [
        Job(f"cross, {name}, seed {run.config.seed}", partial(_of_run, run, treebanks, languages, options), cost)
        for name, of_seeds in networks.items()
        for run in of_seeds
    ]

    def finish(answers: list[tuple[str, int, Values]]) -> list[Section]:
        by_name = {name: {seed: values for other, seed, values in answers if other == name} for name in networks}
        return [
            _section(name, by_seed, languages, masks.languages, options, folded=name != variant)
            for name, by_seed in by_name.items()
            if by_seed
        ]

    return Plan(jobs, finish, skipped)


def _section(
    variant: str,
    by_seed: Mapping[int, Values],
    languages: Sequence[str],
    subnetworks: Sequence[str],
    options: Options,
    folded: bool,
) -> Section:
    n, seeds = options.sentences or SENTENCES, len(by_seed)
    mean = {
        pair: float(np.mean([values[pair] for values in by_seed.values()])) for pair in next(iter(by_seed.values()))
    }
    result = fm.analysis.cross_evaluation(
        lambda language, name: mean[language, name],
        languages,
        subnetworks,
        controls=(FULL, RANDOM),
        seed=options.seed,
    )
    rows = [(seed, *pair, value) for seed, values in by_seed.items() for pair, value in values.items()]
    more = {**result.more, "seeds": pd.DataFrame(rows, columns=["seed", "language", "subnetwork", "las"])}
    unseen = len([language for language in languages if language not in subnetworks])
    note = (
        f"LAS, mean over {seeds} seed{'s' if seeds > 1 else ''} of {variant}; at most {n} test sentences of each "
        f"language{f', of which {unseen} are unseen' if unseen else ''}. full: the full network of the same weights; "
        "random: a random mask with as many units in each layer as the language's own has, and of a language without "
        "one as another's has. A model trained through any masks prefers each language's own: compare with method "
        f"{CONTROL}."
    )
    return Section.of(dataclasses.replace(result, more=more), variant, variant, note=note, folded=folded)


def first_masked(study: Study) -> tuple[str, list[Run]]:
    """The first variant with subnetworks, and its runs; raises `SkipError` where there is none."""
    if not study.masked:
        raise SkipError(NO_MASKS)
    variant, found = next(iter(study.masked.items()))
    return variant, [run for run, _ in found]


def _of_run(run: Run, treebanks: Treebanks, languages: Sequence[str], options: Options) -> tuple[str, int, Values]:
    parser, subnets = parser_of(run.folder, options.device)
    assert subnets is not None
    n = options.sentences or SENTENCES
    rows = {language: treebanks.rows(language, SPLIT, n, options.seed) for language in languages}
    return run.variant, run.config.seed, cross_values(parser, subnets, rows, options.seed)


def cross_values(parser: Any, subnets: Subnetworks, rows: Mapping[str, Sequence[Any]], seed: int) -> Values:
    """LAS of each language's rows under each subnetwork, the full network ("full") and a random mask ("random").

    Args:
        parser: nothing is attached to its encoder.
        subnets: of L languages.
        rows: language -> rows with words, upos, heads, deprels and conllu. The random mask of a language without a
            subnetwork has the sizes of the next of the L languages in turn.
        seed: of the random masks.
    """
    L = len(subnets.languages)
    controls = random_like(subnets, mask_seed(seed))
    named = controls.map(lambda keep: keep, [f"{RANDOM} {name}" for name in subnets.languages])
    attach(parser.encoder, Subnetworks.stack([subnets, named]))
    values: Values = {}
    for place, (language, given) in enumerate(rows.items()):
        prepared = {language: prepare(parser, given)}
        own = subnets.index(language) if language in subnets.languages else place % L
        ids = {**{name: at for at, name in enumerate(subnets.languages)}, FULL: -1, RANDOM: L + own}
        for name, number in ids.items():
            values[language, name] = evaluate(parser, prepared, number)[language].las
    return values


def mask_seed(seed: int) -> int:
    """The seed of the random masks: not `seed` itself, by which a run of method random may have drawn its own."""
    return int(np.random.default_rng([seed, zlib.crc32(b"cross-evaluation")]).integers(2**31))
