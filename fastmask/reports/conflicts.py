"""Gradient conflict of finished runs: variant by variant, side by side, and along the checkpoints that a run kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import fastmask as fm
from fastmask.analysis.conflict import PANELS
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, bare, legend_above, new_figure
from fastmask.analysis.result import Result
from fastmask.files import check_files
from fastmask.reports.folders import Run, Study
from fastmask.reports.loading import Row, batches_of, data_for, task_at, task_of
from fastmask.reports.sections import Gathered, SkipError
from fastmask.tasks.task import Task
from fastmask.training.run_folder import complete, step_of

__all__ = ["conflict"]

SENTENCES = 64  # of each language: two halves of two batches each
SPLIT = "train"
MOST = 16  # checkpoints of a run


def conflict(study: Study, found: Gathered) -> None:
    """The conflict of every variant at the end of training, all of them side by side, and along checkpoints."""
    at_end, of_first = [], []
    for variant, runs in study.analysed.items():
        with found.attempt(variant):
            rows = _rows(runs[0], found)
            for run in runs:
                seed = run.config.seed
                with found.attempt(f"{variant}, seed {seed}"):
                    task, _ = task_of(run, found.options)
                    result = _conflict(task, rows)
                    at_end.append(result.more["scopes"].assign(variant=variant, seed=seed))
                    if run is runs[0]:
                        of_first.append((variant, seed, result))
    if len(at_end) > 1:
        found.add("all of them, side by side", _side_by_side(pd.concat(at_end, ignore_index=True)), "all")
    for variant, seed, result in of_first:
        note = f"Sentences of the {SPLIT} split, the weights of seed {seed} at the end of training."
        found.add(f"{variant}, seed {seed}", result, variant, note=note)
    with found.attempt("along checkpoints"):
        _along(study, found)


def _rows(run: Run, found: Gathered) -> dict[str, list[Row]]:
    """Sentences of each of a run's languages that can be read."""
    options = found.options
    data = data_for(run, SPLIT, options.data)
    found.skip_all(data.missing)
    masks = run.masks
    names = [name for name in data.splits if masks is None or name in masks.languages]
    if len(names) < 2:
        raise SkipError(f"gradients conflict between two languages or more, and there is {', '.join(names) or 'none'}")
    return {name: data.rows(name, SPLIT, options.sentences or SENTENCES, options.seed) for name in names}


def _conflict(task: Task, rows: Mapping[str, Sequence[Row]]) -> Result:
    """`fastmask.analysis.gradient_conflict` of a model on training examples."""
    batches = {language: batches_of(task, given, language) for language, given in rows.items()}
    return fm.analysis.gradient_conflict(task.encoder, lambda batch: task.loss(batch).each, batches, whole=task.model)


def _along(study: Study, found: Gathered) -> None:
    """The conflict at each checkpoint of every run that kept several."""
    kept = [(run, complete(run.folder)) for runs in study.analysed.values() for run in runs]
    several = [(run, steps) for run, steps in kept if len(steps) > 1]
    if not several:
        one = "one checkpoint" if any(steps for _, steps in kept) else "no checkpoint"
        which = "a cell of a comparison keeps" if study.scores is not None else "the run kept"
        raise SkipError(f"{which} {one}: `fastmask train --keep-checkpoints 0` keeps all")
    for run, steps in several:
        with found.attempt(f"{run.variant}, along checkpoints"):
            rows, tables = _rows(run, found), []
            for at in np.unique(np.linspace(0, len(steps) - 1, MOST).round().astype(int)):
                with found.attempt(f"{run.variant}, {steps[at].name}"):
                    check_files(steps[at])
                    task, subnets = task_at(run, steps[at], found.options)
                    result = _conflict(task, rows)
                    table = result.more["scopes"]
                    table.insert(0, "step", step_of(steps[at]))
                    table.insert(1, "network", "full network" if subnets is None else "subnetworks")
                    table.insert(2, "sentences", int(result.more["languages"].examples.max()))
                    tables.append(table)
            if tables:
                seed = f"seed {run.config.seed}"
                result = _along_training(pd.concat(tables, ignore_index=True), run.config.switch_step)
                found.add(f"{run.variant}, {seed}, along training", result, run.variant, seed)


def _side_by_side(table: pd.DataFrame) -> Result:
    """Means over pairs of languages, variant by variant; of `more["scopes"]` with `variant` and `seed`."""
    table = table[["variant", "seed", *table.columns.drop(["variant", "seed"])]]
    caption = (
        f"Cosine of gradients in {table.variant.nunique()} networks, {table.seed.nunique()} "
        f"seed{'s' if table.seed.nunique() > 1 else ''} (small: each seed, large: their mean): over pairs of two "
        "languages, beside the control, one language with itself on other sentences; both from halves of equally many. "
        "Languages conflict as far as the first is lower. Weights both own: those in masked modules that belong to "
        "both."
    )
    return Result("conflict", table, caption, lambda: _draw_side_by_side(table))


def _draw_side_by_side(table: pd.DataFrame) -> Any:
    scopes = [scope for scope in PANELS if (table.scope == scope).any()]
    variants = list(dict.fromkeys(table.variant))
    figure = new_figure(1.6 + 2.9 * len(scopes), 0.36 * len(variants) + 1.7)
    panels = figure.subplots(1, len(scopes), sharey=True, sharex=True, squeeze=False)[0]
    lines = {_shown(table): (-0.13, "two languages"), "split_half": (0.13, "one language with itself")}
    for panel, scope in zip(panels, scopes, strict=True):
        rows = table[table.scope == scope]
        for at, (column, (shift, label)) in enumerate(lines.items()):
            style = {"color": COLOURS[at], "marker": MARKERS[at], "linestyle": ""}
            panel.plot(
                rows[column], [variants.index(v) + shift for v in rows.variant], markersize=3, alpha=0.6, **style
            )
            means = rows.groupby("variant")[column].mean().reindex(variants)
            panel.plot(means, np.arange(len(variants)) + shift, markersize=7, label=label, fillstyle="none", **style)
        panel.axvline(0, color=GREY, linewidth=0.8)
        panel.set_title(PANELS[scope], fontsize=10)
        panel.set_xlabel("cosine of gradients")
        panel.grid(axis="x", color=GREY, alpha=0.2)
        panel.set_axisbelow(True)
    bare(*panels)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _along_training(table: pd.DataFrame, switch: int | None) -> Result:
    """One row for each checkpoint and scope; from the step `switch` on languages had their subnetworks, or episodes."""
    table = table.sort_values("step", kind="stable", ignore_index=True)
    caption = (
        f"Cosine of gradients at {table.step.nunique()} checkpoints, from step {table.step.min()} to "
        f"{table.step.max()}, on the same at most {table.sentences.max()} training sentences of each language. Left: "
        "mean over pairs of languages (halves of the sentences) and, the control, over languages of one with itself; "
        "the gap between them is conflict. Right: share of the coordinates in which the signs of two languages' "
        "gradients differ; one half for gradients that know nothing of each other."
        + ("" if switch is None else " Dashed: from there on subnetworks, or episodes.")
    )
    return Result("conflict-along", table, caption, lambda: _draw_along(table, switch))


def _draw_along(table: pd.DataFrame, switch: int | None) -> Any:
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    encoder = table[table.scope == "encoder"]
    left.plot(encoder.step, encoder[_shown(table)], f"{MARKERS[0]}-", color=COLOURS[0], label="two languages")
    left.plot(encoder.step, encoder.split_half, f"{MARKERS[1]}--", color=COLOURS[1], label="one with itself")
    left.axhline(0, color=GREY, linewidth=0.8)
    for at, scope in enumerate(("encoder", "shared")):
        rows = table[table.scope == scope]
        right.plot(rows.step, 100 * rows.conflict, f"{MARKERS[at]}-", color=COLOURS[at], label=PANELS[scope])
    right.axhline(50, color=GREY, linewidth=0.8)
    for panel, label in ((left, "cosine in the encoder"), (right, "coordinates in conflict, %")):
        panel.set(xlabel="step", ylabel=label)
        if switch is not None:
            panel.axvline(switch, color="black", linewidth=0.8, linestyle="--")
        legend_above(panel)
    bare(left, right)
    return figure


def _shown(table: pd.DataFrame) -> str:
    """The column of cosines between languages that can be compared with those of one language with itself."""
    return "cosine_halves" if table.cosine_halves.notna().any() else "mean"
