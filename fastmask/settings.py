"""Settings as dataclasses: every field has a help text and limits, is checked, and can come from a YAML file."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from typing_extensions import Self

from fastmask.errors import FastmaskKeyError, unknown
from fastmask.files import StrPath, read_yaml, write_yaml

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_BOUNDS = {
    "low": (operator.ge, ">="), "above": (operator.gt, ">"), "high": (operator.le, "<="), "below": (operator.lt, "<"),
}  # fmt: skip


class ConfigError(ValueError):
    """A setting out of its range or of the wrong type; the message names it, what was given and what is allowed."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field: `choices`, or `low`/`high` (inclusive unless `above`/`below`), its help text and its `group`.

    With `list`, a text is several items, separated by commas.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Settings:
    """The base of all settings; every field is made by `setting`."""

    def __post_init__(self) -> None:
        """Check types and ranges; raises ConfigError, which names the first setting that is wrong."""
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from names and values; FastmaskKeyError for a name that is no setting, ConfigError for a value."""
        names = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("setting", name, names)
        return cls(**values)

    @classmethod
    def load(cls, path: StrPath) -> Self:
        """Read a YAML file of settings; what it does not name keeps its default.

        Raises what `fastmask.files.read_yaml` and `from_dict` do; every error names the file.
        """
        values: dict[str, Any] = read_yaml(path)
        with named_errors(path):
            return cls.from_dict(values)

    def save(self, path: StrPath) -> None:
        """Write all settings as YAML; see `fastmask.files.replace_file`."""
        write_yaml(path, dataclasses.asdict(self))


@contextmanager
def named_errors(path: StrPath) -> Iterator[None]:
    """Say in which file a setting is wrong."""
    try:
        yield
    except (ConfigError, FastmaskKeyError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from None


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """Return `value` in the type of its field, or raise `ConfigError`."""
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{name} is {value!r:.200} (expected names and values)")
        return dict(value)
    if value is None and type(None) in get_args(hint):
        return None
    kind = next((of for of in get_args(hint) if of is not type(None)), hint)
    value = _as(kind, value, limits)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r:.200} (expected {_WORDS[kind]})")
    choices = limits.get("choices", ())
    if choices and any(item not in choices for item in (items_of(value) if limits.get("list") else [value])):
        one_of = "a comma-separated list out of" if limits.get("list") else "one of"
        raise ConfigError(f"{name} is {value!r:.200} (expected {one_of} {', '.join(choices)})")
    bounds = [(holds, sign, limits[key]) for key, (holds, sign) in _BOUNDS.items() if key in limits]
    if bounds and not (math.isfinite(value) and all(holds(value, bound) for holds, _, bound in bounds)):
        expected = " and ".join(f"{sign} {bound}" for _, sign, bound in bounds)
        raise ConfigError(f"{name} is {value!r} (expected {expected})")
    return value


def _as(kind: type, value: Any, limits: Mapping[str, Any]) -> Any:
    """What is meant by a value where one of `kind` is expected; YAML 1.1 has ideas of its own."""
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and limits.get("list") and isinstance(value, (list, tuple)):
        items = ["no" if item is False else item for item in value]
        return ",".join(items) if all(isinstance(item, str) for item in items) else value
    if kind is str and value is False:
        return "no"  # it reads Norwegian, and "no" mixed precision, as false
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)  # it reads 3e-4 as text
    if kind is float and type(value) is int:
        return float(value)
    return value


def items_of(value: str) -> list[str]:
    """The entries of a comma-separated list, in order."""
    return [item.strip() for item in value.split(",") if item.strip()]


def flat(nested: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their names joined."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, separator, f"{prefix}{name}{separator}") if inner else {f"{prefix}{name}": value}
    return found
