"""Dependency parsing as a task: Universal Dependencies treebanks, LAS and UAS."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastmask.files import StrPath
from fastmask.settings import setting
from fastmask.tasks.data.conllu import read_sentences
from fastmask.tasks.data.head_direction import direction_profile, direction_similarity
from fastmask.tasks.data.treebanks import load_treebanks, trained_languages
from fastmask.tasks.parsing.batch import Batch, Encoded
from fastmask.tasks.parsing.evaluation import Tree, encode, parse, predict_file, rows_that_fit
from fastmask.tasks.parsing.parser import LanguageVectors, Parser
from fastmask.tasks.parsing.vocabulary import SUBTYPES, Vocabulary, check_deprels, universal
from fastmask.tasks.pretrained import check_known
from fastmask.tasks.task import Loss, Rows, Splits, Task, TaskSettings

if TYPE_CHECKING:
    from fastmask.training.config import TrainConfig

COLUMNS = ["words", "upos", "heads", "deprels"]


@dataclass
class ParsingSettings(TaskSettings):
    """Settings of the parser."""

    subtypes: str = setting("drop", "whether to drop or keep subtypes of relations (nsubj:pass)", choices=SUBTYPES)


class Parsing(Task):
    """A biaffine parser; `model` is a `fastmask.tasks.parsing.parser.Parser`."""

    name, metric = "parsing", "las"
    has_vectors = True
    settings = ParsingSettings
    example_word, token_word = "sentences", "words"
    model: Parser

    def __init__(self, parser: Parser, max_length: int | None = None) -> None:
        """Take a parser; sentences of more than `max_length` positions are left out of training."""
        self.model = parser
        if max_length is not None:
            parser.max_length = max_length

    @classmethod
    def languages(cls, data: StrPath, options: TaskSettings) -> list[str]:
        codes = trained_languages(data)
        if not codes:
            raise ValueError(f"no treebank in {os.fspath(data)} has training data (*train.conllu)")
        return codes

    @classmethod
    def load(
        cls,
        data: StrPath,
        languages: str | Sequence[str],
        options: TaskSettings,
        splits: Sequence[str] = ("train", "dev", "test"),
        optional: Sequence[str] = (),
    ) -> Splits:
        return load_treebanks(data, languages, splits, optional)

    @classmethod
    def read(cls, path: StrPath, options: TaskSettings) -> list[Mapping[str, Any]]:
        return [dataclasses.asdict(sentence) for sentence in read_sentences(path)]

    @classmethod
    def demo(cls, folder: StrPath) -> tuple[str, list[str], list[str]]:
        from fastmask.tasks.data import synthetic

        return os.fspath(synthetic.treebanks_in(folder)), list(synthetic.SEEN), list(synthetic.UNSEEN)

    @classmethod
    def build(cls, config: TrainConfig, datasets: Splits) -> Self:
        """Build a parser with the vocabulary of the train splits; `config.model` "small" is trained from scratch."""
        options = config.task_settings
        assert isinstance(options, ParsingSettings)
        sentences = (row for splits in datasets.values() for row in splits["train"].select_columns(["upos", "deprels"]))
        vocabulary = Vocabulary.build(sentences, options.subtypes)
        torch.manual_seed(config.seed)
        if config.model == "small":
            # Long sentences are left out of training only; at least 512 positions are there to parse them.
            return cls(Parser.small(vocabulary, max_positions=max(512, config.max_length)), config.max_length)
        return cls(Parser.pretrained(config.model, vocabulary), config.max_length)

    @classmethod
    def open(cls, folder: StrPath) -> Self:
        return cls(Parser.load(folder))

    def save(self, folder: StrPath) -> None:
        self.model.save(Path(folder))

    @property
    def encoder(self) -> Any:
        return self.model.encoder

    @property
    def encoder_name(self) -> str:
        return "encoder."

    @property
    def pretrained(self) -> bool:
        return self.model.trigrams is None

    def rates(self, head: float, encoder: float) -> dict[str, float]:
        return self.model.rates(head, encoder)

    def input_embeddings(self) -> list[nn.Module]:
        """Of the small encoder those of trigrams and tags."""
        own: list[nn.Module] = [table for table in (self.model.trigrams, self.model.upos) if table is not None]
        return own or super().input_embeddings()

    def add_vectors(self, languages: int) -> nn.Parameter:
        self.model.language_vectors = LanguageVectors.zero(languages, self.model.inputs_like)
        return self.model.language_vectors.weight

    def add_language(self, like: int) -> None:
        if self.model.language_vectors is not None:
            self.model.language_vectors = self.model.language_vectors.with_copy(like)

    def examples(self, rows: Rows) -> Encoded:
        return encode(self.model, rows)

    def training_examples(self, rows: Rows, name: str, kind: str = "training") -> Encoded:
        """Sentences as arrays, without those that are too long."""
        select = getattr(rows, "select_columns", None)
        every = self.model.features.encode(select(COLUMNS) if select else rows, self.model.vocabulary)
        fits = rows_that_fit(self.model.features, every, f"{kind} sentences", name, self.model.max_length)
        if not len(fits):
            raise ValueError(f"language {name!r} has no {kind} sentences")
        return every.select(fits)

    def known_labels(self, rows: Sequence[Mapping[str, Any]], unknown: str = "fail") -> list[Mapping[str, Any]]:
        return check_deprels(rows, self.model.vocabulary, unknown)

    def check(self, train: Mapping[str, Encoded]) -> None:
        """See that the tokenizer knows words."""
        unknown = {name: float(self.model.features.unknown(part).mean()) for name, part in train.items()}
        check_known(unknown, "words are")

    def collate(self, examples: Encoded, language_ids: Tensor | None = None) -> Batch:
        batch = self.model.features.collate(examples)
        batch.language_ids = language_ids
        return batch

    def loss(self, batch: Batch, model: nn.Module | None = None) -> Loss:
        """Cross entropy of arcs and labels; `mean` over words."""
        found = (self.model if model is None else model)(batch)
        if found.loss is None:
            raise ValueError("the sentences have no heads to learn from (expected trees)")
        return Loss(found.loss, found.loss_per_sentence, batch.n_words)

    def predict(self, examples: Encoded, batch_size: int = 64) -> list[Tree]:
        return parse(self.model, examples, batch_size)

    def score(self, examples: Encoded, predictions: Sequence[Tree]) -> dict[str, float]:
        """Percent of the words, punctuation included, with the right head and relation (LAS), and head (UAS).

        Subtypes are ignored. The official scorer of CoNLL 2018 gives the same, as words are those of the gold trees.
        """
        if not len(examples):
            raise ValueError("no sentences to score")
        heads = np.concatenate([heads for heads, _ in predictions])
        relations = np.array([universal(label) for _, labels in predictions for label in labels], dtype=object)
        right = heads == examples.heads
        las = right & (relations == examples.relations)
        return {"las": 100 * float(las.mean()), "uas": 100 * float(right.mean())}

    def predict_file(self, source: str, target: str) -> int:
        return predict_file(self.model, source, target)

    def digest(self, examples: Encoded) -> str:
        """Of words, tags, heads and labels, in their order."""
        digest, vocabulary = hashlib.sha256(), self.model.vocabulary
        for numbers in (examples.word_start, examples.unit_start, examples.units, examples.heads):
            digest.update(numbers.astype("<i8").tobytes())
        # By name: one label more in one language moves the numbers of all.
        for ids, names in ((examples.upos, ["", *vocabulary.upos]), (examples.deprels, [*vocabulary.deprels, ""])):
            known = np.where(ids < 0, len(names) - 1, ids)
            digest.update("\t".join(np.array(names, dtype=object)[known]).encode())
        return digest.hexdigest()

    def profile(self, rows: Rows) -> dict[str, Any]:
        """How often the dependents of each relation stand before and after their heads."""
        return direction_profile(rows)

    def similarity(self, profile: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        return direction_similarity(profile, others)

    @classmethod
    def words_of(cls, row: Mapping[str, Any], options: TaskSettings) -> tuple[str, ...]:
        return tuple(row["words"])
