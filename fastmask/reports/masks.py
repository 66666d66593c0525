"""Analyses of masks alone: overlap, use of units, and how dynamic masks moved. They need no model and no sentence."""

from __future__ import annotations

import fastmask as fm
from fastmask.reports.folders import Run, Study
from fastmask.reports.sections import Gathered, SkipError
from fastmask.subnetworks import Subnetworks
from fastmask.training.config import TrainConfig
from fastmask.training.run_folder import DYNAMIC_FILE

__all__ = ["dynamics", "first_masked", "overlap", "use"]


def first_masked(study: Study) -> tuple[str, list[tuple[Run, Subnetworks]]]:
    """The first variant with subnetworks, and its runs with theirs.

    Raises:
        SkipError: there is none.
    """
    if not study.masked:
        raise SkipError("no run has subnetworks (method full)")
    return next(iter(study.masked.items()))


def overlap(study: Study, found: Gathered) -> None:
    """Overlap of the masks of each variant: between languages, and between seeds that began with the same weights."""
    first_masked(study)
    for variant, runs in study.masked.items():
        first, *others = (subnets for _, subnets in runs)
        if len(first.languages) < 2 and not others:
            found.skip(variant, "there is one language and one seed, and nothing to overlap with")
            continue
        same_start = runs[0][0].config.model != "small"
        if not others:
            found.skip(f"{variant}, between seeds", "there is one seed only")
        elif not same_start:
            why = "each seed began with random weights of its own, so its units are not those of another seed"
            found.skip(f"{variant}, between seeds", why)
        for kind in _kinds_of(first):
            result = fm.analysis.overlap(
                first, seeds=others, same_start=same_start, units=kind, seed=found.options.seed
            )
            found.add(f"{kind} of {variant}", result, kind, variant)


def use(study: Study, found: Gathered) -> None:
    """Use of heads and neurons by the languages of each variant and seed."""
    first_masked(study)
    for variant, runs in study.masked.items():
        for run, masks in runs:
            if len(masks.languages) < 2:
                found.skip(variant, "there is one language, which shares its units with nobody")
                continue
            for kind in [kind for kind in _kinds_of(masks) if kind != "weights"]:
                seed, first = f"seed {run.config.seed}", run is runs[0][0]
                result = fm.analysis.unit_use(masks, units=kind, seed=found.options.seed)
                found.add(f"{kind} of {variant}, {seed}", result, kind, variant, seed, on_page=first)
    if not found.results and not found.skipped:
        raise SkipError("the subnetworks mask neither heads nor neurons")


def dynamics(study: Study, found: Gathered) -> None:
    """How the masks of each run of method `dynamic` moved."""
    moving = {variant: runs for variant, runs in study.variants.items() if runs[0].config.method == "dynamic"}
    if not moving:
        raise SkipError("no run is of method dynamic")
    for variant, runs in moving.items():
        for run in runs:
            seed, history = f"seed {run.config.seed}", run.folder / DYNAMIC_FILE
            kinds = ("heads", "neurons") if run.config.units == "both" else (run.config.units,)
            for kind in kinds:
                with found.attempt(f"{variant}, {seed}"):
                    result = fm.analysis.dynamics(history, units=kind, steps=_update_steps(run.config))
                    first = run is runs[0]
                    found.add(f"{kind} of {variant}, {seed}", result, kind, variant, seed, on_page=first)


def _update_steps(config: TrainConfig) -> list[int] | None:
    """The steps after which masks were updated; None where episodes decide and only changes are known."""
    if config.meta != "none":
        return None
    return [step for step in range(0, config.last_mask_step + 1, config.update_every) if step > config.shared_steps]


def _kinds_of(masks: Subnetworks) -> list[str]:
    """Which of heads, neurons and weights are masked."""
    return [kind for kind in ("heads", "neurons", "weights") if getattr(masks, kind) is not None]
