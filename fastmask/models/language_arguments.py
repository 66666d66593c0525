"""The arguments of a call that say its languages: `language`, `languages` or `language_ids`, by name or by number."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.errors import unknown

__all__ = ["LanguageArguments", "LanguageCounts", "id_of", "ids_of", "leading_sizes"]

_NAMES = ("language", "languages", "language_ids", "language_counts")
_TYPES: dict[str, Any] = {"language": str | None, "languages": Sequence[str | None] | None}
_TYPES |= {"language_ids": Tensor | Sequence[int] | None, "language_counts": Tensor | None}


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


class LanguageArguments:
    """Which of these arguments the forward of an attached model takes, beside those of the plain one.

    `language_counts` says nothing by itself; it tells which languages there are in `language_ids` that lie on a GPU.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self._own = tuple(name for name in _NAMES if name not in signature.parameters)
        self._plain = signature

    def signature(self) -> inspect.Signature:
        """That of the attached forward. `language=None` says something (the full network), so its default is `...`."""
        parameters = list(self._plain.parameters.values())
        extra = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=... if name == "language" else None,
                annotation=_TYPES[name],
            )
            for name in self._own
        ]
        position = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return self._plain.replace(parameters=[*parameters[:position], *extra, *parameters[position:]])

    def taken(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those that a call gives, taken out of its keyword arguments.

        Raises:
            ValueError: more than one of them.
        """
        given = {name: kwargs.pop(name) for name in self._own if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None or name == "language"}
        if len(given.keys() - {"language_counts"}) > 1:
            raise ValueError(f"{' and '.join(given)} were given: use one of them, they say the same")
        return given


def ids_of(given: dict[str, Any], languages: tuple[str, ...]) -> Tensor | int | None:
    """What the one argument that was given says: ids, one id for the whole batch, or None if there is none.

    Raises:
        KeyError: an unknown language; the message names the nearest ones.
        ValueError: something else than names or ids.
    """
    for name, value in given.items():
        if name == "language":
            return id_of(value, languages)
        if name == "languages":
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                what = repr(value) if isinstance(value, str) else type(value).__name__
                raise ValueError(
                    f"expected languages as a list of names (None: full network), one for each example, given {what}"
                )
            return torch.tensor([id_of(each, languages) for each in value], dtype=torch.int64, device="cpu")
        if name == "language_ids":
            return _as_int64(value)
    return None


def id_of(name: str | None, languages: tuple[str, ...]) -> int:
    """The id of a language: its position; -1, the full network, for None.

    Raises:
        KeyError: an unknown language; the message names the nearest ones.
        ValueError: no name.
    """
    if name is None:
        return -1
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a language (None: the full network), given {type(name).__name__}")
    if name not in languages:
        raise unknown("language", name, languages)
    return languages.index(name)


def _as_int64(ids: Any) -> Tensor:
    given, tensor = type(ids).__name__, ids
    if isinstance(ids, list | tuple):
        try:
            tensor = torch.tensor(ids, device="cpu") if ids else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError):
            tensor = None
        given = f"{given} of {', '.join(sorted({type(each).__name__ for each in ids}))}"
    if not isinstance(tensor, Tensor):
        raise ValueError(_expected(given))
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.ndim == 0:
        raise ValueError(_expected(f"{tensor.dtype} of shape {tuple(tensor.shape)}"))
    return tensor if tensor.dtype == torch.int64 else tensor.long()


def _expected(given: str) -> str:
    return (
        "expected language_ids as an int64 tensor [batch] (or int32, or a list of ints; names go in languages=[...], "
        f"one name for the whole batch in language=...), given {given}"
    )


def leading_sizes(signature: inspect.Signature) -> Any:
    """A function of (args, kwargs) of a forward: the sizes of its tokens, [B, T] or [B, choices, T], if it has any."""
    names = list(signature.parameters)[1:]  # without self
    wanted = [(name, names.index(name)) for name in ("input_ids", "inputs_embeds") if name in names]

    def sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        for name, position in wanted:
            value = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(value, Tensor):
                return tuple(value.shape if name == "input_ids" else value.shape[:-1])
        return None

    return sizes
