"""A column of languages in a dataset becomes the language ids of each batch, around any collator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.models.attach import attached
from fastmask.models.language_arguments import LanguageCounts, id_of
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["LanguageCollator"]


class LanguageCollator:
    """Takes the column of languages off the examples, lets another collator make the batch, and adds `language_ids`.

    Besides `language_ids` int64 [B] there are `language_counts`, which stay on the host when a batch moves (`Trainer`,
    accelerate, DistributedDataParallel, `BatchEncoding.to`): on a GPU it is then packed to its own widest language, and
    may hold the full network. `transformers.Trainer` keeps the columns `language` and `language_ids` of a dataset; for
    one of another name, give it `remove_unused_columns=False`.

    Args:
        collator: makes a batch (a mapping) of a list of examples (mappings) without the column.
        languages: the subnetworks, or a model that has some attached.
        column: of names, ids or None (the full network, as is -1).
        times: how often the batch has all examples, one time after the other: 2 for pairs of TRL's preferences.

    Raises:
        ValueError: no model with subnetworks; examples or batches that are no mappings, or another id.
        KeyError: no such column, or an unknown language; the message names the nearest ones.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        languages: Subnetworks | torch.nn.Module,
        column: str = "language",
        times: int = 1,
    ) -> None:
        subnets = languages if isinstance(languages, Subnetworks) else attached(languages).subnets
        self.collator, self.languages, self.column, self.times = collator, subnets.languages, column, times

    def __call__(self, examples: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """The batch of the other collator, its `language_ids` and its `language_counts`.

        A batch of several texts each, as sentence-transformers makes them, has `<text>_language_ids` for each. Where
        all examples stand in one row (`DataCollatorWithFlattening`), there is an id for each token, [1, T].
        """
        ids = [self._id(example) for example in examples]
        rest = [{name: value for name, value in example.items() if name != self.column} for example in examples]
        batch = self.collator(rest, *args, **kwargs)
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"expected a collator that makes a mapping, {self.collator!r} made a {type(batch).__name__}"
            )
        language_ids = torch.tensor(ids * self.times, dtype=torch.int64, device="cpu")
        tokens, lengths = batch.get("input_ids"), [len(example.get("input_ids", ())) for example in rest]
        if isinstance(tokens, Tensor) and len(ids) > 1 and tokens.shape == (1, sum(lengths)):
            language_ids = language_ids.repeat_interleave(torch.tensor(lengths, device="cpu"))[None]
        added = {"language_ids": language_ids, "language_counts": LanguageCounts.of(language_ids, len(self.languages))}
        texts = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
        batch.update({text + name: value for text in texts or [""] for name, value in added.items()})
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)  # trainers ask collators for settings

    def _id(self, example: Any) -> int:
        if not isinstance(example, Mapping):
            raise ValueError(
                f"expected examples as mappings with a column {self.column!r}, given {type(example).__name__}"
            )
        if self.column not in example:
            raise unknown("column", self.column, example)
        value = example[self.column]
        if value is None or isinstance(value, str):
            return id_of(value, self.languages)
        try:
            number = operator.index(value)
        except TypeError:
            raise ValueError(f"expected a language's name or id in {self.column!r}, given {value!r}") from None
        if not -1 <= number < len(self.languages):
            raise ValueError(
                f"language id {number} is out of range: expected 0 to {len(self.languages) - 1}, or -1 for the full "
                "network"
            )
        return number
