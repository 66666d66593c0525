"""Text, JSON and YAML, read so that an error names the file and what is wrong in it; nothing that is read runs code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

__all__ = ["FileError", "Record", "check", "parse_json", "read_json", "read_text", "read_yaml", "sha256_of"]

T = TypeVar("T")


class FileError(ValueError):
    """A file that is damaged or not what was asked for; the message reads ``FILE: what is wrong (expected)``."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        """Build the message, one line."""
        super().__init__(f"{os.fspath(path)}: {' '.join(problem.split())}")


class Record(BaseModel):
    """The base of what a JSON file of ours holds: every field of exactly its type, none missing, none unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        FileError: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, f"byte {error.start + 1} is not UTF-8 (expected a UTF-8 file)") from None


def check(path: str | os.PathLike[str], content: Any, kind: type[T] | Any) -> T:
    """Return `content` if it is of the type `kind`, down to the last item.

    Args:
        path: where it was read, for the message.
        content: what YAML made of the file, or another reader.
        kind: a `Record`, or a type such as ``dict[str, list[int]]``. Nothing is converted.

    Raises:
        FileError: something is of another type, missing or unknown; the message says where.
    """
    return _checked(path, lambda: TypeAdapter(kind).validate_python(content, strict=True))


def parse_json(path: str | os.PathLike[str], text: str, kind: type[T] | Any = dict) -> T:
    """Return what a JSON text, read at `path`, holds; see `check`. A list passes for a tuple, which JSON lacks.

    Raises:
        FileError: not JSON, or of another type.
    """
    return _checked(path, lambda: TypeAdapter(kind).validate_json(text, strict=True))


def _checked(path: str | os.PathLike[str], validate: Callable[[], T]) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise FileError(path, f"is not JSON: {first['ctx']['error']}") from None
        where = ".".join(str(step) for step in first["loc"])
        given = "" if first["type"] == "missing" else f", given {first['input']!r:.60}"
        raise FileError(path, f"{where + ': ' if where else ''}{first['msg']}{given}") from None


def read_json(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a JSON file whose content is of the type `kind`; raises what `read_text` and `parse_json` do."""
    return parse_json(path, read_text(path), kind)


class _Loader(yaml.SafeLoader):
    """A safe loader to which a date is text: folders, and plans, are called so."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a YAML file whose content is of the type `kind`; an empty file is an empty mapping.

    Raises:
        OSError: there is no such file, or it cannot be read.
        FileError: not UTF-8, not YAML, or of another type.
    """
    text = read_text(path)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileError(path, f"is not YAML: {error}") from None
    return check(path, {} if content is None else content, kind)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
