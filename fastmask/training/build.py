"""From settings and treebanks to what the training loop runs on: a parser and the arrays of the training data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmask.optim import LiveAdamW
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.vocabulary import Vocabulary
from fastmask.tasks.parsing.windows import rows_that_fit
from fastmask.training.config import TrainConfig

__all__ = ["build_optimizer", "build_parser", "encode_training_data", "peak_rates"]

UNKNOWN = 0.5  # share of the words, above which a tokenizer cannot be meant for a language


def build_parser(config: TrainConfig, datasets: Mapping[str, Mapping[str, Any]]) -> Parser:
    """Build a new parser with the vocabulary of the train splits; the seed decides its weights.

    Args:
        config: `model`, `subtypes`, `max_length` (small) and `seed` are read.
        datasets: by language code and split.
    """
    sentences = (row for splits in datasets.values() for row in splits["train"].select_columns(["upos", "deprels"]))
    vocabulary = Vocabulary.build(sentences, config.subtypes)
    torch.manual_seed(config.seed)
    if config.model == "small":
        # Long sentences are left out of training only; at least 512 positions are there to parse them.
        return Parser.small(vocabulary, max_positions=max(512, config.max_length))
    return Parser.pretrained(config.model, vocabulary)


def encode_training_data(
    parser: Parser, datasets: Mapping[str, Mapping[str, Any]], max_length: int
) -> dict[str, Encoded]:
    """Encode every language's train split; sentences too long for the encoder are left out with a warning.

    Raises:
        ValueError: a language has no sentence left, or the tokenizer does not know most of the words of all languages.
    """
    encoded = {}
    for language, splits in datasets.items():
        columns = splits["train"].select_columns(["words", "upos", "heads", "deprels"])
        every = parser.features.encode(columns, parser.vocabulary)
        rows = rows_that_fit(parser.features, every, "training sentences", language, max_length)
        if not len(rows):
            raise ValueError(f"language {language!r} has no training sentences")
        encoded[language] = every.select(rows)
    _check_known(parser, encoded)
    return encoded


def _check_known(parser: Parser, encoded: Mapping[str, Encoded]) -> None:
    """See that the tokenizer knows words: one of another model, or of other scripts, knows next to none."""
    unknown = {language: parser.features.unknown(part) for language, part in encoded.items()}
    if np.concatenate([*unknown.values()]).mean() > UNKNOWN:
        raise ValueError(
            "most training words are unknown to the model's tokenizer "
            f"(expected a model and a tokenizer for {', '.join(encoded)})"
        )
    for language, words in unknown.items():
        if words.mean() > UNKNOWN:
            warnings.warn(
                f"{language}: {words.mean():.0%} of the training words are unknown to the model's tokenizer: it reads "
                "nothing of them",
                stacklevel=3,
            )


def build_optimizer(parser: Parser, config: TrainConfig) -> torch.optim.AdamW:
    """Return the optimiser over the trainable parameters; vectors (biases, LayerNorm) do not decay.

    A pretrained encoder has groups, and so learning rates, of its own; see `peak_rates`.
    """
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
        for ((_, decays), parameters), rate in zip(_groups(parser).items(), peak_rates(parser, config), strict=True)
    ]
    if config.optimizer == "live":
        return LiveAdamW(settings, model=parser)
    # One pass over the weights instead of a dozen: 8 ms a step instead of 40 for the small model on a CPU.
    fused = next(parser.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(settings, fused=fused)


def peak_rates(parser: Parser, config: TrainConfig, episodes: bool = False) -> list[float]:
    """Peak learning rate of each group of `build_optimizer`, in plain steps or as the outer rate of episodes."""
    rate = config.meta_lr if episodes and config.meta_lr is not None else config.lr
    return [config.encoder_lr if of_encoder else rate for of_encoder, _ in _groups(parser)]


def _groups(parser: Parser) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """Trainable parameters by (of a pretrained encoder?, a matrix?)."""
    pretrained = parser.trigrams is None
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parser.named_parameters():
        if parameter.requires_grad:
            key = (pretrained and name.startswith("encoder."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return groups
