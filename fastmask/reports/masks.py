"""Analyses of masks alone: overlap, use of units, and how dynamic masks moved. They need no model and no sentence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import fastmask as fm
from fastmask.reports.folders import Study
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.subnetworks import Subnetworks
from fastmask.training.config import TrainConfig
from fastmask.training.dynamic import DYNAMIC_FILE

__all__ = ["NO_MASKS", "dynamics", "heads", "overlap"]

NO_MASKS = "no run has subnetworks (method full)"


def overlap(study: Study, options: Options) -> Plan:
    """Overlap of the masks of each variant: between languages, and between seeds that began with the same weights."""
    if not study.masked:
        raise SkipError(NO_MASKS)
    jobs, skipped = [], []
    for variant, runs in study.masked.items():
        masks = [subnets for _, subnets in runs]
        if len(masks[0].languages) < 2 and len(masks) < 2:
            skipped.append(
                Skipped("overlap", variant, "there is one language and one seed, and nothing to overlap with")
            )
            continue
        same_start = runs[0][0].config.model != "small"
        if len(masks) < 2:
            skipped.append(Skipped("overlap", f"{variant}, between seeds", "there is one seed only"))
        elif not same_start:
            why = "each seed began with random weights of its own, so its units are not those of another seed"
            skipped.append(Skipped("overlap", f"{variant}, between seeds", why))
        for kind in kinds_of(masks[0]):
            work = partial(_overlap, masks, same_start, kind, variant, options.seed)
            jobs.append(Job(f"overlap of {kind}, {variant}", work, 3.0 * len(masks)))
    return Plan(jobs, skipped=skipped)


def _overlap(masks: Sequence[Subnetworks], same_start: bool, kind: str, variant: str, seed: int) -> list[Section]:
    first, *others = masks
    result = fm.analysis.overlap(first, seeds=others, same_start=same_start, units=kind, seed=seed)
    return [Section.of(result, f"{kind} of {variant}", kind, variant)]


def heads(study: Study, options: Options) -> Plan:
    """Use of heads and neurons by the languages of each variant and seed."""
    if not study.masked:
        raise SkipError(NO_MASKS)
    jobs, skipped = [], []
    for variant, runs in study.masked.items():
        for place, (run, masks) in enumerate(runs):
            if len(masks.languages) < 2:
                skipped.append(Skipped("heads", variant, "there is one language, which shares its units with nobody"))
                break
            for kind in [kind for kind in kinds_of(masks) if kind != "weights"]:
                work = partial(_use, masks, kind, variant, run.config.seed, place > 0, options.seed)
                jobs.append(Job(f"use of {kind}, {variant}, seed {run.config.seed}", work, 3.0))
    if not jobs and not skipped:
        raise SkipError("the subnetworks mask neither heads nor neurons")
    return Plan(jobs, skipped=skipped)


def _use(masks: Subnetworks, kind: str, variant: str, seed: int, folded: bool, draw: int) -> list[Section]:
    result = fm.analysis.unit_use(masks, units=kind, seed=draw)
    return [Section.of(result, f"{kind} of {variant}, seed {seed}", kind, variant, f"seed {seed}", folded=folded)]


def dynamics(study: Study, options: Options) -> Plan:
    """How the masks of each run of method `dynamic` moved."""
    runs = {variant: runs for variant, runs in study.variants.items() if runs[0].config.method == "dynamic"}
    if not runs:
        raise SkipError("no run is of method dynamic")
    jobs, skipped = [], []
    for variant, of_seeds in runs.items():
        for place, run in enumerate(of_seeds):
            history = run.folder / DYNAMIC_FILE
            if not history.is_file():
                skipped.append(Skipped("dynamics", f"{variant}, seed {run.config.seed}", f"there is no {history}"))
                continue
            kinds = ("heads", "neurons") if run.config.units == "both" else (run.config.units,)
            for kind in kinds:
                work = partial(_dynamics, history, kind, variant, run.config, place > 0)
                jobs.append(Job(f"dynamics of {kind}, {variant}, seed {run.config.seed}", work, 3.0))
    return Plan(jobs, skipped=skipped)


def _dynamics(history: Path, kind: str, variant: str, config: TrainConfig, folded: bool) -> list[Section]:
    result = fm.analysis.dynamics(history, units=kind, steps=update_steps(config))
    title = f"{kind} of {variant}, seed {config.seed}"
    return [Section.of(result, title, kind, variant, f"seed {config.seed}", folded=folded)]


def update_steps(config: TrainConfig) -> list[int] | None:
    """The steps after which masks were updated; None where episodes decide and only changes are known."""
    if config.meta != "none":
        return None
    return [step for step in range(0, config.steps + 1, config.update_every) if step > config.shared_steps]


def kinds_of(masks: Subnetworks) -> list[str]:
    """Which of heads, neurons and weights are masked."""
    return [kind for kind in ("heads", "neurons", "weights") if getattr(masks, kind) is not None]
