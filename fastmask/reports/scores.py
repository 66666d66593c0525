"""Analyses of scores: what each method does to each language, and whether typology foretells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

import fastmask as fm
from fastmask.analysis.statistics import holm
from fastmask.compare.tables import CONDITIONS, baseline_of
from fastmask.models import attach
from fastmask.reports.folders import CONTROLS, Run, Study, variant_name
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.loading import parser_of
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.reports.sentences import Treebanks, treebanks_of
from fastmask.tasks.parsing.evaluation import parse, prepare
from fastmask.tasks.parsing.parser import Parser
from fastmask.unseen import HeadDirection, head_direction_similarity, uriel_similarity

__all__ = ["SENTENCES", "effect", "sentence_scores", "typology"]

SENTENCES = 200
SPLIT = "test"
BASELINE = "full"
EFFECTS = ("seen", "adapted", "zero-shot")
GAINED = ("zero-shot", "chosen", "adapted")


# ---- effect


def effect(study: Study, options: Options) -> Plan:
    """Every variant against `full`: by the scores of a comparison, or by test sentences that are parsed anew."""
    if BASELINE not in study.variants:
        raise SkipError("there is no run of method full without meta-learning to compare with")
    if len(study.variants) < 2:
        raise SkipError("there is no run to compare with the one of method full")
    if study.scores is not None:
        scores = study.scores
        conditions = [condition for condition in EFFECTS if (scores["condition"] == condition).any()]
        return Plan(
            [Job(f"effect, {name}", partial(_of_scores, scores, name, options.seed), 3.0) for name in conditions]
        )
    jobs: list[Job] = []
    skipped: list[Skipped] = []
    try:
        treebanks = [treebanks_of(run, SPLIT, options.data) for run in study.runs]
    except FileNotFoundError as error:
        raise SkipError(str(error)) from error
    languages = [name for name in treebanks[0].names if all(name in others.names for others in treebanks)]
    if not languages:
        raise SkipError("the runs have no language in common")
    for run, found in zip(study.runs, treebanks, strict=True):
        skipped += [Skipped("effect", name, why) for name, why in found.missing.items()]
        work = partial(_of_run, run, found, languages, options)
        cost = 0.015 * (options.sentences or SENTENCES) * len(languages)
        jobs.append(Job(f"effect, {run.variant}, seed {run.config.seed}", work, cost))
    order = list(study.variants)

    def finish(answers: list[pd.DataFrame]) -> list[Section]:
        table = pd.concat(answers).sort_values("method", key=lambda names: names.map(order.index), kind="stable")
        result = fm.analysis.effect(table, BASELINE, seed=options.seed)
        return [
            Section.of(result, f"LAS of {len(languages)} languages", note=f"LAS of sentences of the {SPLIT} split.")
        ]

    return Plan(jobs, finish, list(dict.fromkeys(skipped)))


def _of_scores(scores: pd.DataFrame, condition: str, seed: int) -> list[Section]:
    # Each against what `summary.md` compares it with: the same tests, and so the same correction.
    cells = {variant_name(*cell): cell for cell in dict.fromkeys(zip(scores["method"], scores["meta"], strict=True))}
    against = {name: variant_name(*baseline_of(cell, BASELINE)) for name, cell in cells.items()}
    table = scores_of(scores, condition)
    known = {name for name in against if name in set(table.method)}
    against = {name: other for name, other in against.items() if name != other and {name, other} <= known}
    result = fm.analysis.effect(table, against, seed=seed, gaps=True)
    note = f"LAS; {CONDITIONS[condition]}."
    return [Section.of(result, f"LAS, {condition}", condition, note=note, folded=condition != EFFECTS[0])]


def scores_of(scores: pd.DataFrame, condition: str) -> pd.DataFrame:
    """Rows (method: a variant's name, language, seed, score: LAS, the mean over support sets)."""
    found = by_variant(scores, condition).stack().dropna()
    return found.rename("score").reset_index().rename(columns={"variant": "method"})


def _of_run(run: Run, treebanks: Treebanks, languages: Sequence[str], options: Options) -> pd.DataFrame:
    parser, subnets = parser_of(run.folder, options.device)
    if subnets is not None:
        attach(parser.encoder, subnets)
    n = options.sentences or SENTENCES
    tables = []
    for language in languages:
        rows = treebanks.rows(language, SPLIT, n, options.seed)
        ids = None if subnets is None else subnets.index(language) if language in subnets.languages else -1
        table = sentence_scores(parser, rows, ids)
        tables.append(table.assign(method=run.variant, language=language, seed=run.config.seed))
    return pd.concat(tables, ignore_index=True)


def sentence_scores(parser: Parser, rows: Sequence[Mapping[str, Any]], language_id: int | None) -> pd.DataFrame:
    """LAS of each sentence: `sentence` (its position), `score` (percent), `weight` (words), subtypes ignored.

    The weighted mean is the official LAS, as words are gold.
    """
    found = []
    trees = parse(parser, prepare(parser, rows).encoded, language_id)
    for at, (row, (heads, labels)) in enumerate(zip(rows, trees, strict=True)):
        right = sum(
            int(head) == gold and label.partition(":")[0] == gold_label.partition(":")[0]
            for head, label, gold, gold_label in zip(heads, labels, row["heads"], row["deprels"], strict=True)
        )
        found.append((at, 100 * right / len(row["heads"]), len(row["heads"])))
    return pd.DataFrame(found, columns=["sentence", "score", "weight"])


# ---- typology


def typology(study: Study, options: Options) -> Plan:
    """Gain over `full` on unseen languages against their similarity to the training languages, by two measures."""
    if study.scores is None:
        raise SkipError("a single run has no scores of unseen languages: `fastmask compare` makes them")
    variants = [
        name for name, runs in study.variants.items() if name != BASELINE and runs[0].config.method not in CONTROLS
    ]
    if BASELINE not in study.variants or not variants:
        raise SkipError(f"a gain needs a run of method {BASELINE} and another one, not a control")
    try:
        seen = treebanks_of(study.runs[0], "train", options.data)
        every = treebanks_of(study.runs[0], None, options.data, study.unseen)
    except FileNotFoundError as error:
        raise SkipError(str(error)) from error
    skipped = [Skipped("typology", name, why) for name, why in {**seen.missing, **every.missing}.items()]
    unseen = [name for name in every.names if name not in seen.names and name not in seen.missing]
    if len(unseen) < 3 or not seen.names:
        raise SkipError(f"a correlation needs at least three unseen languages, and there are {len(unseen)}")
    measures = {"head direction": partial(by_head_direction, seen, every, unseen)}
    try:
        uriel = {language: uriel_similarity(language, list(seen.names)) for language in unseen}
        measures["URIEL"] = partial(dict, uriel)
    except (ImportError, KeyError) as error:
        skipped.append(Skipped("typology", "by URIEL", str(error)))
    jobs = [
        Job(
            f"typology, {measure}", partial(_typology, study.scores, variants, measure, similarity, unseen, options), 20
        )
        for measure, similarity in measures.items()
    ]
    return Plan(jobs, skipped=skipped)


def by_head_direction(seen: Treebanks, every: Treebanks, unseen: Sequence[str]) -> dict[str, dict[str, float]]:
    """Unseen language -> training language -> similarity of the direction of dependencies, over all sentences."""
    training = {name: HeadDirection.of_rows(seen.profile_rows(name)) for name in seen.names}
    profiles = {name: HeadDirection.of_rows(every.profile_rows(name)) for name in unseen}
    return {name: head_direction_similarity(profile, training) for name, profile in profiles.items()}


def _typology(
    scores: pd.DataFrame,
    variants: Sequence[str],
    measure: str,
    similarity: Any,
    unseen: Sequence[str],
    options: Options,
) -> list[Section]:
    near = similarity()
    sections, rows = [], []
    for condition in [name for name in GAINED if (scores["condition"] == name).any()]:
        for variant in variants:
            gains = gains_of(scores, variant, condition, unseen)
            result = fm.analysis.typology(
                gains,
                near,
                what=f"LAS of {variant} less that of full, {condition}",
                measure=f"similarity to the nearest training language ({measure})",
                seed=options.seed,
            )
            found = result.more["correlation"].iloc[0]
            rows.append((measure, condition, variant, int(found.n), found.rho, found.p))
            if condition == "adapted":
                title = f"{variant}, {condition}, by {measure}"
                sections.append(Section.of(result, title, variant, measure, folded=" + " in variant))
    columns = ["measure", "condition", "variant", "n", "rho", "p"]
    table = pd.DataFrame(rows, columns=columns)
    known = table.p.notna()
    table.loc[known, "p_holm"] = holm(list(table.p[known]))
    if sections:
        sections[0].tables[f"{sections[0].name}_every-correlation"] = table  # type: ignore[index]
    return sections


def gains_of(scores: pd.DataFrame, variant: str, condition: str, unseen: Sequence[str]) -> dict[str, list[float]]:
    """Unseen language -> LAS of a variant less that of `full`, one for each seed that both have."""
    table = by_variant(scores, condition)
    gains = (table[variant] - table[BASELINE]).dropna()
    known = gains.index.get_level_values("language")
    return {name: gains.loc[name].tolist() for name in unseen if name in known}


def by_variant(scores: pd.DataFrame, condition: str) -> pd.DataFrame:
    """LAS (mean over support sets) by language and seed, a column for each variant; NaN where a cell is not done.

    Languages and variants are in the order of the scores.
    """
    rows = scores[scores["condition"] == condition]
    named = rows.assign(variant=[variant_name(*pair) for pair in zip(rows["method"], rows["meta"], strict=True)])
    wide = named.groupby(["language", "seed", "variant"])["las"].mean().unstack("variant")
    return wide[list(named["variant"].unique())].reindex(named["language"].unique(), level="language")
