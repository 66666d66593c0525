"""Ablation of the heads of one finished run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import fastmask as fm
from fastmask.models import attach
from fastmask.reports.crossing import first_masked
from fastmask.reports.folders import Run, Study
from fastmask.reports.jobs import Job, Options, Plan
from fastmask.reports.loading import parser_of, sentence_losses
from fastmask.reports.sections import Section, SkipError, Skipped
from fastmask.reports.sentences import Treebanks, batches_of, treebanks_of

__all__ = ["SENTENCES", "ablation"]

SENTENCES = 128
SPLIT = "test"


def ablation(study: Study, options: Options) -> Plan:
    """Every head flipped in every language's subnetwork, in the first seed of the first variant that has some."""
    variant, (run, *_) = first_masked(study)
    masks = study.masked[variant][0][1]
    if masks.heads is None:
        raise SkipError("the subnetworks do not mask heads")
    try:
        treebanks = treebanks_of(run, SPLIT, options.data)
    except FileNotFoundError as error:
        raise SkipError(str(error)) from error
    skipped = [Skipped("ablation", name, why) for name, why in treebanks.missing.items()]
    languages = [name for name in treebanks.names if name in masks.languages]
    n = options.sentences or SENTENCES
    work = partial(_ablation, run, treebanks, languages, options)
    cost = 0.0013 * n * len(languages) * masks.heads[0].numel()
    return Plan([Job(f"ablation, {variant}", work, cost)] if languages else [], skipped=skipped)


def _ablation(run: Run, treebanks: Treebanks, languages: Sequence[str], options: Options) -> list[Section]:
    parser, subnets = parser_of(run.folder, options.device)
    assert subnets is not None
    attach(parser.encoder, subnets)
    device, n = next(parser.parameters()).device, options.sentences or SENTENCES
    batches = {
        language: batches_of(parser, treebanks.rows(language, SPLIT, n, options.seed), device) for language in languages
    }
    result = fm.analysis.ablation(
        parser.encoder,
        lambda batch: sentence_losses(parser, batch),
        batches,
        whole=parser,
        seed=options.seed,
    )
    note = f"Sentences of the {SPLIT} split; loss: arc and label cross entropy per word."
    return [Section.of(result, f"heads of {run.variant}, seed {run.config.seed}", run.variant, note=note)]
