"""Settings as dataclasses: every field has a help text and limits, is checked, and can come from a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from typing_extensions import Self

from fastmask.errors import unknown

__all__ = ["ConfigError", "Settings", "items_of", "setting"]


class ConfigError(ValueError):
    """A setting out of its range or of the wrong type; the message names it, what was given and what is allowed."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field: `choices`, or `low`/`high` (inclusive unless `above`/`below`), and its help text."""
    return field(default=default, metadata={"help": help, **limits})


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
        """Read a YAML file of settings; what it does not name keeps its default.

        Raises:
            ConfigError: not YAML, or not a mapping, or a value that is wrong.
            FastmaskKeyError: a name that is no setting.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__} (expected settings, one 'name: value' per line)")
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as YAML."""
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """Return `value` in the type of its field, or raise `ConfigError`."""
    if get_origin(hint) is None:
        kind, optional = hint, False
    else:
        kind, optional = next(a for a in get_args(hint) if a is not type(None)), True
    if value is None and optional:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is str and limits.get("list") and isinstance(value, (list, tuple)):
        value = ",".join("no" if item is False else str(item) for item in value)  # a YAML list is as good
    if kind is str and value is False:
        value = "no"  # YAML 1.1 reads Norwegian, and "no" mixed precision, as false
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 3e-4 as text
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{name} is {value!r} (expected {words[kind]})")
    choices = limits.get("choices")
    if choices:
        for item in items_of(value) if limits.get("list") else [value]:
            if item not in choices:
                raise ConfigError(f"{name} is {value!r} (expected {_one_of(limits)} {', '.join(choices)})")
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
