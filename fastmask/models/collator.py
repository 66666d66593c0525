"""A column of languages in a dataset becomes the language ids of each batch, around any collator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

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

    Raises:
        ValueError: no model with subnetworks; examples or batches that are no mappings, or another id.
        KeyError: no such column, or an unknown language; the message names the nearest ones.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        languages: Subnetworks | torch.nn.Module,
        column: str = "language",
    ) -> None:
        subnets = languages if isinstance(languages, Subnetworks) else attached(languages).subnets
        self.collator, self.languages, self.column = collator, subnets.languages, column

    def __call__(self, examples: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """The batch of the other collator, its `language_ids` and its `language_counts`.

        A batch of several texts each, as sentence-transformers makes them, has `<text>_language_ids` for each, too.
        """
        ids = [self._id(example) for example in examples]
        rest = [{name: value for name, value in example.items() if name != self.column} for example in examples]
        batch = self.collator(rest, *args, **kwargs)
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"expected a collator that makes a mapping, {self.collator!r} made a {type(batch).__name__}"
            )
        language_ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
        added = {"language_ids": language_ids, "language_counts": LanguageCounts.of(language_ids, len(self.languages))}
        texts = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
        batch.update({text + name: value for text in texts or [""] for name, value in added.items()})
        return batch

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
