"""Dependency parsing as a task: Universal Dependencies treebanks, LAS and UAS."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastmask.files import StrPath
from fastmask.settings import setting
from fastmask.tasks.data.conllu import DEPREL, HEAD, Sentence, read_sentences
from fastmask.tasks.data.head_direction import direction_profile, direction_similarity
from fastmask.tasks.data.treebanks import load_treebanks, trained_languages
from fastmask.tasks.parsing.features import Batch, Encoded, Tree, cut, join
from fastmask.tasks.parsing.parser import LanguageVectors, Parser
from fastmask.tasks.parsing.vocabulary import SUBTYPES, UNKNOWN_UPOS, Vocabulary, check_deprels, universal
from fastmask.tasks.predicting import like_lengths, predicted_sentences
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
        """What makes the small encoder's input counts as encoder: the embeddings of words, tags and the root."""
        below = ["encoder"] if self.model.trigrams is None else ["encoder", "trigrams", "upos", "root"]
        below += [] if self.model.language_vectors is None else ["language_vectors"]
        return {"": head, **dict.fromkeys(below, encoder)}

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
        noticed = _Noticed(self.model)
        encoded = noticed.encode(list(rows))
        noticed.warn()
        return encoded

    def training_examples(self, rows: Rows, name: str, kind: str = "training") -> Encoded:
        """Sentences as arrays, without those that are too long."""
        features, limit = self.model.features, self.model.max_length
        select = getattr(rows, "select_columns", None)
        every = features.encode(select(COLUMNS) if select else rows, self.model.vocabulary)
        if not len(every):
            raise ValueError(f"language {name!r} has no {kind} sentences")
        room = features.max_positions if limit is None else min(limit, features.max_positions)
        long = features.positions(every) > room
        fits = np.flatnonzero((every.lengths > 0) & ~long)
        if not len(fits):
            raise ValueError(f"{name}: none of the {len(every)} {kind} sentences fits into {room} positions")
        if long.any():
            said = f"{long.sum()} of {len(every)} {kind} sentences are left out: they need more than {room} positions"
            warnings.warn(f"{name}: {said}", stacklevel=2)
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
        """Heads and labels of every sentence, in order; one that is longer than the encoder is parsed in windows."""
        features = self.model.features
        windows, first = cut(features, examples)
        trees: dict[int, Tree] = {}
        for rows in like_lengths(features.positions(windows), batch_size, self.device):
            batch = features.collate(windows.select(rows)).to(self.device)
            trees.update(zip(rows.tolist(), zip(*self.model.predict(batch), strict=True), strict=True))
        return join([trees[row] for row in range(len(windows))], first, self.model.vocabulary.loose)

    def score(self, examples: Encoded, predictions: Sequence[Tree]) -> dict[str, float]:
        """Percent of the words, punctuation included, with the right head and relation (LAS), and head (UAS).

        Subtypes are ignored. The official scorer of CoNLL 2018 gives the same, as words are those of the gold trees.
        """
        if not len(examples):
            raise ValueError("no sentences to score")
        heads = np.concatenate([heads for heads, _ in predictions])
        relations = np.array([universal(label) for _, labels in predictions for label in labels], dtype=object)
        right = heads == examples.flat("heads")
        las = right & (relations == examples.flat("relations"))
        return {"las": 100 * float(las.mean()), "uas": 100 * float(right.mean())}

    def predict_file(self, source: StrPath, target: StrPath) -> int:
        """Parse a CoNLL-U file into another one; see `predicted_sentences`.

        Only HEAD and DEPREL of words change. Every sentence gets a tree with one root, labelled ``root`` as no other
        word is. The small model reads UPOS, and warns where it is missing.
        """
        noticed = _Noticed(self.model)

        def trees(sentences: list[Sentence]) -> Iterator[dict[int, Sequence[str]]]:
            for heads, labels in self.predict(noticed.encode([vars(sentence) for sentence in sentences])):
                yield {HEAD: [str(head) for head in heads.tolist()], DEPREL: labels}

        count = predicted_sentences(source, target, trees)
        noticed.warn(tags=True)
        return count

    def digest(self, examples: Encoded) -> str:
        """Of words, tags, heads and labels, in their order."""
        digest, vocabulary = hashlib.sha256(), self.model.vocabulary
        starts = [np.concatenate([[0], np.cumsum(of)]) for of in (examples.lengths, examples.flat("counts"))]
        for numbers in (*starts, examples.flat("units"), examples.flat("heads")):
            digest.update(numbers.astype("<i8").tobytes())
        # By name: one label more in one language moves the numbers of all.
        for of, names in (("upos", ["", *vocabulary.upos]), ("deprels", [*vocabulary.deprels, ""])):
            ids = examples.flat(of)
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


class _Noticed:
    """What is noticed about sentences, of which a data set or a file has many, and said once."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.sentences = self.words = self.long = self.unknown = self.untagged = 0
        self.longest = ""  # not the longest one, but the first that is too long

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Encoded:
        """Some sentences, looked at."""
        encoded = self.parser.features.encode(rows, self.parser.vocabulary)
        long = self.parser.features.too_long(encoded)
        if len(long) and not self.long:
            row = int(long[0])
            name = str(rows[row].get("sent_id") or "")
            called = f" ({name if name.isprintable() else repr(name)})" if name else ""
            self.longest = f"sentence {self.sentences + row + 1}{called} with {int(encoded.lengths[row])} words"
        self.long += len(long)
        self.sentences += len(encoded)
        self.words += int(encoded.lengths.sum())
        self.unknown += int(self.parser.features.unknown(encoded).sum())
        self.untagged += int((encoded.flat("upos") == UNKNOWN_UPOS).sum())
        return encoded

    def warn(self, tags: bool = False) -> None:
        """Say it; of missing tags only where asked: a language's test set may well have a tag that is new."""
        if self.long:
            warnings.warn(
                f"{self.long} of {self.sentences} sentences do not fit into the encoder's "
                f"{self.parser.features.max_positions} positions and are parsed in parts; the first is {self.longest}",
                stacklevel=3,
            )
        if self.unknown > self.words / 2:
            warnings.warn(
                f"{self.unknown} of {self.words} words are unknown to the model's tokenizer: it reads nothing of them",
                stacklevel=3,
            )
        if tags and self.untagged and self.parser.upos is not None:
            warnings.warn(
                f"{self.untagged} words have no UPOS, or one not seen in training; this model leans on it", stacklevel=3
            )
