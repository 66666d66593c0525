"""Words as the pieces of a tokenizer, for tasks that say something of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmask.tasks.pretrained import load_tokenizer

__all__ = ["WordPieces", "around", "load_word_tokenizer"]

BYTE_PAIRS = ("roberta", "gpt2", "longformer", "bart")


def load_word_tokenizer(name: str, model_type: str) -> Any:
    """The tokenizer of a model for single words; see `load_tokenizer`.

    RoBERTa's byte pairs differ at the start of a text unless told that every word follows a space.
    """
    return load_tokenizer(name, **({"add_prefix_space": True} if model_type in BYTE_PAIRS else {}))


def around(whole: Sequence[int], alone: Sequence[int], what: str) -> tuple[list[int], list[int]]:
    """The special pieces before and after a text or word: what `whole` has beside the pieces of it `alone`.

    Raises:
        ValueError: `whole` does not hold them; names `what` they are of.
    """
    for first in range(len(whole) - len(alone) + 1):
        if len(alone) and list(whole[first : first + len(alone)]) == list(alone):
            return list(whole[:first]), list(whole[first + len(alone) :])
    raise ValueError(f"the tokenizer makes {list(whole)} of a {what} that alone is {list(alone)}")


class WordPieces:
    """The pieces of words.

    Words are tokenised one by one (`is_split_into_words`), each distinct form once. A word that tokenises to nothing
    (control characters, for one) becomes the unknown piece; of one that alone is longer than the encoder, the
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
        whole = tokenizer(["a"], is_split_into_words=True)["input_ids"]
        alone = tokenizer(["a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
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
            [[word] for word in words], is_split_into_words=True, add_special_tokens=False, verbose=False
        )
        room = self.max_positions - self.special_positions
        return [np.asarray(ids[:room] or [self.blank], dtype=np.int32) for ids in found["input_ids"]]
