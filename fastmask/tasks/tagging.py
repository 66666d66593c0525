"""Tagging of words: UPOS of treebanks, by accuracy; names and other spans (B-PER I-PER), by F1 over whole spans."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastmask.errors import unknown
from fastmask.settings import ConfigError, setting
from fastmask.tasks.data.conllu import UPOS, Sentence
from fastmask.tasks.data.head_direction import direction_profile, direction_similarity
from fastmask.tasks.predicting import predicted_sentences
from fastmask.tasks.pretrained import WordPieces
from fastmask.tasks.task import Rows, Splits, TaskSettings
from fastmask.tasks.transformers_task import (
    IGNORE,
    Examples,
    TransformersTask,
    check_labels,
    labels_of,
    model_for,
    name_of,
    note_unknown,
)

SCHEMES = ("auto", "words", "spans", "IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")


@dataclass
class TaggingSettings(TaskSettings):
    """Settings of tagging."""

    text_column: str = setting("words", "column with the words of a sentence (a list)")
    label_column: str = setting("upos", "column with their tags (a list of the same length)")
    scheme: str = setting(
        "auto",
        "what to score: words, spans as conlleval reads them, or spans read strictly by a scheme (auto: spans if "
        "there are B- and I- tags)",
        choices=SCHEMES,
    )


class Tagging(TransformersTask):
    """A tag for each word, read off its first piece.

    In training, words that do not fit into the model are left out; a longer sentence is tagged in parts.
    """

    name, metric, auto = "tagging", "accuracy", "AutoModelForTokenClassification"
    settings = TaggingSettings
    example_word = "sentences"
    options: TaggingSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.labels = labels_of(self.model)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.pieces = WordPieces(self.tokenizer, self.max_length)
        scheme = self.options.scheme
        self.spans = any(label[:2] in ("B-", "I-") for label in self.labels) if scheme == "auto" else scheme != "words"
        if self.spans:
            import seqeval.metrics  # noqa: F401 - whoever does not have it hears so before training

            self.metric = "f1"
            try:
                _span_scores([self.labels], [self.labels], scheme)
            except (KeyError, ValueError):
                raise ConfigError(f"scheme is {scheme!r}, which is not that of {', '.join(self.labels)}") from None

    @classmethod
    def new_model(cls, name: str, options: Any, datasets: Splits) -> nn.Module:
        column = options.label_column
        tags = (tag for of in datasets.values() for row in of["train"][column] for tag in _tags(row, column) or ())
        return model_for(cls.auto, name, tags)

    def examples(self, rows: Rows) -> Examples:
        rows = list(rows)
        words = list(dict.fromkeys(word for row in rows for word in self._words(row)))
        pieces = dict(zip(words, (found.tolist() for found in self.pieces.units_of(words)), strict=True))
        features = [self._features(row, pieces) for row in rows]
        long = sum(len(found["_starts"]) < len(self._words(row)) for found, row in zip(features, rows, strict=True))
        if long:
            warnings.warn(
                f"{long} of {len(rows)} sentences have more than {self.max_length} pieces: they are tagged in parts, "
                "and what does not fit is not trained on",
                stacklevel=2,
            )
        return Examples(features, rows)

    def _words(self, row: Mapping[str, Any]) -> list[str]:
        column = self.options.text_column
        if column not in row:
            raise unknown("column", column, row)
        words = row[column]
        listed = isinstance(words, Sequence) and not isinstance(words, str)
        if not listed or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{column} is {words!r:.60} (expected a list of words)")
        return list(words)

    def _features(self, row: Mapping[str, Any], pieces: Mapping[str, list[int]]) -> dict[str, Any]:
        """Pieces of as many words as fit; the tag of a word stands at its first piece."""
        words, tags = self._words(row), _tags(row.get(self.options.label_column), self.options.label_column)
        if tags is not None and len(tags) != len(words):
            raise ValueError(f"{len(words)} words with {len(tags)} tags: {' '.join(words):.60} (expected one for each)")
        ids = self.pieces.prefix.tolist()
        room = self.max_length - len(self.pieces.suffix)
        starts: list[int] = []
        for word in words:
            if len(ids) + len(pieces[word]) > room:
                break
            starts.append(len(ids))
            ids = ids + pieces[word]
        ids = ids + self.pieces.suffix.tolist()
        found = {"input_ids": ids, "attention_mask": [1] * len(ids), "_starts": starts}
        if tags is not None:
            labels = [IGNORE] * len(ids)
            for start, tag in zip(starts, tags, strict=False):
                labels[start] = self.numbers.get(name_of(tag) or "", IGNORE)
            found["labels"] = labels
        return found

    def answers(self, batch: Any, examples: Examples) -> list[Any]:
        best = self.logits(batch).argmax(-1).cpu().numpy()
        return [
            [self.labels[number] for number in found[features["_starts"]]]
            for found, features in zip(best, examples, strict=True)
        ]

    def predict(self, examples: Examples, batch_size: int = 64) -> list[list[str]]:
        """Tags of all words; what does not fit into the model is a sentence of its own."""
        found: list[list[str]] = super().predict(examples, batch_size)
        words = [self._words(row) for row in examples.rows]
        cut = [i for i, tags in enumerate(found) if len(tags) < len(words[i])]
        if cut:
            rest = [{self.options.text_column: words[i][len(found[i]) :]} for i in cut]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it was said of the whole sentences
                more = self.predict(self.examples(rest), batch_size)
            for i, tags in zip(cut, more, strict=True):
                found[i] = found[i] + tags
        return found

    def score(self, examples: Examples, predictions: Sequence[list[str]]) -> dict[str, float]:
        """Percent: accuracy over the words that have a tag; of spans F1, precision and recall, by seqeval."""
        column = self.options.label_column
        pairs = [
            [(name_of(tag), guess) for tag, guess in zip(row[column], tags, strict=True)]
            for row, tags in zip(examples.rows, predictions, strict=True)
            if row.get(column) is not None
        ]
        tagged = [(tag, guess) for pair in pairs for tag, guess in pair if tag is not None]
        if not tagged:
            raise ValueError(f"no word has a tag to score against (column {column!r})")
        note_unknown((tag for tag, _ in tagged), self.labels)
        if not self.spans:
            return {"accuracy": 100 * float(np.mean([tag == guess for tag, guess in tagged]))}
        # A word without a tag is outside on both sides: left out, it would join what stands around it.
        gold = [[tag or "O" for tag, _ in pair] for pair in pairs]
        guesses = [["O" if tag is None else guess for tag, guess in pair] for pair in pairs]
        return _span_scores(gold, guesses, self.options.scheme)

    def predict_file(self, source: str, target: str) -> int:
        """CoNLL-U in and out, where only UPOS changes; JSON lines for other tags, and if the file is called so."""
        if self.options.label_column != "upos" or Path(source).suffix in (".json", ".jsonl", ".ndjson"):
            return super().predict_file(source, target)

        def tagged(sentences: list[Sentence]) -> list[dict[int, list[str]]]:
            rows = [{self.options.text_column: sentence.words} for sentence in sentences]
            return [{UPOS: tags} for tags in self.predict(self.examples(rows))]

        return predicted_sentences(source, target, tagged)

    def known_labels(self, rows: Sequence[Mapping[str, Any]], unknown: str = "fail") -> list[Mapping[str, Any]]:
        column = self.options.label_column
        missing = check_labels((tag for row in rows for tag in row.get(column) or ()), self.labels, unknown)
        if not missing:
            return list(rows)
        return [
            {**row, column: [None if str(tag) in missing else tag for tag in row.get(column) or ()]} for row in rows
        ]

    def profile(self, rows: Rows) -> dict[str, Any] | None:
        """How often the dependents of each relation stand before and after their heads, where rows have trees."""
        return direction_profile(rows) or None

    def similarity(self, profile: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        return direction_similarity(profile, others)


def _tags(found: Any, column: str) -> Sequence[Any] | None:
    if found is not None and (isinstance(found, str) or not isinstance(found, Sequence)):
        raise ValueError(f"{column} is {found!r:.60} (expected a list of tags, one for each word)")
    return found


def _span_scores(gold: list[list[Any]], guesses: list[list[Any]], scheme: str) -> dict[str, float]:
    from seqeval import metrics
    from seqeval import scheme as schemes

    strictly: dict[str, Any] = {}
    if scheme not in ("auto", "spans"):
        strictly = {"mode": "strict", "scheme": getattr(schemes, scheme)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are no spans
        found = {
            name: getattr(metrics, f"{name}_score")(gold, guesses, zero_division=0, **strictly)
            for name in ("f1", "precision", "recall")
        }
    return {name: 100 * float(value) for name, value in found.items()}
