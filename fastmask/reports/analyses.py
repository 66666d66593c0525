"""The analyses of a report: each adds to a `Part` what it finds in the runs of a study, or says what cannot be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pandas as pd

from fastmask import analysis
from fastmask.analysis.conflict import side_by_side
from fastmask.analysis.result import span
from fastmask.compare.plan import CONDITIONS
from fastmask.compare.tables import by_language_and_seed
from fastmask.files import check_files
from fastmask.reports.other_masks import ablation, cross, specificity
from fastmask.reports.page import Part
from fastmask.reports.runs import (
    BASELINE,
    CONTROL,
    Row,
    Run,
    SkipError,
    batches_of,
    load_data,
    rows_for,
    task_at,
    task_of,
)
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Task
from fastmask.training.run_folder import DYNAMIC_FILE, RESULTS_FILE, complete, step_of
from fastmask.unseen import direction_profile, direction_similarity, uriel_similarity

EFFECTS = ("seen", "adapted", "zero-shot")
GAINED = ("zero-shot", "chosen", "adapted")
CHECKPOINTS = 16  # at most, of a run
CONFLICTED = 64  # examples of each language that models run on: two halves of two batches each


# ---- scores


def effect(part: Part) -> None:
    """Every variant against `full`, and every other one against `random`.

    By the scores of a comparison, or by those that `fastmask train` left in each run.
    """
    study, methods = part.study, list(part.study.variants)
    if BASELINE not in methods and not (study.baselines or {}).get(BASELINE):
        raise SkipError("there is no run of method full without meta-learning to compare with")
    if len(methods) < 2:
        raise SkipError("there is no run to compare with the one of method full")
    if study.scores is None:
        scores = _scores(part)
        title, note = f"{study.metric} of {scores.language.nunique()} languages", f"{study.metric} on the test split."
        tables = [(title, "", note, scores)]
    else:
        tables = []
        for condition in EFFECTS:
            rows = study.scores[study.scores["condition"] == condition].rename(columns={"arm": "method"})
            scores = rows.groupby(["language", "method", "seed"], sort=False)["score"].mean().dropna().reset_index()
            tables.append((condition, condition, f"{study.metric}; {CONDITIONS[condition]}.", scores))
    # Of a comparison each against what `summary.md` compares it with.
    baselines = study.baselines or {
        name: dict.fromkeys([method for method in methods if method not in (BASELINE, name)], name)
        for name in (BASELINE, CONTROL)
    }
    for title, name, note, scores in tables:
        known = set(scores.method)
        for baseline, of_methods in baselines.items():
            against = {method: other for method, other in of_methods.items() if {method, other} <= known}
            if against:
                made = analysis.effect(scores, against, seed=part.options.seed, higher_is_better=study.higher_is_better)
                part.add(f"{title}, over {baseline}", made, name, "" if baseline == BASELINE else baseline, note=note)


def _scores(part: Part) -> pd.DataFrame:
    """The test scores that the runs have, of languages that all of them were scored in on as many words."""
    (first, *others), rows = part.study.runs, []
    for run in others:
        if (run.config.task, run.config.task_options) != (first.config.task, first.config.task_options):
            raise SkipError(f"{run.folder} has another task, or other settings of it, than {first.folder}")
    for variant, run in ((variant, run) for variant, runs in part.study.variants.items() for run in runs):
        tested, seed = run.tested, run.config.seed
        if not tested:
            part.skip(f"{variant}, seed {seed}", f"{run.folder / RESULTS_FILE} has no test scores")
        for row in tested:  # of the score that decides, a language's is the mean over its treebanks
            if row["own"] is None and run.config.method != BASELINE:
                part.skip(row["language"], f"{variant} has no subnetwork of it")
            else:
                score = next(iter((row["own"] or row["full"]).values()))
                rows.append((variant, row["language"], seed, row.get("examples", row["words"]), row["words"], score))
    if not rows:
        raise SkipError("no run has test scores")
    every = pd.DataFrame(rows, columns=["method", "language", "seed", "examples", "words", "score"])
    sums = {"examples": "sum", "words": "sum", "score": "mean"}
    scores = every.groupby(["language", "method", "seed"], sort=False).agg(sums)
    # Pieces of words, which many tasks count, depend on the model, and on where texts are cut.
    alike = len({(run.config.model, run.config.max_length) for run in (first, *others)}) == 1
    size = ["examples", "words"] if alike else ["examples"]
    known = sum(bool(run.tested) for run in part.study.runs)
    for language, sizes in scores[size].groupby("language", sort=False):
        if len(sizes) < known:
            part.skip(language, f"it was scored in {len(sizes)} of {known} runs")
        elif (differ := next((name for name in size if sizes[name].nunique() > 1), None)) is not None:
            part.skip(language, f"the runs were scored on different test sets, of {span(sizes[differ])} {differ}")
        else:
            continue
        scores = scores.drop(language, level="language")
    if scores.empty:
        raise SkipError("the runs have no test set in common")
    return scores.reset_index()[["language", "method", "seed", "score"]]


def typology(part: Part) -> None:
    """Gain over `full` on unseen languages against their similarity to the training languages, by two measures."""
    study = part.study
    if study.scores is None:
        raise SkipError("a single run has no scores of unseen languages: `fastmask compare` makes them")
    full = next((name for name, runs in study.variants.items() if runs[0].config.method == BASELINE), None)
    variants = [name for name in study.analysed if name != full]
    if full is None or not variants:
        raise SkipError(f"a gain needs a run of method {BASELINE} and another one, not a control")
    seen, missing = load_data(study.runs[0], "train", part.options.data)
    every, missing_anywhere = load_data(study.runs[0], None, part.options.data, study.unseen)
    part.skip_all({**missing, **missing_anywhere})
    unseen = [name for name in every if name not in seen and name not in missing]
    if len(unseen) < 3 or not seen:
        raise SkipError(f"a correlation needs at least three unseen languages, and there are {len(unseen)}")
    with part.attempt("by head direction"):
        profiles = {name: direction_profile(chain.from_iterable(every[name].values())) for name in [*seen, *unseen]}
        if bare := [name for name, profile in profiles.items() if not profile]:
            raise SkipError(f"no example of {', '.join(bare)} has a tree whose dependents could be counted")
        training = {name: profiles[name] for name in seen}
        near = {name: direction_similarity(profiles[name], training) for name in unseen}
        _correlations(part, full, variants, "head direction", near)
    with part.attempt("by URIEL"):
        try:
            near = {name: uriel_similarity(name, list(seen)) for name in unseen}
        except (ImportError, KeyError) as error:
            raise SkipError(str(error)) from error
        _correlations(part, full, variants, "URIEL", near)


def _correlations(
    part: Part, baseline: str, variants: Sequence[str], measure: str, near: Mapping[str, Mapping[str, float]]
) -> None:
    """One for each condition and variant, pictures of those after adaptation."""
    scores, sign = part.study.scores, 1 if part.study.higher_is_better else -1
    assert scores is not None
    rows, shown = [], []
    for condition in [name for name in GAINED if (scores["condition"] == name).any()]:
        of_condition = scores[scores["condition"] == condition]
        full = by_language_and_seed(of_condition, baseline)
        for variant in variants:
            gains = sign * (by_language_and_seed(of_condition, variant) - full).dropna()
            known = gains.index.get_level_values("language")
            result = analysis.typology(
                {name: gains.loc[name].tolist() for name in near if name in known},
                near,
                what=f"gain of {variant} over {baseline} in {part.study.metric}, {condition}",
                measure=f"similarity to the nearest training language ({measure})",
                seed=part.options.seed,
            )
            rows.append(result.more["correlation"].assign(measure=measure, condition=condition, variant=variant))
            if condition == "adapted":
                shown.append((variant, result))
    correlations = pd.concat(rows, ignore_index=True)[["measure", "condition", "variant", "n", "rho", "p"]]
    for number, (variant, result) in enumerate(shown):
        result = replace(result, more={"every-correlation": correlations} if number == 0 else {})
        part.add(f"{variant}, adapted, by {measure}", result, variant, measure)


# ---- masks


def overlap(part: Part) -> None:
    """Of the masks of each variant: between languages, and between seeds that began with the same weights."""
    for variant, runs in part.study.kept.masked.items():
        first, *others = (subnets for _, subnets in runs)
        if len(first.languages) < 2 and not others:
            part.skip(variant, "there is one language and one seed, and nothing to overlap with")
            continue
        same_start = runs[0][0].config.model != "small"
        if not others:
            part.skip(f"{variant}, between seeds", "there is one seed only")
        elif not same_start:
            why = "each seed began with random weights of its own, so its units are not those of another seed"
            part.skip(f"{variant}, between seeds", why)
        for kind in _kinds_of(first):
            result = analysis.overlap(first, seeds=others, same_start=same_start, units=kind, seed=part.options.seed)
            part.add(f"{kind} of {variant}", result, kind, variant)


def use(part: Part) -> None:
    """Of heads and neurons by the languages of each variant and seed."""
    for variant, runs in part.study.kept.masked.items():
        for run, masks in runs:
            if len(masks.languages) < 2:
                part.skip(variant, "there is one language, which shares its units with nobody")
                continue
            for kind in [kind for kind in _kinds_of(masks) if kind != "weights"]:
                seed, first = f"seed {run.config.seed}", run is runs[0][0]
                result = analysis.unit_use(masks, units=kind, seed=part.options.seed)
                part.add(f"{kind} of {variant}, {seed}", result, kind, variant, seed, on_page=first)
    if not part.sections and not part.skipped:
        raise SkipError("the subnetworks mask neither heads nor neurons")


def _kinds_of(masks: Subnetworks) -> list[str]:
    return [kind for kind in ("heads", "neurons", "weights") if getattr(masks, kind) is not None]


def dynamics(part: Part) -> None:
    """How the masks of each run of method `dynamic` moved."""
    moving = {name: runs for name, runs in part.study.kept.variants.items() if runs[0].config.method == "dynamic"}
    if not moving:
        raise SkipError("no run is of method dynamic")
    for variant, run in ((variant, run) for variant, runs in moving.items() for run in runs):
        config, seed = run.config, f"seed {run.config.seed}"
        steps = None  # where episodes decide: only changes are known
        if config.meta == "none":
            updates = range(0, config.last_mask_step + 1, config.update_every)
            steps = [step for step in updates if step > config.shared_steps]
        for kind in ("heads", "neurons") if config.units == "both" else (config.units,):
            with part.attempt(f"{variant}, {seed}"):
                result = analysis.dynamics(run.folder / DYNAMIC_FILE, units=kind, steps=steps)
                title, first = f"{kind} of {variant}, {seed}", run is moving[variant][0]
                part.add(title, result, kind, variant, seed, on_page=first)


# ---- gradients


def conflict(part: Part) -> None:
    """Of every variant at the end of training, all of them side by side, and along checkpoints."""
    at_end, of_first = [], []
    for variant, runs in part.study.kept.analysed.items():
        with part.attempt(variant):
            rows = _training_rows(part, runs[0])
            for run in runs:
                with part.attempt(f"{variant}, seed {run.config.seed}"):
                    result = _conflict(task_of(run, part.options)[0], rows)
                    at_end.append(result.more["scopes"].assign(variant=variant, seed=run.config.seed))
                    if run is runs[0]:
                        of_first.append((variant, run.config.seed, result))
    if len(at_end) > 1:
        part.add("all of them, side by side", side_by_side(pd.concat(at_end, ignore_index=True)), "all")
    for variant, seed, result in of_first:
        word = part.study.example_word.capitalize()
        note = f"{word} of the train split, the weights of seed {seed} at the end of training."
        part.add(f"{variant}, seed {seed}", result, variant, note=note)
    with part.attempt("along checkpoints"):
        _along_checkpoints(part)


def _training_rows(part: Part, run: Run) -> dict[str, list[Row]]:
    """Sentences of each of a run's languages that can be read."""
    rows, masks = rows_for(part, run, "train", CONFLICTED), run.masks
    rows = {name: own for name, own in rows.items() if masks is None or name in masks.languages}
    if len(rows) < 2:
        raise SkipError(f"gradients conflict between two languages or more, and there is {', '.join(rows) or 'none'}")
    return rows


def _conflict(task: Task, rows: Mapping[str, Sequence[Row]]) -> analysis.Result:
    batches = {language: batches_of(task, given, language) for language, given in rows.items()}
    return analysis.gradient_conflict(task.encoder, lambda batch: task.loss(batch).each, batches, whole=task.model)


def _along_checkpoints(part: Part) -> None:
    """The conflict at each checkpoint of every run that has several."""
    kept = [(run, complete(run.folder)) for runs in part.study.kept.analysed.values() for run in runs]
    if not any(len(steps) > 1 for _, steps in kept):
        one = "one checkpoint" if any(steps for _, steps in kept) else "no checkpoint"
        which = "a cell of a comparison keeps" if part.study.scores is not None else "the run kept"
        raise SkipError(f"{which} {one}: `fastmask train --keep-checkpoints 0` keeps all")
    for run, steps in ((run, steps) for run, steps in kept if len(steps) > 1):
        with part.attempt(f"{run.variant}, along checkpoints"):
            rows, tables = _training_rows(part, run), []
            for at in np.unique(np.linspace(0, len(steps) - 1, CHECKPOINTS).round().astype(int)):
                with part.attempt(f"{run.variant}, {steps[at].name}"):
                    check_files(steps[at])
                    task, subnets = task_at(run, steps[at], part.options)
                    result = _conflict(task, rows)
                    step, network = step_of(steps[at]), "full network" if subnets is None else "subnetworks"
                    own = {"variant": f"step {step}, {network}", "seed": run.config.seed}
                    tables.append(result.more["scopes"].assign(**own, step=step, network=network))
            if tables:
                seed = f"seed {run.config.seed}"
                result = side_by_side(pd.concat(tables, ignore_index=True), "conflict-along")
                note = f"The networks are one, at its checkpoints, on the same {task.example_word}."
                part.add(f"{run.variant}, {seed}, along training", result, run.variant, seed, note=note)


ANALYSES = {
    of.__name__: of for of in (effect, overlap, use, conflict, cross, specificity, typology, ablation, dynamics)
}
"""By name, in the order of the report."""
