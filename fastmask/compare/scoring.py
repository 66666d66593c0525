"""Scoring one trained model on every language of a comparison: the same examples and support sets for every cell."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmask.compare.plan import CompareConfig
from fastmask.models import attach, detach
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task
from fastmask.training.config import TrainConfig
from fastmask.unseen import Choice, Pool, adapted, choose, split_pool, support_sets, with_union
from fastmask.unseen.choosing import FULL_CHOICE

__all__ = ["Scorer"]

SEED = 0  # of which sentences are tested, and which may be in support sets: in every cell alike


class Scorer:
    """Holds the examples that cells are scored on.

    Args:
        config: of the comparison.
        shots: examples of a support set.
        seen: training language -> split -> rows.
        unseen: unseen language -> split -> rows.
        same: what makes two rows the same example; see `Task.words_of`.

    Raises:
        ValueError: a language without test sentences, or with too few for a support set.
    """

    def __init__(
        self, config: CompareConfig, shots: int, seen: Splits, unseen: Splits, same: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        self.config, self.shots = config, shots
        self._train = {language: splits["train"] for language, splits in seen.items()}
        self._profiles: dict[str, Any] = {}
        self.seen = {language: self._some(language, splits.get("test")) for language, splits in seen.items()}
        self.unseen: dict[str, Pool] = {}
        for language, splits in unseen.items():
            pool = split_pool(splits, shots, SEED, language, same=same)
            self.unseen[language] = replace(pool, test=self._some(language, pool.test))

    def supports(self, language: str, seed: int) -> list[list[Mapping[str, Any]]]:
        """The support sets of an unseen language for the runs of a seed."""
        pool = self.unseen[language].support
        sets = support_sets(len(pool), self.shots, self.config.support_sets, seed, language)
        return [[pool[row] for row in rows.tolist()] for rows in sets]

    def check(self, task: Task, nearest: bool) -> None:
        """Prepare everything for a model as `scores` will, so that what is wrong with it is said before training.

        Args:
            task: newly built.
            nearest: whether the nearest language will be asked for.

        Raises:
            ValueError: a support set without an example that can be trained on, or of which nothing is known that
                would find the nearest language.
        """
        for test in [*self.seen.values(), *(data.test for data in self.unseen.values())]:
            task.examples(test)
        for language, seed in itertools.product(self.unseen, range(self.config.seeds)):
            for rows in self.supports(language, seed):
                task.training_examples(rows, language, "support")
                if nearest:
                    _profile(task, rows)

    def profiles(self, task: Task) -> dict[str, Any]:
        """What the task knows of each training language (`Task.profile`); the same for every cell."""
        if not self._profiles:
            self._profiles = {language: task.profile(rows) for language, rows in self._train.items()}
        return self._profiles

    def scores(self, task: Task, subnets: Subnetworks | None, run: TrainConfig) -> list[dict[str, Any]]:
        """Every score of a trained model, which comes back as it was.

        Args:
            task: `subnets` are attached to its encoder; nothing is where they are None (method `full`).
            subnets: of the training languages.
            run: the settings of the run: its seed says which support sets, its inner loop how they are adapted to
                where the comparison does not.

        Returns:
            Rows with "language", "condition", "choice" and "subnetwork" (by which rule it was chosen, and which one it
            is), "support_set" (None where none was looked at), "steps", "score" (that of `Task.metric`), "scores" and
            "words". The conditions are those of `fastmask.compare.plan`; "other choice" are rules beside the one that
            is adapted from.
        """
        cell = _Cell(self.config, run, task, subnets, self.profiles(task))
        rows = [cell.seen(language, test) for language, test in self.seen.items()]
        if subnets is not None:
            detach(task.encoder)
            attach(task.encoder, cell.subnets)
        try:
            rows += [
                row
                for language, data in self.unseen.items()
                for row in cell.unseen(language, data.test, self.supports(language, run.seed))
            ]
        finally:
            if subnets is not None:
                detach(task.encoder)
                attach(task.encoder, subnets)
        return rows

    def _some(self, language: str, rows: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
        """`test_sentences` of the test rows, drawn once."""
        if rows is None or not len(rows):
            raise ValueError(f"language {language!r} has no test sentences")
        limit = self.config.test_sentences or len(rows)
        order = np.random.default_rng([SEED, zlib.crc32(language.encode())]).permutation(len(rows))
        return [rows[int(row)] for row in np.sort(order[:limit])]


class _Cell:
    """One model and its subnetworks, the union among them."""

    def __init__(
        self,
        config: CompareConfig,
        run: TrainConfig,
        task: Task,
        subnets: Subnetworks | None,
        profiles: Mapping[str, Any],
    ) -> None:
        self.config, self.task, self.profiles = config, task, profiles
        self.steps = config.adapt_steps or run.inner_steps
        self.rates = (
            run.inner_lr if config.adapt_lr is None else config.adapt_lr,
            run.inner_encoder_lr if config.adapt_encoder_lr is None else config.adapt_encoder_lr,
        )
        self.subnets: Any = None if subnets is None else with_union(subnets)

    def seen(self, language: str, test: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        choice = FULL_CHOICE if self.subnets is None else Choice(self.subnets.index(language), language)
        return self._row(language, self.task.examples(test), choice, "seen", "own")

    def unseen(
        self, language: str, test_rows: Sequence[Mapping[str, Any]], supports: Sequence[Sequence[Mapping[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        test = self.task.examples(test_rows)
        known: dict[int, dict[str, Any]] = {}  # scores without an update, by subnetwork: support sets often agree

        def unadapted(choice: Choice, condition: str, how: str, support_set: int | None) -> dict[str, Any]:
            if choice.language_id not in known:
                known[choice.language_id] = self._row(language, test, choice, condition, how)
            return {**known[choice.language_id], "condition": condition, "choice": how, "support_set": support_set}

        nothing = "full" if self.subnets is None else "union"
        yield unadapted(self._choose(nothing, [], None), "zero-shot", nothing, None)
        if self.subnets is not None:
            yield unadapted(FULL_CHOICE, "other choice", "full", None)
        for number, rows in enumerate(supports):
            support = self.task.training_examples(rows, language, "support")
            main = "full" if self.subnets is None else self.config.choose
            rules = ("nearest", "best") if self.task.profile(rows) is not None else ("best",)
            others = [] if self.subnets is None else [how for how in rules if how != main]
            choice = self._choose(main, rows, support)
            yield unadapted(choice, "chosen", main, number)
            for how in others:
                yield unadapted(self._choose(how, rows, support), "other choice", how, number)
            with adapted(
                self.task,
                support,
                choice.language_id,
                steps=self.steps,
                head_lr=self.rates[0],
                encoder_lr=self.rates[1],
                optimizer=self.config.adapt_optimizer,
            ):
                row = self._row(language, test, choice, "adapted", main)
            yield {**row, "support_set": number, "steps": self.steps}

    def _choose(self, how: str, rows: Sequence[Mapping[str, Any]], support: Any) -> Choice:
        if how == "full":
            return FULL_CHOICE
        similarity = None
        if how == "nearest":
            similarity = self.task.similarity(_profile(self.task, rows), self.profiles)
        return choose(self.task, self.subnets, support, how, similarity=similarity)

    def _row(self, language: str, test: Any, choice: Choice, condition: str, how: str) -> dict[str, Any]:
        with self.task.reading(None if choice.language_id < 0 else choice.name):
            scores = self.task.score(test, self.task.predict(test))
        return {
            "language": language,
            "condition": condition,
            "choice": how,
            "subnetwork": choice.name,
            "support_set": None,
            "steps": 0,
            "score": scores[self.task.metric],
            "scores": scores,
            "words": int(test.lengths.sum()),
        }


def _profile(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = task.profile(rows)
    if found is None:
        raise ValueError(f"task {task.name} cannot tell which language is nearest (choose best, union or full)")
    return found
