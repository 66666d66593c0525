"""What a task is: how to load its data, build its model, make batches, take a loss, score, and save.

Everything else (the training loop, finding subnetworks, episodes, adapting, comparing, the commands) asks these
questions and knows no task by name. `fastmask.tasks.transformers_task` answers most of them for models of Hugging Face.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastmask.files import StrPath
from fastmask.models.attach import is_attached, language
from fastmask.settings import Settings, setting

if TYPE_CHECKING:
    from fastmask.training.config import TrainConfig

UNKNOWN_LABELS = ("fail", "universal", "ignore")

Rows = Iterable[Mapping[str, Any]]
Splits = Mapping[str, Mapping[str, Any]]  # language -> "train", "dev", "test" -> rows


class Examples(Protocol):
    """Rows made ready for the model, once; batches are made of some of them."""

    @property
    def lengths(self) -> np.ndarray:
        """Words or tokens of each example, int64 [n]."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def select(self, rows: np.ndarray) -> Self:
        """Return examples `rows` (int64 [m]), in that order."""
        ...

    @staticmethod
    def join(parts: Sequence[Any]) -> Any:
        """Put several one after the other."""
        ...


@dataclass(frozen=True)
class Loss:
    """The loss of a batch of B examples.

    Attributes:
        mean: [], what training minimises.
        each: [B], the mean of each example by itself: scores made of its gradients do not depend on the batch.
        weight: over how many words, tokens or examples `mean` is taken.
    """

    mean: Tensor
    each: Tensor
    weight: int


@dataclass
class TaskSettings(Settings):
    """Settings of a task beside those of training; a subclass adds fields, each of them a command-line option."""

    language_column: str = setting("language", "column with the language of an example")


class Task(abc.ABC):
    """One task with its model; a subclass in one file adds a task (docs/tasks.md).

    Attributes:
        name: what ``--task`` calls it.
        metric: the score that decides, one of those that `score` returns; development scores and tables show it.
        higher_is_better: of `metric`. Where it is False, pruning goes by the loss of the examples that it scores on.
        has_vectors: whether the model can add a vector of its language to each example (method `vector`).
        percent: whether scores are percentages (as LAS and accuracy are here).
        settings: class of the task's own settings.
        inputs: the settings that name columns with what the model reads.
        example_word: what an example is called in messages.
        token_word: what `Examples.lengths` counts.
        model: is trained; `encoder` is it or a part of it.
    """

    name: ClassVar[str]
    metric: str  # an instance may have another one, by its labels
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    has_vectors: ClassVar[bool] = False
    settings: ClassVar[type[TaskSettings]] = TaskSettings
    inputs: ClassVar[tuple[str, ...]] = ("text_column", "pair_column")
    example_word: ClassVar[str] = "examples"
    token_word: ClassVar[str] = "tokens"
    model: nn.Module

    # ---- data

    @classmethod
    def languages(cls, data: StrPath, options: TaskSettings) -> list[str]:
        """Every language of `data` that has training data, sorted."""
        from fastmask.tasks.data.sources import languages_of

        return languages_of(data, options.language_column)

    @classmethod
    def load(
        cls,
        data: StrPath,
        languages: str | Sequence[str],
        options: TaskSettings,
        splits: Sequence[str] = ("train", "dev", "test"),
        optional: Sequence[str] = (),
    ) -> Splits:
        """Rows by language, in the order asked for, and split.

        Args:
            data: a folder, a file or a name on the Hub; see `fastmask.tasks.data.sources`.
            languages: codes as the data has them, comma-separated or a list.
            options: of the task.
            splits: which of train, dev and test to load.
            optional: those of them that a language may lack.

        Raises:
            FileNotFoundError: no such data.
            KeyError: a language that is not there.
            ValueError: a language without a split that is not optional, or columns that the task needs and are missing.
        """
        from fastmask.tasks.data.sources import load

        return load(data, languages, options.language_column, splits, optional)

    @classmethod
    def demo(cls, folder: StrPath) -> tuple[str, list[str], list[str]] | None:
        """Data to show the task on, written below `folder`: where, training languages, others; None if there are none.

        Called again for a folder that holds it, this changes nothing.
        """
        return None

    @classmethod
    def read(cls, path: StrPath, options: TaskSettings) -> list[Mapping[str, Any]]:
        """The rows of one file, as `load` has them; by default JSON lines, CSV or Parquet by its ending.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        from fastmask.tasks.data.sources import read_file

        return read_file(path)

    # ---- the model

    @classmethod
    @abc.abstractmethod
    def build(cls, config: TrainConfig, datasets: Splits) -> Self:
        """A task with a new model, its labels those of the training rows; `config.seed` decides what is random.

        Raises:
            ConfigError: `config.model` is nothing the task can use.
        """

    @classmethod
    @abc.abstractmethod
    def open(cls, folder: StrPath) -> Self:
        """What `save` wrote; nothing attached, in evaluation mode.

        Raises:
            FileNotFoundError: something is missing.
            FileError: something is damaged.
        """

    @abc.abstractmethod
    def save(self, folder: StrPath) -> None:
        """Write model, tokenizer, labels and settings into an existing folder, masks left out; nothing is pickled."""

    @property
    def encoder(self) -> Any:
        """The module that subnetworks are attached to."""
        return self.model

    def rates(self, head: float, encoder: float) -> dict[str, float]:
        """Two learning rates by the beginning of parameters' names in `model`, as `fastmask.MetaLearner` takes them."""
        return {"": head, self.encoder_name.rstrip("."): encoder} if self.encoder_name else {"": encoder}

    @property
    def encoder_name(self) -> str:
        """What the names of the encoder's parameters in `model` begin with; "" if all of it is."""
        return ""

    @property
    def pretrained(self) -> bool:
        """Whether the encoder was, so that it takes smaller learning rates."""
        return True

    def input_embeddings(self) -> list[nn.Module]:
        """The tables that are looked up to make the encoder's input; see `fastmask.tasks.pretrained`.

        Raises:
            ValueError: none are known.
        """
        from fastmask.tasks.pretrained import input_embeddings

        return list(input_embeddings(self.encoder))

    def freeze_embeddings(self) -> None:
        """Leave `input_embeddings` as they are from now on: no gradient reaches them, and no optimizer keeps moments.

        A table that the output layer shares (tied weights) is frozen there, too.
        """
        for table in self.input_embeddings():
            table.requires_grad_(False)

    def add_vectors(self, languages: int) -> nn.Parameter:
        """Give the model a vector for each of so many languages, zero at first; only of a task that `has_vectors`.

        See `fastmask.tasks.parsing.parser.LanguageVectors`.
        """
        raise NotImplementedError

    def add_language(self, like: int) -> None:  # noqa: B027 - few models keep anything for each language
        """Of what the model keeps for each language, give a new one a copy of what language number `like` has."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def is_attached(self) -> bool:
        """Whether subnetworks are attached."""
        return is_attached(self.encoder)

    @contextmanager
    def reading(self, name: str | None) -> Iterator[None]:
        """Run the subnetwork of language `name` inside, or the full network.

        Raises:
            ValueError: a language is named and nothing is attached.
        """
        if name is not None and not self.is_attached:
            raise ValueError(f"language {name!r} was asked for, but the model has no subnetworks attached")
        with language(self.encoder, name) if self.is_attached else nullcontext():
            yield

    # ---- examples, batches and the loss

    @abc.abstractmethod
    def examples(self, rows: Rows) -> Any:
        """Rows as `Examples`; a warning says what the model will do badly with."""

    def training_examples(self, rows: Rows, name: str, kind: str = "training") -> Any:
        """The same for training on language `name`: what cannot be trained on is left out with a warning.

        Args:
            rows: with labels.
            name: the language, for messages.
            kind: what they are, for messages: "training" or "support".

        Raises:
            ValueError: nothing is left.
        """
        found = self.examples(rows)
        if not len(found):
            raise ValueError(f"language {name!r} has no {kind} {self.example_word}")
        return found

    def has_answers(self, examples: Any) -> bool:
        """Whether there is anything to score predictions against; a test set may come without."""
        return True

    def scorable(self, found: Mapping[str, Any], split: str) -> dict[str, Any]:
        """The `Examples` of each language that has answers; a warning names those that have none."""
        silent = [name for name, examples in found.items() if not self.has_answers(examples)]
        if silent:
            said = f"no {split} {self.example_word} of {', '.join(silent)} have labels that the model knows"
            warnings.warn(f"{said}: they are not scored", stacklevel=3)
        return {name: examples for name, examples in found.items() if name not in silent}

    def check(self, train: Mapping[str, Any]) -> None:  # noqa: B027 - few tasks have something to check
        """See that the training examples of all languages are for this model; raises ValueError, or warns."""

    def known_labels(self, rows: Sequence[Mapping[str, Any]], unknown: str = "fail") -> list[Mapping[str, Any]]:
        """Rows whose labels the model can learn.

        Args:
            rows: of a support set.
            unknown: what to do with labels that it does not have: one of `UNKNOWN_LABELS`. "fail"; "universal" (of a
                relation its universal part); "ignore": such words or rows have no label.

        Raises:
            ValueError: labels that are left unknown, listed.
        """
        return list(rows)

    @abc.abstractmethod
    def collate(self, examples: Any, language_ids: Tensor | None = None) -> Any:
        """One batch of all of `examples`, on the CPU; `language_ids` (int64 [B], or none) go to the encoder.

        A mapping (`transformers.BatchEncoding`), or any object whose `to` moves it to a device.
        """

    @abc.abstractmethod
    def loss(self, batch: Any, model: nn.Module | None = None) -> Loss:
        """The loss of a batch that has labels.

        Args:
            batch: of `collate`, on the model's device.
            model: `self.model`, or what wraps it (`DistributedDataParallel`).

        Raises:
            ValueError: no labels.
        """

    # ---- scores

    @abc.abstractmethod
    def predict(self, examples: Any, batch_size: int = 64) -> list[Any]:
        """What the model makes of each example, in order, with dropout off; touches no random state."""

    @abc.abstractmethod
    def score(self, examples: Any, predictions: Sequence[Any]) -> dict[str, float]:
        """Name -> score, `metric` first, of predictions against the labels of `examples`.

        Raises:
            ValueError: nothing to score.
        """

    def scored(self, examples: Any, name: str | None) -> dict[str, float]:
        """`score` of what the subnetwork of language `name`, or the full network (None), predicts of `examples`.

        Raises:
            ValueError: nothing to score, or a language is named and nothing is attached.
        """
        with self.reading(name):
            predictions = self.predict(examples)
        return self.score(examples, predictions)

    def predict_file(self, source: str, target: str) -> int:
        """Read a file, write it with predictions; returns the number of examples.

        By default JSON lines in and out, each line with a field "prediction" beside what it had.

        Raises:
            FileError: not JSON lines.
        """
        from fastmask.tasks.predicting import predicted_lines

        return predicted_lines(self, source, target)

    # ---- what identifies data, and languages to one another

    def digest(self, examples: Any) -> str:
        """SHA-256 of what the model sees of `examples`: a run is resumed only with the same."""
        found = hashlib.sha256()
        for item in examples:
            found.update(json.dumps(item, sort_keys=True, default=_exactly).encode())
        return found.hexdigest()

    def profile(self, rows: Rows) -> dict[str, Any] | None:
        """What rows tell of their language, as JSON, to find one near to it; None if the task knows no such thing."""
        return None

    def similarity(self, profile: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """How near each of `others` is to a profile, higher is nearer."""
        raise NotImplementedError

    @classmethod
    def input_columns(cls, options: TaskSettings) -> list[str]:
        """The columns that `inputs` name."""
        return [column for name in cls.inputs if (column := getattr(options, name, None))]

    @classmethod
    def words_of(cls, row: Mapping[str, Any], options: TaskSettings) -> Any:
        """What makes two rows the same example: a test example that stands in a support set is left out.

        What the model reads, a list of words being joined; all of the row where `inputs` name no column.
        """
        texts = [row.get(column) for column in cls.input_columns(options)]
        if not texts:
            return json.dumps({name: row[name] for name in sorted(row)}, default=_exactly)
        return tuple(" ".join(text) if isinstance(text, list | tuple) else text for text in texts)


def _exactly(value: Any) -> Any:
    """What JSON lacks, as JSON; not by the text of an array, which leaves out the middle of a long one."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return [str(plain.dtype), plain.shape, plain.view(-1).view(torch.uint8).numpy().tobytes().hex()]
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        array = np.asarray(value)
        return [str(array.dtype), array.shape, array.tolist() if array.dtype.hasobject else array.tobytes().hex()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def treebanks_of(rows: Rows) -> list[str]:
    """The treebanks that rows come from, in order; none of data of another kind."""
    names: Iterable[Any] = (row.get("treebank") for row in rows)
    if hasattr(rows, "column_names"):
        names = rows["treebank"] if "treebank" in rows.column_names else ()  # type: ignore[index]
    return [str(name) for name in dict.fromkeys(names) if name is not None]


def warn_of_pooling(language: str, rows: Rows) -> None:
    """Say which treebanks of a language are about to be scored as one."""
    if len(names := treebanks_of(rows)) > 1:
        warnings.warn(f"{language}: {', '.join(names)} are scored together (name one to score it alone)", stacklevel=2)


def heading(metric: str) -> str:
    """What tables call a score: LAS, but accuracy."""
    return metric.upper() if len(metric) <= 4 else metric.replace("_", " ")


def listed(counts: Counter[str]) -> str:
    """Labels with their counts, the most frequent first."""
    return ", ".join(f"{label} ({count})" for label, count in sorted(counts.items(), key=lambda item: (-item[1], item)))
