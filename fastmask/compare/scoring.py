"""Scoring one trained model on every language of a comparison: the same examples and support sets for every cell."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmask.models import attach, detach
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task, warn_of_pooling
from fastmask.training.config import TrainConfig
from fastmask.training.engine import inner_rates
from fastmask.unseen import Choice, adapted, choose, split_pool, support_sets, with_union
from fastmask.unseen.choosing import FULL_CHOICE

if TYPE_CHECKING:
    from fastmask.compare.plan import Plan

SEED = 0  # of which sentences are tested, and which may be in support sets: in every cell alike

Rows = Sequence[Mapping[str, Any]]


class Scorer:
    """The examples that cells are scored on; ValueError where a language has too few, or where an unseen one is not."""

    def __init__(self, plan: Plan, seen: Splits) -> None:
        self.config, self.shots = plan.config, plan.shots
        self._train = {language: splits["train"] for language, splits in seen.items()}
        self.profiles: dict[str, Any] = {}  # what the task knows of each training language, the same for every cell
        self.seen = {language: self._some(language, splits.get("test")) for language, splits in seen.items()}
        same = partial(plan.task.words_of, options=plan.task_settings)
        unseen = plan.load(plan.config.unseen, optional=("train", "dev"))
        if both := [code for code in unseen if code in seen]:
            raise ConfigError(f"{', '.join(both)} is in both train and unseen (expected unseen languages to be unseen)")
        pools = {language: split_pool(of, self.shots, SEED, language, same=same) for language, of in unseen.items()}
        self.unseen = {name: replace(pool, test=self._some(name, pool.test)) for name, pool in pools.items()}

    @property
    def tests(self) -> dict[str, list[Mapping[str, Any]]]:
        """The test rows of every language."""
        return {**self.seen, **{language: data.test for language, data in self.unseen.items()}}

    def supports(self, language: str, seed: int) -> list[Rows]:
        """The support sets of an unseen language for the runs of a seed."""
        pool = self.unseen[language].support
        sets = support_sets(len(pool), self.shots, self.config.support_sets, seed, language)
        return [[pool[row] for row in rows.tolist()] for rows in sets]

    def check(self, task: Task, nearest: bool) -> None:
        """Prepare everything for a new model as `scores` will, so that what is wrong is said before training."""
        if silent := [language for language, test in self.tests.items() if not task.has_answers(task.examples(test))]:
            said = f"no test {task.example_word} of {', '.join(silent)} have labels that the model knows"
            raise ValueError(f"{said} (expected some to score)")
        for language, test in self.tests.items():
            warn_of_pooling(language, test)
        for language in self.unseen:
            sets = [rows for seed in range(self.config.seeds) for rows in self.supports(language, seed)]
            task.training_examples([row for rows in sets for row in rows], language, "support")  # warns once for all
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for rows in sets:
                    task.training_examples(rows, language, "support")
                    if nearest:
                        self.similarity(task, rows)

    def similarity(self, task: Task, rows: Rows) -> dict[str, float]:
        """How near each training language is to a support set; ValueError where the task cannot tell."""
        found = task.profile(rows)
        if found is None:
            raise ValueError(f"task {task.name} cannot tell which language is nearest (choose best, union or full)")
        if not self.profiles:
            self.profiles = {language: task.profile(rows) for language, rows in self._train.items()}
        return task.similarity(found, self.profiles)

    def scores(self, task: Task, subnets: Subnetworks | None, run: TrainConfig) -> list[dict[str, Any]]:
        """Every score of a trained model, to whose encoder `subnets` are attached; it comes back as it was.

        The seed of its `run` says which support sets, its inner loop how they are adapted to where the plan does not.

        Returns:
            Rows with "language", "condition", "choice" and "subnetwork" (by which rule it was chosen, and which one it
            is), "support_set" (None where none was looked at), "steps", "score" (that of `Task.metric`), "scores" and
            "words". The conditions are `CONDITIONS`, and "other choice": rules beside the one that is adapted from.
        """
        cell = _Cell(self, task, None if subnets is None else with_union(subnets), run)
        rows = [cell.seen(language, test) for language, test in self.seen.items()]
        if subnets is not None:
            detach(task.encoder)
            attach(task.encoder, cell.subnets)
        try:
            for language in self.unseen:
                rows += cell.unseen(language, self.supports(language, run.seed))
        finally:
            if subnets is not None:
                detach(task.encoder)
                attach(task.encoder, subnets)
        return rows

    def _some(self, language: str, rows: Rows | None) -> list[Mapping[str, Any]]:
        """`test_sentences` of the test rows, drawn once."""
        if rows is None or not len(rows):
            raise ValueError(f"language {language!r} has no test sentences")
        limit = self.config.test_sentences or len(rows)
        order = np.random.default_rng([SEED, zlib.crc32(language.encode())]).permutation(len(rows))
        return [rows[int(row)] for row in np.sort(order[:limit])]


@dataclass
class _Cell:
    """One model and its subnetworks, the union among them."""

    scorer: Scorer
    task: Task
    subnets: Any
    run: TrainConfig
    known: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)  # scores without an update

    def seen(self, language: str, test: Rows) -> dict[str, Any]:
        choice = FULL_CHOICE if self.subnets is None else Choice(self.subnets.index(language), language)
        return self._row(language, self.task.examples(test), "seen", "own", choice)

    def unseen(self, language: str, supports: Sequence[Rows]) -> Iterator[dict[str, Any]]:
        config, run, masked = self.scorer.config, self.run, self.subnets is not None
        head_lr, encoder_lr = inner_rates(self.task, run, config.adapt_optimizer)
        how_fast: dict[str, Any] = {
            "steps": config.adapt_steps or run.inner_steps,
            "head_lr": head_lr if config.adapt_lr is None else config.adapt_lr,
            "encoder_lr": encoder_lr if config.adapt_encoder_lr is None else config.adapt_encoder_lr,
            "optimizer": config.adapt_optimizer,
        }
        main, nothing = (config.choose, "union") if masked else ("full", "full")
        row = partial(self._row, language, self.task.examples(self.scorer.unseen[language].test))
        yield row("zero-shot", nothing, self._choose(nothing, [], None))
        if masked:
            yield row("other choice", "full", FULL_CHOICE)
        for number, rows in enumerate(supports):
            support = self.task.training_examples(rows, language, "support")
            choice = self._choose(main, rows, support)
            yield row("chosen", main, choice) | {"support_set": number}
            rules = ("nearest", "best") if self.task.profile(rows) is not None else ("best",)
            for how in rules if masked else ():
                if how != main:
                    yield row("other choice", how, self._choose(how, rows, support)) | {"support_set": number}
            with adapted(self.task, support, choice.language_id, **how_fast):
                after = row("adapted", main, choice, how_fast["steps"])
            yield after | {"support_set": number}

    def _choose(self, how: str, rows: Rows, support: Any) -> Choice:
        similarity = self.scorer.similarity(self.task, rows) if how == "nearest" else None
        return choose(self.task, self.subnets, support, how, similarity=similarity)

    def _row(self, name: str, test: Any, condition: str, how: str, choice: Choice, steps: int = 0) -> dict[str, Any]:
        key = name, choice.language_id
        scores = None if steps else self.known.get(key)  # support sets often agree
        if scores is None:
            scores = self.task.scored(test, None if choice.language_id < 0 else choice.name)
            if not steps:
                self.known[key] = scores
        return {
            "language": name,
            "condition": condition,
            "choice": how,
            "subnetwork": choice.name,
            "support_set": None,
            "steps": steps,
            "score": scores[self.task.metric],
            "scores": scores,
            "words": int(test.lengths.sum()),
        }
