"""Language modelling: masked (BERT) or causal (GPT-2), scored by perplexity over all tokens of a language."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmask.settings import ConfigError, setting
from fastmask.tasks.pretrained import around, load_model, model_type_of
from fastmask.tasks.task import Loss, Rows, Splits, TaskSettings
from fastmask.tasks.transformers_task import IGNORE, LABELS, Examples, TransformersTask, cross_entropy

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest is left as it is (Devlin et al. 2019)
CLASSES = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


@dataclass
class LanguageModellingSettings(TaskSettings):
    """Settings of language modelling."""

    text_column: str = setting("text", "column with the text; a list of words is joined")
    kind: str = setting("auto", "what to predict: masked tokens or the next token", choices=("auto", *CLASSES))
    mask_share: float = setting(0.15, "share of tokens to predict (masked)", above=0, below=1)


class LanguageModelling(TransformersTask):
    """Predicts tokens. Longer texts are cut in pieces to train on, and cut off to score.

    While the model is in training mode, which tokens are masked is drawn from torch's generator, anew each time;
    otherwise the text alone decides, so that scores of two models are over the same tokens.
    """

    name, metric = "lm", "perplexity"
    higher_is_better, percent = False, False
    settings = LanguageModellingSettings
    example_word = "texts"
    options: LanguageModellingSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked = _kind(self.model.config.model_type, self.options) == "masked"
        if self.masked and self.tokenizer.mask_token_id is None:
            raise ConfigError("kind is 'masked', and the tokenizer has no mask (expected another model, or causal)")
        self.special = torch.tensor(sorted(self.tokenizer.all_special_ids), dtype=torch.int64, device="cpu")
        whole, alone = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        self.prefix, self.suffix = around(whole, alone, "text")
        self.room = self.max_length - len(self.prefix) - len(self.suffix)

    @classmethod
    def auto_class(cls, name: str, options: Any) -> str:
        return CLASSES[_kind(model_type_of(name), options)]

    @classmethod
    def new_model(cls, name: str, options: Any, datasets: Splits) -> nn.Module:
        """The pretrained model; an encoder such as BERT must be told that a causal one does not look ahead."""
        causal_encoder = (
            options.kind == "causal" and _kind(model_type_of(name), LanguageModellingSettings()) == "masked"
        )
        return load_model(cls.auto_class(name, options), name, **({"is_decoder": True} if causal_encoder else {}))

    def features(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return self._wrapped(self._pieces(row)[: self.room])

    def training_examples(self, rows: Rows, name: str, kind: str = "training") -> Examples:
        """All of the texts, in pieces that fit; what has no token to predict is left out."""
        features: list[dict[str, Any]] = []
        of: list[Mapping[str, Any]] = []
        texts = silent = 0
        for row in rows:
            ids, before = self._pieces(row), len(features)
            for first in range(0, len(ids), self.room):
                found = self._wrapped(ids[first : first + self.room])
                if self.is_labelled(found):
                    features.append(found)
                    of.append(row)
            texts, silent = texts + 1, silent + (len(features) == before)
        if not features:
            raise ValueError(f"language {name!r} has no {kind} {self.example_word} with a token to predict")
        if silent:
            said = f"{silent} of {texts} {kind} {self.example_word} have no token to predict and are left out"
            warnings.warn(f"{name}: {said}", stacklevel=2)
        return Examples(features, of)

    def _pieces(self, row: Mapping[str, Any]) -> list[int]:
        text = self.text(row, self.options.text_column)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _wrapped(self, ids: list[int]) -> dict[str, Any]:
        whole = [*self.prefix, *ids, *self.suffix]
        if not whole:  # of an empty text, and no model reads nothing
            return {"input_ids": [self.tokenizer.pad_token_id], "attention_mask": [0]}
        return {"input_ids": whole, "attention_mask": [1] * len(whole)}

    def is_labelled(self, features: Mapping[str, Any]) -> bool:
        ids = features["input_ids"]
        return len(ids) > 1 if not self.masked else not np.isin(ids, self.special.numpy()).all()

    def collate(self, examples: Examples, language_ids: Tensor | None = None) -> Any:
        """Pad, and choose what is predicted."""
        batch = super().collate(examples, language_ids)
        ids, there = batch["input_ids"], batch["attention_mask"].bool()
        if not self.masked:
            batch[LABELS] = ids.masked_fill(~there, IGNORE)
            return batch
        order, what, other = self._draws(examples, ids.shape).unbind(-1)
        open_ = there & ~torch.isin(ids, self.special)
        wanted = (open_.sum(1) * self.options.mask_share).round().clamp(min=1)
        rank = order.masked_fill(~open_, math.inf).argsort(1).argsort(1)
        chosen = open_ & (rank < wanted[:, None])
        batch[LABELS] = ids.masked_fill(~chosen, IGNORE)
        random_ids = (other * len(self.tokenizer)).long()
        ids = torch.where(chosen & (what < MASKED), self.tokenizer.mask_token_id, ids)
        batch["input_ids"] = torch.where(chosen & (what >= 1 - RANDOM), random_ids, ids)
        return batch

    def _draws(self, examples: Examples, shape: torch.Size) -> Tensor:
        """Numbers in [0, 1), [B, T, 3]."""
        if self.model.training:
            return torch.rand(*shape, 3, device="cpu")
        draws = torch.zeros(*shape, 3, device="cpu")
        for row, found in zip(draws, examples, strict=True):
            ids = np.array(found["input_ids"], dtype="<i8")
            generator = torch.Generator().manual_seed(zlib.crc32(ids.tobytes()))
            row[: len(ids)] = torch.rand(len(ids), 3, generator=generator, device="cpu")
        return draws

    def loss_of(self, logits: Tensor, labels: Tensor) -> Loss:
        """Cross entropy of the chosen tokens, or of all but the first given those before."""
        return cross_entropy(logits, labels) if self.masked else cross_entropy(logits[:, :-1], labels[:, 1:])

    def answers(self, batch: Any, examples: Examples) -> list[Any]:
        """For each text the loss of its predicted tokens, in nats, how many they are, and its perplexity."""
        each = self.loss(batch).each.double().tolist()
        labels = batch[LABELS] if self.masked else batch[LABELS][:, 1:]
        counts = (labels != IGNORE).sum(1).tolist()
        return [
            {"loss": mean * n, "tokens": n, "perplexity": _perplexity(mean) if n else None}
            for mean, n in zip(each, counts, strict=True)
        ]

    def score(self, examples: Examples, predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        tokens = sum(found["tokens"] for found in predictions)
        if not tokens:
            raise ValueError("the texts have no token to predict")
        return {"perplexity": _perplexity(sum(found["loss"] for found in predictions) / tokens)}


def _kind(model_type: str, options: LanguageModellingSettings) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if options.kind != "auto":
        return options.kind
    return "masked" if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that a float has no number
