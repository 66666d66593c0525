"""Models and tokenizers of Hugging Face, from a folder or the Hub: complete, or an error that says what is missing.

transformers fills missing weights with random numbers and makes a tokenizer without a vocabulary where there is none.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmask.files import FileError

UNKNOWN = 0.5  # share of the text, above which a tokenizer cannot be meant for a language
PIECES = 10  # beside its special ones: a tokenizer that was made of nothing has up to three
_UNREAD = re.compile(r"(^|\.)pooler\.")  # parameters that a task does not read, or learns anew


def load_model(auto: str, name: str, whole: bool = False, **options: Any) -> nn.Module:
    """Load a model in float32, in evaluation mode.

    Args:
        auto: the class of transformers that picks the model's, such as "AutoModelForTokenClassification", or
            "AutoModel" for an encoder.
        name: a folder or a name on the Hub; weights are read from safetensors only, and no code.
        whole: every weight is there, and none is left over (a saved task). Otherwise there may be more, such as the
            head of a language model, and the head, and a pooling layer below it, may be missing or of another size: it
            is then new, drawn from torch's generator.
        options: what the config gets, such as `num_labels`; `add_pooling_layer` goes where the class knows of it.

    Raises:
        OSError: there is no such model.
        FileError: it is damaged, no model of that kind, or a weight below the head is missing or of another shape.
    """
    what = "an encoder" if auto == "AutoModel" else f"a model for {auto.removeprefix('AutoModelFor')}"
    model, found = _loaded(auto, name, what, **options)
    below = f"{getattr(model, 'base_model_prefix', '')}."
    no_head = not hasattr(model, below[:-1])

    def counts(key: str) -> bool:
        return whole or ((no_head or key.startswith(below)) and not _UNREAD.search(key))

    missing = [key for key in found["missing_keys"] if counts(key)]
    mismatched = [item for item in found["mismatched_keys"] if counts(item[0])]
    _check_weights(name, model, missing, mismatched, found["unexpected_keys"] if whole else ())
    return model.eval()


def _loaded(auto: str, name: str, what: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model and what transformers says of loading it; `add_pooling_layer` is left out where a class knows no such."""
    import transformers

    _check_there(name)
    options |= {
        "dtype": torch.float32,  # that of the file otherwise; weights that are trained are kept in float32
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": os.path.isdir(name),
        "ignore_mismatched_sizes": True,  # listed below, with their shapes
        "output_loading_info": True,
    }
    load: Callable[..., Any] = getattr(transformers, auto).from_pretrained
    with without_progress_bars(), _clear_errors(name, what):
        try:
            return load(name, **options)
        except TypeError as error:
            if "add_pooling_layer" not in options or "add_pooling_layer" not in str(error):
                raise
            del options["add_pooling_layer"]
            return load(name, **options)


def _check_weights(name: str, model: nn.Module, missing: Any, mismatched: Any, unexpected: Any) -> None:
    if missing:
        raise FileError(name, f"lacks {_listed(missing)} (expected every weight of a {type(model).__name__})")
    if mismatched:
        key, given_shape, expected = min(mismatched)
        raise FileError(name, f"{key} has shape {list(given_shape)} (expected {list(expected)})")
    if unexpected:
        raise FileError(name, f"has {_listed(unexpected)} in excess (of a {type(model).__name__})")


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer.

    Raises:
        OSError: there is no such model.
        FileError: it has no tokenizer, or a damaged one.
    """
    from transformers import AutoTokenizer

    _check_there(name)
    with _clear_errors(name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=os.path.isdir(name))
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        known = set(tokenizer.get_vocab()) - special
    if len(known) < PIECES:
        raise FileError(
            name,
            f"has no tokenizer: that which transformers makes of it knows {len(known)} pieces "
            "(expected the tokenizer of the encoder, such as a tokenizer.json)",
        )
    return tokenizer


def model_type_of(name: str) -> str:
    """What transformers calls the kind of a model: "bert", "gpt2"; raises what `load_model` does of its config."""
    return str(_config_of(name).model_type)


def labels_in(name: str) -> list[str]:
    """The labels that a model's config has, in order; raises what `model_type_of` does."""
    return [str(label) for _, label in sorted((_config_of(name).id2label or {}).items())]


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    _check_there(name)
    with _clear_errors(name, "a model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=os.path.isdir(name))


def _check_there(name: str) -> None:
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"no folder of a model at {name}")


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


def check_known(unknown: Mapping[str, float], what: str) -> None:
    """See that a tokenizer knows the text: one of another model, or of other scripts, knows next to nothing.

    Args:
        unknown: which share of each language's training data it does not know.
        what: of what, with the verb.

    Raises:
        ValueError: most of all languages; of some it is a warning.
    """
    for name, share in unknown.items():
        if share > UNKNOWN:
            said = f"{name}: {share:.0%} of the training {what} unknown to the model's tokenizer"
            if min(unknown.values()) > UNKNOWN:
                raise ValueError(f"{said} (expected a model and a tokenizer for {', '.join(unknown)})")
            warnings.warn(f"{said}: it reads nothing of that", stacklevel=4)


def positions_of(encoder: nn.Module, tokenizer: Any) -> int:
    """Return how many positions a model can take; a table of them with a padding index starts after that (RoBERTa)."""
    parts = [part.config for part in encoder.modules() if hasattr(part, "config")]
    named = [getattr(config, "max_position_embeddings", None) for config in parts]
    room = rows = min((int(n) for n in named if n and n > 0), default=1 << 20)  # none: as many as the tokenizer says
    for name, table in encoder.named_modules():  # by its name and not its class: I-BERT has one of its own
        padding: Any = getattr(table, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and len(table.weight) == rows:
            room = rows - padding - 1
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


def input_embeddings(encoder: nn.Module) -> list[nn.Embedding]:
    """The tables that the input of a model of transformers is made of: of pieces, and of positions and token types.

    Those beside a table of pieces count as well: ``embeddings`` of BERT and its like, a decoder itself (``wpe``). A
    table that other modules share (a tied output layer) is one of them all the same.

    Raises:
        ValueError: the model names no input embeddings.
    """
    try:
        pieces: nn.Module | None = encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        pieces = None
    if not isinstance(pieces, nn.Embedding):
        raise ValueError(f"{type(encoder).__name__} has no input embeddings that are known (expected an nn.Embedding)")
    found: dict[nn.Embedding, None] = {}
    for module in encoder.modules():
        tables = [child for child in module.children() if isinstance(child, nn.Embedding)]
        if any(table.weight is pieces.weight for table in tables):
            found.update(dict.fromkeys(tables))
    return list(found) or [pieces]


# ---- words as pieces, for tasks that say something of each word


def around(whole: Sequence[int], alone: Sequence[int], what: str) -> tuple[list[int], list[int]]:
    """The special pieces before and after a text or word: what `whole` has beside the pieces of it `alone`.

    Raises:
        ValueError: `whole` does not hold them; names `what` they are of.
    """
    for first in range(len(whole) - len(alone) + 1):
        if len(alone) and list(whole[first : first + len(alone)]) == list(alone):
            return list(whole[:first]), list(whole[first + len(alone) :])
    raise ValueError(f"the tokenizer makes {list(whole)} of a {what} that alone is {list(alone)}")


def _before_words(tokenizer: Any) -> str:
    """What a word needs in front to get the pieces that it has inside a text: nothing, or a space."""
    inside, first = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a a", "a"))
    for before in ("", " "):
        alone = tokenizer([f"{before}a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        if inside == [*first, *alone]:  # and not its end alone: the space may be a piece by itself
            return before
    return ""


class WordPieces:
    """The pieces of words.

    Words are tokenised one by one (`is_split_into_words`), each distinct form once, and as after another word: byte
    pairs and the like tell the beginning of a word from its middle by the space before it. A word that tokenises to
    nothing (control characters, for one) becomes the unknown piece; of one that alone is longer than the encoder, the
    beginning is read.

    Attributes:
        tokenizer: of Hugging Face.
        max_positions: that its model has.
        prefix: the special pieces before a sentence, int64.
        suffix: those after it.
        special_positions: how many of both.
        pad: the piece that fills up a batch.
        blank: the piece of a word that tokenises to nothing.
    """

    def __init__(self, tokenizer: Any, max_positions: int = 512) -> None:
        """Take a Hugging Face tokenizer and the number of positions its model has.

        Raises:
            ValueError: the tokenizer does not put special pieces around a word, or there is no position for a word.
        """
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.before = _before_words(tokenizer)
        whole = tokenizer([f"{self.before}a"], is_split_into_words=True)["input_ids"]
        alone = tokenizer([f"{self.before}a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        self.prefix, self.suffix = (np.asarray(ids, dtype=np.int64) for ids in around(whole, alone, "word"))
        self.special_positions = len(self.prefix) + len(self.suffix)
        if max_positions <= self.special_positions:
            raise ValueError(f"{max_positions} positions (expected more than {self.special_positions})")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.blank = next(
            (i for i in (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) if i is not None),
            self.pad,
        )

    def units_of(self, words: list[str]) -> list[np.ndarray]:
        """Return the pieces of every word, int32."""
        if not words:
            return []
        found = self.tokenizer(
            [[self.before + word] for word in words],
            is_split_into_words=True,
            add_special_tokens=False,
            verbose=False,
        )
        room = self.max_positions - self.special_positions
        return [np.asarray(ids[:room] or [self.blank], dtype=np.int32) for ids in found["input_ids"]]
