"""Analyses of scores: what each method does to each language, and whether typology foretells it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

import fastmask as fm
from fastmask.compare.plan import CONDITIONS
from fastmask.reports.folders import CONTROLS, Study
from fastmask.reports.loading import Data, data_for, score_of, task_of
from fastmask.reports.sections import Gathered, SkipError
from fastmask.unseen import HeadDirection, head_direction_similarity, uriel_similarity

__all__ = ["effect", "typology"]

SENTENCES = 200
SPLIT = "test"
BASELINE, CONTROL = "full", "random"
EFFECTS = ("seen", "adapted", "zero-shot")
GAINED = ("zero-shot", "chosen", "adapted")


def effect(study: Study, found: Gathered) -> None:
    """Every variant against `full`, and every one with masks against `random`.

    By the scores of a comparison, or by test examples that are scored anew.
    """
    if BASELINE not in study.variants:
        raise SkipError("there is no run of method full without meta-learning to compare with")
    if len(study.variants) < 2:
        raise SkipError("there is no run to compare with the one of method full")
    if study.scores is None:
        return _of_runs(study, found)
    for condition in [name for name in EFFECTS if (study.scores["condition"] == name).any()]:
        table = by_variant(study.scores, condition).stack().dropna().rename("score").reset_index()
        table = table.rename(columns={"arm": "method"})
        known = set(table.method)
        for baseline, of_arms in (study.baselines or {}).items():
            # Each against what `summary.md` compares it with.
            against = {name: other for name, other in of_arms.items() if {name, other} <= known}
            if against:
                result = fm.analysis.effect(table, against, seed=found.options.seed)
                parts = (condition,) if baseline == BASELINE else (condition, baseline)
                found.add(
                    f"{condition}, over {baseline}", result, *parts, note=f"{study.metric}; {CONDITIONS[condition]}."
                )
    return None


def _of_runs(study: Study, found: Gathered) -> None:
    options = found.options
    data = {run.folder: data_for(run, SPLIT, options.data) for run in study.runs}
    for of_run in data.values():
        found.skip_all(of_run.missing)
    first, *others = data.values()
    languages = [name for name in first.splits if all(name in other.splits for other in others)]
    if not languages:
        raise SkipError("the runs have no language in common")
    scores = []
    for run in (run for runs in study.variants.values() for run in runs):
        seed = run.config.seed
        with found.attempt(f"{run.variant}, seed {seed}"):
            task, subnets = task_of(run, options)
            for language in languages:
                rows = data[run.folder].rows(language, SPLIT, options.sentences or SENTENCES, options.seed)
                own = language if subnets is not None and language in subnets.languages else None
                score = score_of(task, rows, {"": own})[""]
                scores.append({"method": run.variant, "language": language, "seed": seed, "score": score})
    note = f"{study.metric} on the {SPLIT} split."
    for baseline in (BASELINE, CONTROL):
        names = [name for name in study.variants if name not in (BASELINE, baseline)]
        if baseline in study.variants and names:
            result = fm.analysis.effect(scores, dict.fromkeys(names, baseline), seed=options.seed)
            parts = () if baseline == BASELINE else (baseline,)
            found.add(f"{study.metric} of {len(languages)} languages, over {baseline}", result, *parts, note=note)


def typology(study: Study, found: Gathered) -> None:
    """Gain over `full` on unseen languages against their similarity to the training languages, by two measures."""
    if study.scores is None:
        raise SkipError("a single run has no scores of unseen languages: `fastmask compare` makes them")
    variants = [
        name for name, runs in study.variants.items() if name != BASELINE and runs[0].config.method not in CONTROLS
    ]
    if BASELINE not in study.variants or not variants:
        raise SkipError(f"a gain needs a run of method {BASELINE} and another one, not a control")
    seen = data_for(study.runs[0], "train", found.options.data)
    every = data_for(study.runs[0], None, found.options.data, study.unseen)
    found.skip_all({**seen.missing, **every.missing})
    unseen = [name for name in every.splits if name not in seen.splits and name not in seen.missing]
    if len(unseen) < 3 or not seen.splits:
        raise SkipError(f"a correlation needs at least three unseen languages, and there are {len(unseen)}")
    with found.attempt("by head direction"):
        _by_measure(study, variants, "head direction", _head_direction(seen, every, unseen), found)
    try:
        near = {language: uriel_similarity(language, list(seen.splits)) for language in unseen}
    except (ImportError, KeyError) as error:
        return found.skip("by URIEL", str(error))
    return _by_measure(study, variants, "URIEL", near, found)


def _head_direction(seen: Data, every: Data, unseen: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """Unseen language -> training language -> similarity of the direction of dependencies, over all sentences."""
    training = {name: HeadDirection.of_rows(every.every_row(name)) for name in seen.splits}
    profiles = {name: HeadDirection.of_rows(every.every_row(name)) for name in unseen}
    return {name: head_direction_similarity(profile, training) for name, profile in profiles.items()}


def _by_measure(
    study: Study, variants: Sequence[str], measure: str, near: Mapping[str, Mapping[str, float]], found: Gathered
) -> None:
    """A correlation for each condition and variant, pictures of those after adaptation."""
    scores, metric = study.scores, study.metric
    assert scores is not None
    rows, drawn = [], []
    for condition in [name for name in GAINED if (scores["condition"] == name).any()]:
        table = by_variant(scores, condition)
        for variant in variants:
            gains = (table[variant] - table[BASELINE]).dropna()
            known = gains.index.get_level_values("language")
            result = fm.analysis.typology(
                {name: gains.loc[name].tolist() for name in near if name in known},
                near,
                what=f"{metric} of {variant} minus that of full, {condition}",
                measure=f"similarity to the nearest training language ({measure})",
                seed=found.options.seed,
            )
            rows.append(result.more["correlation"].assign(measure=measure, condition=condition, variant=variant))
            if condition == "adapted":
                drawn.append((variant, result))
    columns = ["measure", "condition", "variant", "n", "rho", "p"]
    correlations = pd.concat(rows, ignore_index=True)[columns]
    for number, (variant, result) in enumerate(drawn):
        more = {"every-correlation": correlations} if number == 0 else {}
        title = f"{variant}, adapted, by {measure}"
        found.add(title, dataclasses.replace(result, more=more), variant, measure, on_page=" + " not in variant)


def by_variant(scores: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The score (mean over support sets) by language and seed, a column for each variant; NaN where a cell is not done.

    Languages and variants are in the order of the scores.
    """
    rows = scores[scores["condition"] == condition]
    wide = rows.groupby(["language", "seed", "arm"])["score"].mean().unstack("arm")
    return wide[list(rows["arm"].unique())].reindex(rows["language"].unique(), level="language")
