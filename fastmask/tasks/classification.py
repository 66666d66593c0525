"""Classification of texts, or of pairs of texts as in natural language inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmask.settings import setting
from fastmask.tasks.task import Splits, TaskSettings
from fastmask.tasks.transformers_task import (
    Examples,
    TransformersTask,
    check_labels,
    labels_of,
    model_for,
    name_of,
    note_unknown,
)


@dataclass
class ClassificationSettings(TaskSettings):
    """Settings of classification."""

    text_column: str = setting("text", "column with the text (of a pair, the first: the premise)")
    pair_column: str | None = setting(None, "column with the second text of a pair (the hypothesis)")
    label_column: str = setting("label", "column with the class, a name or a number")


class Classification(TransformersTask):
    """One of the classes of the training rows for each text or pair; longer ones are cut."""

    name, metric, auto = "classification", "accuracy", "AutoModelForSequenceClassification"
    settings = ClassificationSettings
    options: ClassificationSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders look for the last piece that is none
        self.labels = labels_of(self.model)
        self.numbers = {label: number for number, label in enumerate(self.labels)}

    @classmethod
    def new_model(cls, name: str, options: Any, datasets: Splits) -> nn.Module:
        return model_for(cls.auto, name, (c for of in datasets.values() for c in of["train"][options.label_column]))

    def features(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = self.encoded(row, self.options.text_column, self.options.pair_column)
        number = self.numbers.get(name_of(row.get(self.options.label_column)) or "")
        return found if number is None else {**found, "labels": number}

    def answers(self, batch: Any, examples: Examples) -> list[str]:
        return [self.labels[number] for number in self.logits(batch).argmax(-1).tolist()]

    def score(self, examples: Examples, predictions: Sequence[str]) -> dict[str, float]:
        """Percent: accuracy, and F1 averaged over the classes that occur; of the rows that have a class."""
        column = self.options.label_column
        pairs = [
            (gold, guess)
            for row, guess in zip(examples.rows, predictions, strict=True)
            if (gold := name_of(row.get(column))) is not None
        ]
        if not pairs:
            raise ValueError(f"no row has a class to score against (column {column!r})")
        note_unknown((gold for gold, _ in pairs), self.labels)
        from sklearn.metrics import accuracy_score, f1_score  # not at the top: it takes a second

        golds, guesses = map(list, zip(*pairs, strict=True))
        f1 = f1_score(golds, guesses, average="macro", zero_division=0)
        return {"accuracy": 100 * float(accuracy_score(golds, guesses)), "macro_f1": 100 * float(f1)}

    def known_labels(self, rows: Sequence[Mapping[str, Any]], unknown: str = "fail") -> list[Mapping[str, Any]]:
        column = self.options.label_column
        missing = check_labels((row.get(column) for row in rows), self.labels, unknown)
        return [row for row in rows if name_of(row.get(column)) not in missing]
