"""Encoders and tokenizers of Hugging Face, from a folder or the Hub: complete, or an error that says what is missing.

transformers fills missing weights with random numbers and makes a tokenizer without a vocabulary where there is none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmask.files import FileError

__all__ = ["check_fit", "load_encoder", "load_tokenizer", "positions_of", "without_progress_bars"]

PIECES = 10  # beside its special ones: a tokenizer that was made of nothing has up to three
_UNREAD = re.compile(r"(^|\.)pooler\.")  # parameters that the parser never reads


def load_encoder(name: str, whole: bool = False) -> nn.Module:
    """Load an encoder in float32, without the pooling layer nobody reads where the class can do without.

    Args:
        name: a folder or a name on the Hub; weights are read from safetensors only, and no code.
        whole: the weights are those of the encoder alone, and none may be left over (a saved parser). Otherwise they
            may have more, such as the head of a language model.

    Raises:
        OSError: there is no such model.
        FileError: it is damaged, or a weight of the encoder is missing, of another shape or left over.
    """
    from transformers import AutoModel

    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"no folder of a model at {name}")
    given: dict[str, Any] = {
        "dtype": torch.float32,  # that of the file otherwise; weights that are trained are kept in float32
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": os.path.isdir(name),
        "ignore_mismatched_sizes": True,  # listed below, with their shapes
        "output_loading_info": True,
    }
    load: Callable[..., Any] = AutoModel.from_pretrained
    with without_progress_bars(), _clear_errors(name, "an encoder"):
        try:
            encoder, found = load(name, add_pooling_layer=False, **given)
        except TypeError as error:
            if "add_pooling_layer" not in str(error):
                raise
            encoder, found = load(name, **given)
    missing = [key for key in found["missing_keys"] if not _UNREAD.search(key)]
    if missing:
        raise FileError(name, f"lacks {_listed(missing)} (expected every weight of a {type(encoder).__name__})")
    if found["mismatched_keys"]:
        key, given_shape, expected = min(found["mismatched_keys"])
        raise FileError(name, f"{key} has shape {list(given_shape)} (expected {list(expected)})")
    if whole and found["unexpected_keys"]:
        raise FileError(name, f"has {_listed(found['unexpected_keys'])} in excess (of a {type(encoder).__name__})")
    return encoder


def load_tokenizer(name: str, **options: Any) -> Any:
    """Load a tokenizer; `options` are those of `AutoTokenizer.from_pretrained`.

    Raises:
        OSError: there is no such model.
        FileError: it has no tokenizer, or a damaged one.
    """
    from transformers import AutoTokenizer

    with _clear_errors(name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=os.path.isdir(name), **options
        )
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        known = set(tokenizer.get_vocab()) - special
    if len(known) < PIECES:
        raise FileError(
            name,
            f"has no tokenizer: that which transformers makes of it knows {len(known)} pieces "
            "(expected the tokenizer of the encoder, such as a tokenizer.json)",
        )
    return tokenizer


def check_fit(tokenizer: Any, encoder: nn.Module, name: str) -> None:
    """Raise `FileError` if the tokenizer has pieces that the encoder has no embedding of."""
    try:
        rows = int(encoder.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # it has no table of pieces
        return
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise FileError(
            name,
            f"the tokenizer has pieces up to number {largest} (expected less than {rows}, what the encoder embeds)",
        )


def positions_of(encoder: nn.Module, tokenizer: Any) -> int:
    """Return how many positions a model can take; RoBERTa's table starts after its padding index."""
    config: Any = encoder.config
    room = int(getattr(config, "max_position_embeddings", 512))
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        room -= int(config.pad_token_id) + 1
    return min(room, int(min(tokenizer.model_max_length, 1 << 20)))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars over ours, and from listing weights that are checked here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _clear_errors(name: str, what: str) -> Iterator[None]:
    """Name the folder in whatever transformers and safetensors raise about a damaged one."""
    try:
        yield
    except (OSError, ImportError):  # no such model, not JSON, a package that is missing: the messages say so
        raise
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(name, f"cannot be read as {what}: {first[0]}") from error


def _listed(keys: Sequence[str] | set[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more weights" if len(first) > 3 else "")
