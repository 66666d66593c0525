"""Languages by name or by number: what a call says of them, and a batch of a dataset with a column of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.errors import unknown
from fastmask.masks import checked_id
from fastmask.subnetworks.subnetworks import Subnetworks


def id_of(name: str | None, languages: tuple[str, ...]) -> int:
    """The id of a language: its position; -1, the full network, for None."""
    if name is None:
        return -1
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a language (None: the full network), given {type(name).__name__}")
    if name not in languages:
        raise unknown("language", name, languages)
    return languages.index(name)


def ids_of(given: dict[str, Any], languages: tuple[str, ...]) -> Tensor | int | None:
    """What the one argument that was given says: ids, one id for the whole batch, or None if there is none."""
    if "language" in given:
        return id_of(given["language"], languages)
    if (names := given.get("languages")) is not None:
        names = names.tolist() if isinstance(names, np.ndarray) else names
        if isinstance(names, str | bytes) or not isinstance(names, Sequence):
            what = repr(names) if isinstance(names, str) else type(names).__name__
            raise ValueError(
                f"expected languages as a list of names (None: full network), one for each example, given {what}"
            )
        return torch.tensor([id_of(each, languages) for each in names], dtype=torch.int64, device="cpu")
    if (ids := given.get("language_ids")) is None:
        return None
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    what, tensor = type(ids).__name__, ids
    if isinstance(ids, list | tuple):
        try:
            tensor = torch.tensor(ids, device="cpu") if ids else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError):
            tensor = None
        what = f"{what} of {', '.join(sorted({type(each).__name__ for each in ids}))}"
    if isinstance(tensor, Tensor):
        if tensor.dtype in (torch.int64, torch.int32) and tensor.ndim > 0:
            return tensor.long()
        what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    raise ValueError(
        "expected language_ids as an int64 tensor [batch] (or int32, or a list of ints; names go in languages=[...], "
        f"one name for the whole batch in language=...), given {what}"
    )


class LanguageCounts(Tensor):
    """How many examples of a batch each language has, int64 [L + 1], the full network last: it stays on the host.

    The ids of a batch move to a GPU, and then nobody knows which languages they are without waiting for it. This tensor
    does not follow: not when accelerate, `Trainer`, DistributedDataParallel or a `BatchEncoding` move the whole batch,
    and workers of a DataLoader pass it on as it is. Whatever else is made of it is a plain tensor, which is ignored.
    """

    # As in nn.Parameter: what operations make of it is plain, so that nothing can be taken for counts that are not.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, ids: Tensor, n_languages: int) -> LanguageCounts:
        """The counts of ids on the CPU, all in range."""
        return torch.bincount(ids.flatten() % (n_languages + 1), minlength=n_languages + 1).as_subclass(cls)

    def present(self) -> tuple[int, ...]:
        """The languages that occur, in order; -1 is the full network."""
        counts = self.tolist()
        return (*([-1] if counts[-1] else []), *(number for number, count in enumerate(counts[:-1]) if count))

    def to(self, *_: Any, **__: Any) -> LanguageCounts:
        """Stay."""
        return self

    cuda = to
    pin_memory = to

    def __deepcopy__(self, memo: Any) -> LanguageCounts:
        return self.clone().as_subclass(LanguageCounts)


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
        from fastmask.models.attach import attached  # which imports this module

        # The router of a model knows of languages that are added or removed later.
        self._known = languages if isinstance(languages, Subnetworks) else attached(languages).router
        self.collator, self.column, self.times = collator, column, times

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, by id."""
        return self._known.languages

    def __call__(self, examples: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """The batch of the other collator, its `language_ids` and its `language_counts`.

        A batch of several texts, as sentence-transformers makes them without `input_ids`, has `<text>_language_ids`
        for each. Where all examples stand in one row (`DataCollatorWithFlattening`), there is an id for each token,
        [1, T].
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
        if "input_ids" in batch or texts in ([], ["decoder_"]):  # others are of the same call, as `decoder_input_ids`
            texts = [""]
        batch.update({text + name: value for text in texts for name, value in added.items()})
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("collator", "_known"):  # while it is being copied or unpickled
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
            return checked_id(operator.index(value), len(self.languages))
        except TypeError:
            raise ValueError(f"expected a language's name or id in {self.column!r}, given {value!r}") from None
