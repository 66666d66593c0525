"""The base of tasks with a model and a tokenizer of Hugging Face: a subclass says what a row is for the model.

It has `auto`, `features` and `score`; `new_model` where the size of the head depends on the data, `answers` where
predictions are not logits, `loss_of` where the loss is no cross entropy. docs/tasks.md has a whole one.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from fastmask.errors import unknown as unknown_name
from fastmask.files import FileError, StrPath, read_json, write_text
from fastmask.models.attach import attached
from fastmask.models.calls import plain_class_of
from fastmask.models.contexts import evaluating
from fastmask.models.languages import LanguageCounts
from fastmask.records import Record
from fastmask.settings import ConfigError
from fastmask.tasks.predicting import like_lengths
from fastmask.tasks.pretrained import (
    check_fit,
    check_known,
    labels_in,
    load_model,
    load_tokenizer,
    positions_of,
    without_progress_bars,
)
from fastmask.tasks.task import UNKNOWN_LABELS, Loss, Rows, Splits, Task, TaskSettings, listed

if TYPE_CHECKING:
    from fastmask.training.config import TrainConfig

FILE = "task.json"
FORMAT_VERSION = 1
IGNORE = -100  # a label that counts for nothing
LABELS = "labels"


class _Saved(Record):
    version: int
    task: str
    max_length: int
    settings: dict[str, Any]


class Examples:
    """Rows with what the model sees of each.

    Attributes:
        features: n mappings: "input_ids", what else the tokenizer makes, and "labels" where a row has some; what
            begins with "_" the model does not get.
        rows: the n rows they were made of.
        lengths: tokens of each, int64 [n].
    """

    def __init__(self, features: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
        self.features, self.rows = list(features), list(rows)
        self.lengths = np.array([len(found["input_ids"]) for found in self.features], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """What the model sees of each."""
        return iter(self.features)

    def select(self, rows: np.ndarray) -> Self:
        return type(self)([self.features[row] for row in rows], [self.rows[row] for row in rows])

    @staticmethod
    def join(parts: Sequence[Examples]) -> Examples:
        return Examples([found for part in parts for found in part.features], [r for part in parts for r in part.rows])


def cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Cross entropy in float32, over all labels that are not `IGNORE`.

    Args:
        logits: [B, ..., C].
        labels: int64 [B, ...].
    """
    C, B = logits.shape[-1], len(labels)
    flat = F.cross_entropy(logits.reshape(-1, C).float(), labels.reshape(-1), ignore_index=IGNORE, reduction="none")
    total, counted = flat.view(B, -1).sum(1), (labels.reshape(B, -1) != IGNORE).sum(1)
    weight = int(counted.sum())
    # Without any label all is zero, with a gradient, and not 0 / 0.
    return Loss(total.sum() / max(weight, 1), total / counted.clamp(min=1), weight)


class TransformersTask(Task):
    """A task whose `model` is one of transformers, subnetworks and all; its folder is one that transformers loads.

    Attributes:
        auto: the class of transformers that loads the model, such as "AutoModelForSequenceClassification".
        tokenizer: of the model.
        options: the task's settings.
        max_length: tokens of an example that the model sees, at most.
    """

    auto: ClassVar[str]
    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, options: TaskSettings, max_length: int = 512) -> None:
        """Take a model and its tokenizer; one without padding pads with its end of sequence."""
        self.model, self.tokenizer, self.options = model, tokenizer, options
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no piece to pad with (expected a pad, eos or unk token)")
        self.max_length = min(max_length, positions_of(model, tokenizer))

    # ---- what a subclass says

    @classmethod
    def columns(cls, options: Any) -> list[str]:
        """The columns that rows must have; by default all that settings named ``*_column`` name, but the language's."""
        named = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
        return [c for name, c in named.items() if name.endswith("_column") and name != "language_column" and c]

    @classmethod
    def auto_class(cls, name: str, options: Any) -> str:
        """The class of transformers for the model called `name`; by default `auto`."""
        return cls.auto

    @classmethod
    def new_model(cls, name: str, options: Any, datasets: Splits) -> nn.Module:
        """The model to train, of the pretrained one called `name`; see `load_model`."""
        return load_model(cls.auto_class(name, options), name)

    def features(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the model sees of a row, as lists of numbers; "labels" (a number or a list) if the row has any."""
        raise NotImplementedError

    def loss_of(self, logits: Tensor, labels: Tensor) -> Loss:
        """The loss of a batch, logits [B, ...] against labels [B, ...]."""
        return cross_entropy(logits, labels)

    def answers(self, batch: Any, examples: Examples) -> list[Any]:
        """The predictions for a batch, in order, as JSON can hold them; by default the logits."""
        return self.logits(batch).float().tolist()

    # ---- what is the same for all

    @classmethod
    def load(
        cls,
        data: StrPath,
        languages: str | Sequence[str],
        options: TaskSettings,
        splits: Sequence[str] = ("train", "dev", "test"),
        optional: Sequence[str] = (),
    ) -> Splits:
        """Rows by language and split, with the columns of the task; see `fastmask.tasks.data.sources`.

        Rows whose text is missing (an empty cell of a CSV file) are left out with a warning.
        """
        loaded = super().load(data, languages, options, splits, optional)
        found: dict[str, dict[str, Any]] = {name: {} for name in loaded}
        for name, of in loaded.items():
            for split, rows in of.items():
                where = f"{os.fspath(data)}, {name} {split}"
                for column in cls.columns(options) if split == "train" else cls.input_columns(options):
                    if column not in rows.column_names:
                        raise ValueError(f"{where}: {unknown_name('column', column, rows.column_names)}")
                found[name][split] = _with_all(rows, cls.input_columns(options), where)
        return found

    @classmethod
    def build(cls, config: TrainConfig, datasets: Splits) -> Self:
        """A task with a pretrained model and a new head, which `config.seed` decides."""
        if config.model == "small":
            raise ConfigError(
                f"model is 'small', which only parsing has (expected a model of transformers for task {cls.name}: a "
                "folder, or a name on the Hub)"
            )
        tokenizer = load_tokenizer(config.model)
        torch.manual_seed(config.seed)
        model = cls.new_model(config.model, config.task_settings, datasets)
        check_fit(tokenizer, model, config.model)
        return cls(model, tokenizer, config.task_settings, config.max_length)

    @classmethod
    def open(cls, folder: StrPath) -> Self:
        """Read what `save` wrote."""
        file = Path(folder, FILE)
        if not file.is_file():
            raise FileNotFoundError(f"no saved task in {os.fspath(folder)} (expected {FILE})")
        saved: _Saved = read_json(file, _Saved)
        if saved.version > FORMAT_VERSION:
            raise FileError(file, f"has version {saved.version} (expected at most {FORMAT_VERSION})")
        if saved.task != cls.name:
            raise FileError(file, f"is of task {saved.task!r} (expected {cls.name!r})")
        name, options = os.fspath(folder), cls.settings.from_dict(saved.settings)
        model = load_model(cls.auto_class(name, options), name, whole=True)
        tokenizer = load_tokenizer(name)
        check_fit(tokenizer, model, name)
        return cls(model, tokenizer, options, saved.max_length)

    def save(self, folder: StrPath) -> None:
        """Write a folder that ``from_pretrained`` of transformers reads, and ``task.json`` beside it."""
        with without_progress_bars():
            plain: Any = plain_class_of(self.model)  # a run keeps its masks elsewhere
            plain.save_pretrained(self.model, folder)
            self.tokenizer.save_pretrained(folder)
        settings = dataclasses.asdict(self.options)
        saved = _Saved(version=FORMAT_VERSION, task=self.name, max_length=self.max_length, settings=settings)
        write_text(Path(folder, FILE), saved.model_dump_json(indent=1))

    @property
    def encoder_name(self) -> str:
        """All below the head: what transformers calls the base model."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return f"{prefix}." if prefix and isinstance(getattr(self.model, prefix, None), nn.Module) else ""

    def rates(self, head: float, encoder: float) -> dict[str, float]:
        """The encoder's for everything where the head has no weights of its own."""
        names = [name for name, _ in self.model.named_parameters()]
        if all(name.startswith(self.encoder_name) for name in names):
            return {"": encoder}
        return super().rates(head, encoder)

    def examples(self, rows: Rows) -> Examples:
        """Rows with what the model sees of each; a warning says how many are cut."""
        rows = list(rows)
        features = [self.features(row) for row in rows]
        lists = [[of for of in (found["input_ids"], found.get(LABELS)) if isinstance(of, list)] for found in features]
        if long := sum(any(len(of) >= self.max_length for of in parts) for parts in lists):
            warnings.warn(
                f"{long} of {len(rows)} {self.example_word} may be cut: they fill the {self.max_length} "
                f"{self.token_word} that the model sees",
                stacklevel=2,
            )
        return Examples(features, rows)

    def encoded(self, row: Mapping[str, Any], *columns: str | None) -> dict[str, Any]:
        """What the tokenizer makes of the text in a column, or in two, cut to what the model takes; for `features`.

        Raises:
            KeyError: no such column.
            ValueError: no text in it.
        """
        texts = [self.text(row, column) for column in columns if column]
        found = dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False))
        if not found["input_ids"]:  # of an empty text, and no model reads nothing
            found = {name: [self.tokenizer.pad_token_id if name == "input_ids" else 0] for name in found}
        return found

    @staticmethod
    def text(row: Mapping[str, Any], column: str) -> str:
        """A column's text; a list of words is joined."""
        if column not in row:
            raise unknown_name("column", column, row)
        found = row[column]
        if isinstance(found, (list, tuple)) and all(isinstance(word, str) for word in found):
            return " ".join(found)
        if not isinstance(found, str):
            raise ValueError(f"{column} is {found!r:.60} (expected text)")
        return found

    def training_examples(self, rows: Rows, name: str, kind: str = "training") -> Examples:
        """The same of rows that have labels."""
        found = self.examples(rows)
        labelled = np.array([i for i, item in enumerate(found) if self.is_labelled(item)], dtype=np.int64)
        if not len(labelled):
            raise ValueError(f"language {name!r} has no {kind} {self.example_word} with labels")
        if missing := len(found) - len(labelled):
            said = f"{missing} of {len(found)} {kind} {self.example_word} have no labels and are left out"
            warnings.warn(f"{name}: {said}", stacklevel=2)
        return found if len(labelled) == len(found) else found.select(labelled)

    def has_answers(self, examples: Examples) -> bool:
        return any(map(self.is_labelled, examples))

    def is_labelled(self, features: Mapping[str, Any]) -> bool:
        labels = features.get(LABELS)
        return any(label != IGNORE for label in labels) if isinstance(labels, list) else labels not in (None, IGNORE)

    def check(self, train: Mapping[str, Examples]) -> None:
        """See that the tokenizer knows the text."""
        unknown_id = self.tokenizer.unk_token_id
        unknown = {
            name: float(np.mean([piece == unknown_id for found in examples for piece in found["input_ids"]]))
            for name, examples in train.items()
        }
        check_known(unknown, "text is")

    def collate(self, examples: Examples, language_ids: Tensor | None = None) -> Any:
        """Pad to one batch, "labels" with `IGNORE`, if all of the examples have them."""
        inputs = [{k: v for k, v in found.items() if k != LABELS and not k.startswith("_")} for found in examples]
        batch = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt")
        if all(LABELS in found for found in examples):
            labels: Any = [found[LABELS] for found in examples]
            if isinstance(labels[0], list):
                labels = pad_sequence(
                    [torch.tensor(of, dtype=torch.int64, device="cpu") for of in labels], True, IGNORE
                )
            batch[LABELS] = torch.as_tensor(labels)
        if language_ids is not None:
            batch["language_ids"] = language_ids
            if self.is_attached:  # counted here, so that nothing need be asked of a GPU
                languages = attached(self.encoder).subnets.languages
                batch["language_counts"] = LanguageCounts.of(language_ids, len(languages))
        return batch

    def logits(self, batch: Any, model: nn.Module | None = None) -> Tensor:
        """What the model makes of a batch, [B, ..., C]."""
        found: Any = (self.model if model is None else model)(**{k: v for k, v in batch.items() if k != LABELS})
        return found.logits

    def loss(self, batch: Any, model: nn.Module | None = None) -> Loss:
        if LABELS not in batch:
            raise ValueError(f"some of the {self.example_word} have no labels to learn from")
        return self.loss_of(self.logits(batch, model), batch[LABELS])

    @torch.no_grad()
    def predict(self, examples: Examples, batch_size: int = 64) -> list[Any]:
        """The `answers` for all examples, in order; batches are made of like lengths."""
        found: dict[int, Any] = {}
        with evaluating(self.model):
            for rows in like_lengths(examples.lengths, batch_size, self.device):
                part = examples.select(rows)
                batch = self.collate(part).to(self.device)
                found.update(zip(rows.tolist(), self.answers(batch, part), strict=True))
        return [found[row] for row in range(len(examples))]


def _with_all(rows: Any, columns: Sequence[str], where: str) -> Any:
    """The rows of a data set that have something in all of some columns."""
    numbers = np.arange(1, len(rows) + 1)
    for column in columns:
        missing = rows.select_columns([column]).with_format("arrow")[:].column(0).is_null().to_numpy()
        if missing.any():
            said = f"{missing.sum()} of {len(rows)} rows have no {column} and are left out"
            warnings.warn(f"{where}: {said}; the first is row {numbers[missing.argmax()]}", stacklevel=3)
            numbers = numbers[~missing]
            rows = rows.select(np.flatnonzero(~missing))
    return rows


# ---- labels by name: of the training rows, in a model's config, and those that a model does not have


def name_of(label: Any) -> str | None:
    """A label by its name; None if there is none: not given, or ``_`` as CoNLL-U has it."""
    if isinstance(label, (list, tuple, dict)):
        raise ValueError(f"a label is {label!r:.60} (expected a name or a number)")
    if isinstance(label, float):  # a column of whole numbers with a hole in it; NaN is the hole
        label = None if label != label else int(label) if label.is_integer() else label
    return None if label is None or label in ("_", "") else str(label)


def model_for(auto: str, name: str, labels: Iterable[Any]) -> nn.Module:
    """A pretrained model with a head for these labels, whose names its config has; see `load_model`.

    Raises:
        ValueError: fewer than two labels.
    """
    names = sorted({found for label in labels if (found := name_of(label)) is not None}, key=_by_number)
    if len(names) < 2:
        raise ValueError(f"the training data has the labels {', '.join(names) or 'none'} (expected at least two)")
    theirs = labels_in(name)
    if sorted(theirs) == sorted(names):
        names = theirs  # else its head, which has the same shape, would say one class where it means another
    numbers = {label: number for number, label in enumerate(names)}
    return load_model(auto, name, id2label=dict(enumerate(names)), label2id=numbers)


def labels_of(model: Any) -> list[str]:
    """The labels of a model, in the order of its logits."""
    config = model.config
    return [config.id2label[number] for number in range(config.num_labels)]


def check_labels(given: Iterable[Any], known: Iterable[str], unknown: str) -> set[str]:
    """The labels that the model does not have, which are to be left out.

    Args:
        given: of the rows.
        known: of the model.
        unknown: one of `UNKNOWN_LABELS`; none but relations have a universal part, so "universal" is as "fail".

    Raises:
        ValueError: there are some, and `unknown` is not "ignore"; lists them with their counts.
        KeyError: `unknown` is none of the three.
    """
    if unknown not in UNKNOWN_LABELS:
        raise unknown_name("way of dealing with unknown labels", unknown, UNKNOWN_LABELS)
    known = set(known)
    missing = Counter(found for label in given if (found := name_of(label)) is not None and found not in known)
    if not missing:
        return set()
    if unknown != "ignore":
        raise ValueError(
            f"labels that the model was not trained on: {listed(missing)}. It knows {', '.join(sorted(known))}. "
            "Correct them, or leave them out (ignore)"
        )
    warnings.warn(f"labels that the model does not know are left out: {listed(missing)}", stacklevel=3)
    return set(missing)


def note_unknown(golds: Iterable[str], known: Iterable[str]) -> None:
    """Warn of labels that predictions are scored against and that the model does not have, so that all are wrong."""
    there = set(known)
    if missing := Counter(gold for gold in golds if gold not in there):
        warnings.warn(f"labels that the model does not know count as wrong: {listed(missing)}", stacklevel=3)


def _by_number(label: str) -> tuple[int, str]:
    """Numbers in their order, then words in theirs; 1 and 01 are two labels, whose order must not change."""
    return (int(label) if label.isascii() and label.isdigit() else 1 << 62, label)
