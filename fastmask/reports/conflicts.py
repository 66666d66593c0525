"""Gradient conflict of finished runs, variant by variant and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

import fastmask as fm
from fastmask.analysis.drawing import COLOURS, GREY, MARKERS, new_figure
from fastmask.analysis.result import Result
from fastmask.models import attach
from fastmask.reports.folders import Run, Study
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.loading import parser_of, sentence_losses
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.reports.sentences import Treebanks, batches_of, treebanks_of
from fastmask.tasks.parsing.parser import Parser

__all__ = ["SENTENCES", "conflict", "conflict_of", "languages_for", "side_by_side"]

SENTENCES = 64  # of each language: two halves of two batches each
SPLIT = "train"


def conflict(study: Study, options: Options) -> Plan:
    """The conflict of every variant at the end of training, and all of them and their seeds in one picture."""
    jobs: list[Job] = []
    skipped: list[Skipped] = []
    for variant, runs in study.analysed.items():
        try:
            treebanks, languages = languages_for(runs[0], options, skipped)
        except SkipError as error:
            skipped.append(Skipped("conflict", variant, str(error)))
            continue
        for run in runs:
            work = partial(_conflict, run, treebanks, languages, options, run is runs[0])
            cost = 0.12 * (options.sentences or SENTENCES)
            jobs.append(Job(f"conflict, {variant}, seed {run.config.seed}", work, cost))

    def finish(answers: list[tuple[str, int, pd.DataFrame, Section | None]]) -> list[Section]:
        sections = [section for *_, section in answers if section is not None]
        if len(answers) < 2:
            return sections
        table = pd.concat(
            [scopes.assign(variant=variant, seed=seed) for variant, seed, scopes, _ in answers], ignore_index=True
        )
        return [Section.of(side_by_side(table), "all of them, side by side", "all"), *sections]

    return Plan(jobs, finish, list(dict.fromkeys(skipped)))


def languages_for(run: Run, options: Options, skipped: list[Skipped]) -> tuple[Treebanks, list[str]]:
    """The treebanks of a run's languages and those that can be read; what is missing is noted in `skipped`.

    Raises:
        SkipError: fewer than two are left, or there is no folder of treebanks.
    """
    try:
        treebanks = treebanks_of(run, SPLIT, options.data)
    except FileNotFoundError as error:
        raise SkipError(str(error)) from error
    skipped += [Skipped("conflict", name, why) for name, why in treebanks.missing.items()]
    masks = run.masks
    languages = [name for name in treebanks.names if masks is None or name in masks.languages]
    if len(languages) < 2:
        raise SkipError(
            f"gradients conflict between two languages or more, and there is {', '.join(languages) or 'none'}"
        )
    return treebanks, languages


def _conflict(
    run: Run, treebanks: Treebanks, languages: Sequence[str], options: Options, drawn: bool
) -> tuple[str, int, pd.DataFrame, Section | None]:
    """The variant, the seed, the table over scopes, and the section where it is to be drawn."""
    parser, subnets = parser_of(run.folder, options.device)
    if subnets is not None:
        attach(parser.encoder, subnets)
    result = conflict_of(parser, treebanks, languages, options)
    note = f"Sentences of the {SPLIT} split, the weights of seed {run.config.seed} at the end of training."
    title = f"{run.variant}, seed {run.config.seed}"
    section = Section.of(result, title, run.variant, note=note) if drawn else None
    return run.variant, run.config.seed, result.more["scopes"], section


def conflict_of(parser: Parser, treebanks: Treebanks, languages: Sequence[str], options: Options) -> Result:
    """`fastmask.analysis.gradient_conflict` of a parser on drawn training sentences."""
    device, n = next(parser.parameters()).device, options.sentences or SENTENCES
    batches = {
        language: batches_of(parser, treebanks.rows(language, SPLIT, n, options.seed), device) for language in languages
    }
    return fm.analysis.gradient_conflict(
        parser.encoder, lambda batch: sentence_losses(parser, batch), batches, whole=parser
    )


def side_by_side(table: pd.DataFrame) -> Result:
    """Means over pairs of languages, variant by variant.

    Args:
        table: `more["scopes"]` of the gradient conflict of each variant and seed, with `variant` and `seed`.
    """
    table = table[["variant", "seed", *(name for name in table.columns if name not in ("variant", "seed"))]]
    caption = (
        f"Cosine of gradients in {table.variant.nunique()} networks, {table.seed.nunique()} "
        f"seed{'s' if table.seed.nunique() > 1 else ''} (small: each seed, large: their mean): over pairs of two "
        "languages, beside the control, one language with itself on other sentences; both from halves of equally many. "
        "Languages conflict as far as the first is lower. Weights both own: those in masked modules that belong to "
        "both."
    )
    return Result("conflict", table, caption, lambda: _draw(table))


def _draw(table: pd.DataFrame) -> Any:
    names = {"all": "all parameters", "encoder": "encoder", "shared": "weights both own"}
    scopes = [scope for scope in names if (table.scope == scope).any()]
    variants = list(dict.fromkeys(table.variant))
    shown = "cosine_halves" if table.cosine_halves.notna().any() else "mean"
    figure = new_figure(1.6 + 2.9 * len(scopes), 0.36 * len(variants) + 1.7)
    panels = figure.subplots(1, len(scopes), sharey=True, sharex=True, squeeze=False)[0]
    lines = {shown: (-0.13, 0, "two languages"), "split_half": (0.13, 1, "one language with itself")}
    for panel, scope in zip(panels, scopes, strict=True):
        rows = table[table.scope == scope]
        for column, (shift, at, label) in lines.items():
            means = rows.groupby("variant")[column].mean().reindex(variants)
            places = [variants.index(variant) + shift for variant in rows.variant]
            panel.plot(rows[column], places, MARKERS[at], color=COLOURS[at], markersize=3, alpha=0.6)
            y = [place + shift for place in range(len(variants))]
            panel.plot(means, y, MARKERS[at], color=COLOURS[at], markersize=7, label=label, fillstyle="none")
        panel.axvline(0, color=GREY, linewidth=0.8)
        panel.set_title(names[scope], fontsize=10)
        panel.set_xlabel("cosine of gradients")
        panel.grid(axis="x", color="#EEEEEE")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(variants)), variants)
    panels[0].set_ylim(len(variants) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
