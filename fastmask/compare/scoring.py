"""Scoring one trained parser on every language of a comparison: the same sentences and support sets for every cell."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmask.compare.plan import CompareConfig
from fastmask.models import attach, detach
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.evaluation import Prepared, evaluate, prepare
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.windows import rows_that_fit
from fastmask.unseen import (
    Choice,
    HeadDirection,
    adapted,
    choose,
    head_direction_similarity,
    split_pool,
    support_sets,
    with_union,
)
from fastmask.unseen.choosing import FULL_CHOICE

__all__ = ["Scorer"]

SEED = 0  # of which sentences are tested and which make the support sets, in every cell alike


@dataclass(frozen=True)
class _Unseen:
    """Rows of one unseen language: its support sets, and the test that none of them touches."""

    supports: list[list[Mapping[str, Any]]]
    test: list[Mapping[str, Any]]


class Scorer:
    """Holds the sentences that cells are scored on.

    Args:
        config: of the comparison.
        seen: training language -> split -> rows.
        unseen: unseen language -> split -> rows.

    Raises:
        ValueError: a language without test sentences, or with too few for a support set.
    """

    def __init__(
        self,
        config: CompareConfig,
        seen: Mapping[str, Mapping[str, Any]],
        unseen: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.config = config
        self.profiles = {
            language: HeadDirection.of_rows(splits["train"].select_columns(["heads", "deprels"]))
            for language, splits in seen.items()
        }
        self.seen = {language: self._some(language, splits.get("test")) for language, splits in seen.items()}
        self.unseen: dict[str, _Unseen] = {}
        for language, splits in unseen.items():
            pool = split_pool(splits, config.shots, SEED, language)
            sets = support_sets(len(pool.support), config.shots, config.support_sets, SEED, language)
            supports = [[pool.support[row] for row in rows.tolist()] for rows in sets]
            self.unseen[language] = _Unseen(supports, self._some(language, pool.test))

    def check(self, parser: Parser) -> None:
        """Prepare everything for a parser as `scores` will, so that what is wrong with it is said before training.

        Raises:
            ValueError: a support set without a sentence that fits into the encoder.
        """
        for test in [*self.seen.values(), *(data.test for data in self.unseen.values())]:
            prepare(parser, test)
        for language, data in self.unseen.items():
            for rows in data.supports:
                _support(parser, rows, language)

    def scores(self, parser: Parser, subnets: Subnetworks | None) -> list[dict[str, Any]]:
        """Every score of a trained parser, which comes back as it was.

        Args:
            parser: `subnets` are attached to its encoder; nothing is where they are None (method `full`).
            subnets: of the training languages.

        Returns:
            Rows with "language", "condition", "choice" and "subnetwork" (by which rule it was chosen, and which one it
            is), "support_set" (None where none was looked at), "steps", "las", "uas" and "words". The conditions are
            those of `fastmask.compare.tables`; "other choice" are rules beside the one that is adapted from.
        """
        cell = _Cell(self.config, parser, subnets, self.profiles)
        rows = [row for language, test in self.seen.items() for row in cell.seen(language, test)]
        if subnets is not None:
            detach(parser.encoder)
            attach(parser.encoder, cell.subnets)
        try:
            rows += [row for language, data in self.unseen.items() for row in cell.unseen(language, data)]
        finally:
            if subnets is not None:
                detach(parser.encoder)
                attach(parser.encoder, subnets)
        return rows

    def _some(self, language: str, rows: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
        """`test_sentences` of the test rows, drawn once."""
        if rows is None or not len(rows):
            raise ValueError(f"language {language!r} has no test sentences")
        limit = self.config.test_sentences or len(rows)
        order = np.random.default_rng([SEED, zlib.crc32(language.encode())]).permutation(len(rows))
        return [rows[int(row)] for row in np.sort(order[:limit])]


class _Cell:
    """One parser and its subnetworks, the union among them."""

    def __init__(
        self,
        config: CompareConfig,
        parser: Parser,
        subnets: Subnetworks | None,
        profiles: Mapping[str, HeadDirection],
    ) -> None:
        self.config, self.parser, self.profiles = config, parser, profiles
        self.subnets: Any = None if subnets is None else with_union(subnets)

    def seen(self, language: str, test: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        choice = FULL_CHOICE if self.subnets is None else Choice(self.subnets.index(language), language)
        yield self._row(language, prepare(self.parser, test), choice, "seen", "own")

    def unseen(self, language: str, data: _Unseen) -> Iterator[dict[str, Any]]:
        test = prepare(self.parser, data.test)
        known: dict[int, dict[str, Any]] = {}  # scores without an update, by subnetwork: support sets often agree

        def unadapted(choice: Choice, condition: str, how: str, support_set: int | None) -> dict[str, Any]:
            if choice.language_id not in known:
                known[choice.language_id] = self._row(language, test, choice, condition, how)
            return {**known[choice.language_id], "condition": condition, "choice": how, "support_set": support_set}

        nothing = "full" if self.subnets is None else "union"
        yield unadapted(self._choose(nothing, None), "zero-shot", nothing, None)
        if self.subnets is not None:
            yield unadapted(self._choose("full", None), "other choice", "full", None)
        for number, rows in enumerate(data.supports):
            support = _support(self.parser, rows, language)
            main = "full" if self.subnets is None else self.config.choose
            others = [] if self.subnets is None else [how for how in ("nearest", "best") if how != main]
            choice = self._choose(main, support)
            yield unadapted(choice, "chosen", main, number)
            for how in others:
                yield unadapted(self._choose(how, support), "other choice", how, number)
            with adapted(
                self.parser,
                support,
                choice.language_id,
                steps=self.config.adapt_steps,
                head_lr=self.config.adapt_lr,
                encoder_lr=self.config.adapt_encoder_lr,
                optimizer=self.config.adapt_optimizer,
            ):
                row = self._row(language, test, choice, "adapted", main)
            yield {**row, "support_set": number, "steps": self.config.adapt_steps}

    def _choose(self, how: str, support: Encoded | None) -> Choice:
        if how == "full":
            return FULL_CHOICE
        similarity = None
        if how == "nearest" and support is not None:
            similarity = head_direction_similarity(HeadDirection.of(support, self.parser.vocabulary), self.profiles)
        return choose(self.parser, self.subnets, support, how, similarity=similarity)

    def _row(self, language: str, test: Prepared, choice: Choice, condition: str, how: str) -> dict[str, Any]:
        ids = None if self.subnets is None else choice.language_id
        result = evaluate(self.parser, {language: test}, ids)[language]
        return {
            "language": language,
            "condition": condition,
            "choice": how,
            "subnetwork": choice.name,
            "support_set": None,
            "steps": 0,
            "las": result.las,
            "uas": result.uas,
            "words": result.scores.words,
        }


def _support(parser: Parser, rows: Sequence[Mapping[str, Any]], language: str) -> Encoded:
    """The support sentences that fit into the encoder.

    A word whose relation no training language has is left out of the label loss, not out of the sentence.
    """
    encoded = parser.features.encode(rows, parser.vocabulary)
    return encoded.select(rows_that_fit(parser.features, encoded, "support sentences", language))
