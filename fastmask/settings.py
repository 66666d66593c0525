"""Settings as dataclasses: every field has a help text and limits, is checked, and can come from a YAML file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from typing_extensions import Self

from fastmask.errors import FastmaskKeyError, unknown
from fastmask.files import read_yaml, write_yaml

__all__ = ["ConfigError", "Settings", "flat", "items_of", "named_errors", "setting"]

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


class ConfigError(ValueError):
    """A setting out of its range or of the wrong type; the message names it, what was given and what is allowed."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field: `choices`, or `low`/`high` (inclusive unless `above`/`below`), its help text and its `group`.

    A default that is a mapping stands for a new one each time.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """The base of all settings; every field is made by `setting`."""

    def __post_init__(self) -> None:
        """Validate."""
        self.validate()

    def validate(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: the first setting that is wrong.
        """
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from names and values.

        Raises:
            FastmaskKeyError: a name that is no setting; the nearest names are given.
            ConfigError: a value that is wrong.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("setting", name, names)
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a YAML file of settings; what it does not name keeps its default. Every error names the file.

        Raises:
            FileNotFoundError: there is no such file.
            FileError: not a file of settings (`fastmask.files.read_yaml`).
            ConfigError: a value that is wrong.
            FastmaskKeyError: a name that is no setting.
        """
        values: dict[str, Any] = read_yaml(path)
        with named_errors(path):
            return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as YAML; see `fastmask.files.replace_file`."""
        write_yaml(path, dataclasses.asdict(self))


@contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
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
    if get_origin(hint) is None:
        kind, optional = hint, False
    else:
        kind, optional = next(a for a in get_args(hint) if a is not type(None)), True
    if value is None and optional:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is str and limits.get("list") and isinstance(value, (list, tuple)):
        items = ["no" if item is False else item for item in value]
        if all(isinstance(item, str) for item in items):
            value = ",".join(items)  # a YAML list is as good
    if kind is str and value is False:
        value = "no"  # YAML 1.1 reads Norwegian, and "no" mixed precision, as false
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 3e-4 as text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{name} is {value!r:.200} (expected {words[kind]})")
    choices = limits.get("choices")
    if choices:
        for item in items_of(value) if limits.get("list") else [value]:
            if item not in choices:
                raise ConfigError(f"{name} is {value!r:.200} (expected {_one_of(limits)} {', '.join(choices)})")
    checks = [
        ("low", lambda v, b: v >= b, ">="),
        ("above", lambda v, b: v > b, ">"),
        ("high", lambda v, b: v <= b, "<="),
        ("below", lambda v, b: v < b, "<"),
    ]
    bounds = [(limits[key], holds, sign) for key, holds, sign in checks if key in limits]
    if bounds and not (math.isfinite(value) and all(holds(value, bound) for bound, holds, _ in bounds)):
        raise ConfigError(
            f"{name} is {value!r} (expected {' and '.join(f'{sign} {bound}' for bound, _, sign in bounds)})"
        )
    return value


def _one_of(limits: Mapping[str, Any]) -> str:
    return "a comma-separated list out of" if limits.get("list") else "one of"


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
