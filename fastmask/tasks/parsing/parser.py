"""A graph-based dependency parser: a Hugging Face encoder under biaffine arc and label scores."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastmask.files import FileError, StrPath, read_json, read_tensors, replace_file, write_tensors, write_text
from fastmask.models.attach import attached, is_attached
from fastmask.models.calls import plain_class_of
from fastmask.models.contexts import evaluating
from fastmask.records import Record
from fastmask.tasks.parsing.biaffine import ArcScorer, LabelScorer, maximum_spanning_trees
from fastmask.tasks.parsing.features import Batch, Features, PieceFeatures, TrigramFeatures
from fastmask.tasks.parsing.vocabulary import IGNORE, ROOT, UNSPECIFIED, Vocabulary
from fastmask.tasks.pretrained import (
    check_fit,
    load_model,
    load_tokenizer,
    positions_of,
    without_progress_bars,
)

FILE, TOKENIZER = "parser.json", "tokenizer"  # a file and a folder
FORMAT_VERSION = 1


class ParserConfig(Record):
    """Sizes of what stands on the encoder.

    Attributes:
        arc_size: width of the arc perceptrons.
        label_size: width of the label perceptrons; their form has labels * (label_size + 1)^2 weights. One less than a
            multiple of 16, so that with the constant 1 rows are aligned: a third faster on a CPU than one more.
        dropout: on word states and inside the perceptrons.
    """

    arc_size: int = Field(default=256, ge=1, le=1 << 16)
    label_size: int = Field(default=95, ge=1, le=1 << 16)
    dropout: float = Field(default=0.2, ge=0, lt=1)


class _Saved(Record):
    """What ``parser.json`` says."""

    version: int = Field(ge=1)
    sizes: ParserConfig
    deprels: list[str]
    upos: list[str]
    subtypes: str
    max_positions: int = Field(ge=2, le=1 << 24)
    max_length: int | None = Field(ge=1)
    buckets: int | None = Field(ge=1, le=1 << 26)  # of trigrams; None: words are the pieces of a tokenizer


@dataclass
class ParserOutput:
    """What one pass gives.

    Attributes:
        arc_scores: float32 [B, W, W + 1]: column 0 is the root, column j the j-th word.
        states: [B, W + 1, D], the root's state first.
        loss_per_sentence: float32 [B], mean over the sentence's words of arc and label cross entropy, so that a score
            made of its gradients does not depend on the batch; None without gold heads.
        loss: float32 [], the mean over the words of the batch; None without gold heads.
    """

    arc_scores: Tensor
    states: Tensor
    loss_per_sentence: Tensor | None = None
    loss: Tensor | None = None


class LanguageVectors(nn.Module):
    """One learned vector for each of L languages, added to the encoder's input: the control for what routing tells.

    Which subnetwork runs also says which language a sentence is in, to a model that is otherwise told nothing of it.
    Method `vector` gives that much to the full network: every language owns all units, and has a vector, zero at first.
    Examples find theirs by the language ids that would find a subnetwork, so choosing for an unseen language, adapting
    and scoring work as they do with masks: a training language's vector for its mask, the mean of all for the union.

    Attributes:
        weight: [L, D], in the order of the subnetworks' languages.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @classmethod
    def zero(cls, languages: int, like: Tensor) -> LanguageVectors:
        """No vector says anything yet; width, dtype and device are those of `like`, [..., D]."""
        return cls(like.new_zeros(languages, like.shape[-1]))

    def forward(self, inputs: Tensor, language_ids: Tensor | int | None) -> Tensor:
        """Inputs [B, T, D] with the vector of each example's language; unchanged of none and of the full network (-1).

        `language_ids` are int64 [B], or one for all; L, a language more than there are, is their union.
        """
        if language_ids is None or (isinstance(language_ids, int) and language_ids < 0):
            return inputs
        mean, none = self.weight.mean(0, keepdim=True), torch.zeros_like(self.weight[:1])
        table = torch.cat([self.weight, mean, none])  # -1 is the last row
        ids = torch.as_tensor(language_ids, device=table.device)
        chosen = table[ids].to(inputs.dtype)
        return inputs + (chosen if ids.ndim == 0 else chosen[:, None])

    def with_copy(self, language: int) -> LanguageVectors:
        """The same, and a last one that is a copy of `language`'s: -1 is none, L the mean of all."""
        added = self(self.weight.new_zeros(1, 1, self.weight.shape[1]), language)[0]
        return LanguageVectors(torch.cat([self.weight, added]).detach().clone())


class Parser(nn.Module):
    """Encoder, arcs and labels; `parser.encoder` is the model that `fastmask.attach` takes.

    While the encoder is attached, `language_ids` reach it; otherwise they are not passed on.

    Attributes:
        max_length: positions of a sentence to train on, at most; None: what the encoder has.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: TrigramFeatures | PieceFeatures,
        vocabulary: Vocabulary,
        config: ParserConfig,
    ) -> None:
        """Put a parser on `encoder`; see `small` and `pretrained` for the usual ways."""
        super().__init__()
        self.encoder = encoder
        self.features: Features = features
        self.vocabulary = vocabulary
        self.config = config
        self.max_length: int | None = None
        hidden = int(encoder.config.hidden_size)  # type: ignore[union-attr,arg-type]
        scale = float(getattr(encoder.config, "initializer_range", 0.02))
        self.root = nn.Parameter(torch.randn(hidden) * scale)
        if isinstance(features, TrigramFeatures):
            self.trigrams: nn.EmbeddingBag | None = nn.EmbeddingBag(features.buckets, hidden, mode="mean")
            self.upos: nn.Embedding | None = nn.Embedding(len(vocabulary.upos) + 1, hidden, padding_idx=0)
            # As large as the encoder's positions, or its LayerNorm would drown word order in the word's form.
            nn.init.normal_(self.trigrams.weight, std=2 * scale)
            nn.init.normal_(self.upos.weight, std=scale)
            with torch.no_grad():
                self.upos.weight[0].zero_()
            encoder.get_input_embeddings().requires_grad_(False)  # type: ignore[operator] # which are never looked up
        else:
            self.trigrams = self.upos = None
        self.language_vectors: LanguageVectors | None = None  # of method `vector`
        self.dropout = nn.Dropout(config.dropout)
        self.arcs = ArcScorer(hidden, config.arc_size, config.dropout)
        self.labels = LabelScorer(hidden, config.label_size, len(vocabulary.deprels), config.dropout)

    @classmethod
    def small(
        cls,
        vocabulary: Vocabulary,
        layers: int = 4,
        heads: int = 8,
        head_size: int = 32,
        ffn: int = 1024,
        buckets: int = 16384,
        max_positions: int = 512,
        encoder_dropout: float = 0.1,
        config: ParserConfig | None = None,
    ) -> Parser:
        """Build a parser from scratch: an HF `BertModel` fed with trigram and UPOS embeddings."""
        from transformers import BertConfig, BertModel

        bert = BertConfig(
            vocab_size=1,  # never looked up: words come in as `inputs_embeds`
            pad_token_id=0,
            hidden_size=heads * head_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn,
            max_position_embeddings=max_positions,
            hidden_dropout_prob=encoder_dropout,
            attention_probs_dropout_prob=encoder_dropout,
        )
        encoder = BertModel(bert, add_pooling_layer=False)
        return cls(encoder, TrigramFeatures(buckets, max_positions), vocabulary, config or ParserConfig())

    @classmethod
    def pretrained(cls, name: str, vocabulary: Vocabulary) -> Parser:
        """Put a parser on any encoder that `transformers.AutoModel` and `AutoTokenizer` find on disk or on the Hub.

        Raises:
            OSError: there is no such model.
            FileError: its weights are incomplete, it has no tokenizer, or one is damaged.
        """
        encoder = load_model("AutoModel", name, add_pooling_layer=False)
        tokenizer = load_tokenizer(name)
        check_fit(tokenizer, encoder, name)
        features = PieceFeatures(tokenizer, positions_of(encoder, tokenizer))
        return cls(encoder, features, vocabulary, ParserConfig())

    @property
    def inputs_like(self) -> Tensor:
        """Something as wide as the encoder's input, [..., D]: embeddings may be narrower than states (ALBERT)."""
        if self.trigrams is not None:
            return self.root
        return self.encoder.get_input_embeddings().weight  # type: ignore[operator]

    def forward(self, batch: Batch) -> ParserOutput:
        """Score all arcs of a batch, and the losses where it has gold heads."""
        states = self.dropout(self.encode(batch))
        mask = batch.word_mask
        scores = self.arcs(states, mask)
        rows, columns = mask.nonzero(as_tuple=True)
        gold = batch.heads[rows, columns]
        if not bool((gold != IGNORE).any()):
            return ParserOutput(scores, states)
        arc_loss = F.cross_entropy(scores[rows, columns], gold, ignore_index=IGNORE, reduction="none")
        label_scores = self.labels(states, rows, columns + 1, gold.clamp(min=0))
        wanted = batch.deprels[rows, columns].masked_fill(gold == IGNORE, IGNORE)
        label_loss = F.cross_entropy(label_scores, wanted, ignore_index=IGNORE, reduction="none")
        total = arc_loss + label_loss
        per_sentence = total.new_zeros(len(batch.lengths)).index_add(0, rows, total) / batch.lengths
        return ParserOutput(scores, states, per_sentence, total.mean())

    def encode(self, batch: Batch) -> Tensor:
        """Return the states [B, W + 1, D] of the root (first) and the words.

        A batch without language ids leaves the choice to `fastmask.language`.
        """
        attached_now, language_ids = is_attached(self.encoder), batch.language_ids
        extra = {"language_ids": language_ids} if attached_now and language_ids is not None else {}

        def with_vectors(inputs: Tensor) -> Tensor:
            """Of the languages given, or of that of `fastmask.language`, where there are any."""
            if self.language_vectors is None or not attached_now:
                return inputs
            router = attached(self.encoder).router
            of_context = router.default.get()
            said = router.standing if of_context is None else of_context
            return self.language_vectors(inputs, said if language_ids is None else language_ids)

        T = batch.upos.shape[1] + 1 if self.trigrams is not None else batch.units.shape[1]
        attention = (torch.arange(T, device=batch.unit_lengths.device) < batch.unit_lengths[:, None]).long()
        if self.trigrams is not None and self.upos is not None:
            B, W = batch.upos.shape
            words = self.trigrams(batch.units, batch.places).view(B, W, -1) + self.upos(batch.upos)
            inputs = torch.cat([self.root.expand(B, 1, -1), words], dim=1)
            return self.encoder(inputs_embeds=with_vectors(inputs), attention_mask=attention, **extra).last_hidden_state
        given: dict[str, Tensor] = {"input_ids": batch.units}
        if self.language_vectors is not None:
            pieces = self.encoder.get_input_embeddings()(batch.units)  # type: ignore[operator]
            given = {"inputs_embeds": with_vectors(pieces)}
        states = self.encoder(**given, attention_mask=attention, **extra).last_hidden_state
        rows = torch.arange(len(states), device=states.device)[:, None]
        root = self.root.to(states.dtype).expand(len(states), 1, -1)
        return torch.cat([root, states[rows, batch.places]], dim=1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> tuple[list[np.ndarray], list[list[str]]]:
        """Return the heads (int arrays, 0 = root) of the best single-rooted trees and the labels of their arcs.

        The root is labelled ``root`` (or a subtype of it), and no other word is. Runs with dropout off and leaves every
        module in the mode it was in.
        """
        with evaluating(self):
            states = self.encode(batch)
            mask = batch.word_mask
            trees = maximum_spanning_trees(self.arcs(states, mask).cpu().numpy(), batch.lengths_list)
            rows, columns = mask.nonzero(as_tuple=True)
            heads = torch.from_numpy(np.concatenate(trees).astype(np.int64)).to(states.device)
            scores = self.labels(states, rows, columns + 1, heads)
        roots = self._best(scores, self.vocabulary.roots, ROOT)
        others = self._best(scores, self.vocabulary.others, UNSPECIFIED)
        every = zip(roots, others, heads.tolist(), strict=True)
        names = (root if head == 0 else other for root, other, head in every)
        return trees, [list(itertools.islice(names, length)) for length in batch.lengths_list]

    def _best(self, scores: Tensor, allowed: np.ndarray, otherwise: str) -> list[str]:
        """The best label of every row of `scores` [n, R] out of the numbers in `allowed`; `otherwise` if none is."""
        if not len(allowed):
            return [otherwise] * len(scores)
        best = scores[:, torch.from_numpy(allowed).to(scores.device)].argmax(1).tolist()
        return [self.vocabulary.deprels[allowed[i]] for i in best]

    def save(self, folder: StrPath) -> None:
        """Write ``encoder/`` (save_pretrained), ``parser.safetensors``, ``parser.json`` and, of pieces, ``tokenizer/``.

        Nothing is pickled. An attached encoder is saved whole, without its masks.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with without_progress_bars():
            plain: Any = plain_class_of(self.encoder)  # a run keeps its masks beside the parser
            plain.save_pretrained(self.encoder, folder / "encoder")
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}
        replace_file(folder / "parser.safetensors", lambda path: write_tensors(path, own))
        if isinstance(self.features, PieceFeatures):
            self.features.tokenizer.save_pretrained(folder / TOKENIZER)
        saved = _Saved(
            version=FORMAT_VERSION,
            sizes=self.config,
            deprels=list(self.vocabulary.deprels),
            upos=list(self.vocabulary.upos),
            subtypes=self.vocabulary.subtypes,
            max_positions=self.features.max_positions,
            max_length=self.max_length,
            buckets=self.features.buckets if isinstance(self.features, TrigramFeatures) else None,
        )
        write_text(folder / FILE, saved.model_dump_json(indent=1))

    @classmethod
    def load(cls, folder: StrPath) -> Parser:
        """Read what `save` wrote; the encoder comes back unattached and the parser in evaluation mode.

        Raises:
            FileNotFoundError: no saved parser there, or one of its files is missing.
            FileError: a file is damaged or of a newer version, or weights are missing or left over.
        """
        folder = Path(folder)
        description = folder / FILE
        if not description.is_file():
            raise FileNotFoundError(f"no parser in {folder} (expected {description.name})")
        saved: _Saved = read_json(description, _Saved)
        if saved.version > FORMAT_VERSION:
            raise FileError(description, f"has version {saved.version} (expected at most {FORMAT_VERSION})")
        try:
            vocabulary = Vocabulary(saved.deprels, saved.upos, saved.subtypes)
        except ValueError as error:
            raise FileError(description, str(error)) from None
        features: TrigramFeatures | PieceFeatures
        if saved.buckets is None:
            tokenizer = folder / TOKENIZER
            if not tokenizer.is_dir():
                raise FileNotFoundError(f"no tokenizer at {tokenizer} (expected that which was saved with the parser)")
            features = PieceFeatures(load_tokenizer(os.fspath(tokenizer)), saved.max_positions)
        else:
            features = TrigramFeatures(saved.buckets, saved.max_positions)
        encoder = load_model("AutoModel", os.fspath(folder / "encoder"), whole=True, add_pooling_layer=False)
        if isinstance(features, PieceFeatures):
            check_fit(features.tokenizer, encoder, os.fspath(folder))
        parser = cls(encoder, features, vocabulary, saved.sizes)
        parser.max_length = saved.max_length
        parser._load_own(folder / "parser.safetensors")
        return parser.eval()

    def _load_own(self, path: Path) -> None:
        found, _ = read_tensors(path)
        if vectors := [value for name, value in found.items() if name.startswith("language_vectors.")]:
            self.language_vectors = LanguageVectors.zero(len(vectors[0]), self.inputs_like)
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}
        if found.keys() != own.keys():
            missing, more = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
            raise FileError(path, f"lacks {missing} and has {more} in excess")
        for name, value in own.items():
            if (found[name].shape, found[name].dtype) != (value.shape, value.dtype):
                given, expected = (f"{list(t.shape)} of {t.dtype}" for t in (found[name], value))
                raise FileError(path, f"{name} is {given} (expected {expected})")
        self.load_state_dict(found, strict=False)
