"""Gradient conflict along training: once at every checkpoint that a run kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure
from fastmask.analysis.result import Result
from fastmask.reports.conflicts import SENTENCES, conflict_of, languages_for
from fastmask.reports.folders import Run, Study
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.loading import parser_at
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.training import checkpoints

__all__ = ["along", "along_training"]

MOST = 16  # checkpoints of a run
KEEP_THEM = "`fastmask train --keep-checkpoints 0` keeps all"


def along(study: Study, options: Options) -> Plan:
    """The conflict at each checkpoint of every run that kept several."""
    kept = [(run, checkpoints.complete(run.folder)) for runs in study.analysed.values() for run in runs]
    several = [(run, found) for run, found in kept if len(found) > 1]
    if not several:
        one = "one checkpoint" if any(found for _, found in kept) else "no checkpoint"
        which = "a cell of a comparison keeps" if study.scores is not None else "the run kept"
        raise SkipError(f"{which} {one}: {KEEP_THEM}")
    jobs: list[Job] = []
    skipped: list[Skipped] = []
    for run, found in several:
        try:
            treebanks, languages = languages_for(run, options, skipped)
        except SkipError as error:
            skipped.append(Skipped("conflict", f"{run.variant}, along checkpoints", str(error)))
            continue
        chosen = [found[at] for at in np.unique(np.linspace(0, len(found) - 1, MOST).round().astype(int))]
        for checkpoint in chosen:
            work = partial(_at, run, checkpoint, treebanks, languages, options)
            name = f"conflict, {run.variant}, {checkpoint.name}"
            jobs.append(Job(name, work, 0.12 * (options.sentences or SENTENCES)))

    def finish(answers: list[tuple[Run, pd.DataFrame]]) -> list[Section]:
        sections = []
        for run, _ in several:
            if tables := [table for other, table in answers if other.folder == run.folder]:
                seed = f"seed {run.config.seed}"
                result = along_training(pd.concat(tables), run.config.switch_step)
                sections.append(Section.of(result, f"{run.variant}, {seed}, along training", run.variant, seed))
        return sections

    return Plan(jobs, finish, skipped)


def _at(run: Run, checkpoint: Path, treebanks: Any, languages: Any, options: Options) -> tuple[Run, pd.DataFrame]:
    checkpoints.check(checkpoint)
    parser, subnets = parser_at(run.folder, checkpoint, options.device)
    result = conflict_of(parser, treebanks, languages, options)
    table = result.more["scopes"]
    table.insert(0, "step", checkpoints.step_of(checkpoint))
    table.insert(1, "network", "full network" if subnets is None else "subnetworks")
    table.insert(2, "sentences", int(result.more["languages"].examples.max()))
    return run, table


def along_training(table: pd.DataFrame, switch: int | None) -> Result:
    """One row for each checkpoint and scope, in the order of the steps, as a picture.

    Args:
        table: `more["scopes"]` of the gradient conflict at each checkpoint, with `step`, `network` and `sentences`.
        switch: the step from which languages had their subnetworks, or episodes began.
    """
    table = table.sort_values("step", kind="stable", ignore_index=True)
    steps = list(dict.fromkeys(table.step))
    caption = (
        f"Cosine of gradients at {len(steps)} checkpoints, from step {steps[0]} to {steps[-1]}, on the same at most "
        f"{table.sentences.max()} training sentences of each language. Left: mean over pairs of languages (halves of "
        "the sentences) and, the control, over languages of one with itself. Right: share of the coordinates in which "
        "the signs of two languages' gradients differ; one half for gradients that know nothing of each other."
        + ("" if switch is None else " Dashed: from there on subnetworks, or episodes.")
    )
    return Result("conflict-along", table, caption, lambda: _draw(table, switch))


def _draw(table: pd.DataFrame, switch: int | None) -> Any:
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    shown = "cosine_halves" if table.cosine_halves.notna().any() else "mean"
    encoder = table[table.scope == "encoder"]
    left.plot(encoder.step, encoder[shown], f"{MARKERS[0]}-", color=COLOURS[0], label="two languages")
    left.plot(encoder.step, encoder.split_half, f"{MARKERS[1]}--", color=COLOURS[1], label="one with itself")
    left.set_ylabel("cosine in the encoder")
    left.axhline(0, color=GREY, linewidth=0.8)
    names = {"encoder": "encoder", "shared": "weights both own"}
    for at, (scope, name) in enumerate(names.items()):
        rows = table[table.scope == scope]
        if len(rows):
            right.plot(rows.step, 100 * rows.conflict, f"{MARKERS[at]}-", color=COLOURS[at], label=name)
    right.axhline(50, color=GREY, linewidth=0.8)
    right.set_ylabel("coordinates in conflict, %")
    for panel in (left, right):
        if switch is not None:
            panel.axvline(switch, color="black", linewidth=0.8, linestyle="--")
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    return figure
