"""One reader for JSON, YAML and safetensors: what is wrong with a file is said with its name, whatever it holds.

Nothing that is read here can run code, and nothing can make the reader hang: no pickle, no YAML tags or aliases, and
bounds on the size and depth of what people write by hand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "FileError",
    "Record",
    "check",
    "read_json",
    "read_json_lines",
    "read_metadata",
    "read_tensors",
    "read_text",
    "read_yaml",
    "sha256_of",
]

T = TypeVar("T")

YAML_BYTES = 1 << 16  # the longest file of settings that this package writes has 4 KB
YAML_DEPTH = 20


class FileError(ValueError):
    """A file that is damaged or not what was asked for; the message reads ``FILE: what is wrong (expected)``."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        """Build the message."""
        super().__init__(f"{os.fspath(path)}: {problem}")


def read_text(path: str | os.PathLike[str], limit: int | None = None) -> str:
    """Read a UTF-8 file.

    Args:
        path: a file; links are followed.
        limit: at most so many bytes.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: a folder, not UTF-8, longer than `limit`, or not readable.
    """
    try:
        with open(path, "rb") as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from error
    if limit is not None and len(content) > limit:
        raise FileError(path, f"has more than {limit} bytes (expected a small file)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, f"byte {error.start + 1} is not UTF-8 (expected a UTF-8 file)") from None


class Record(BaseModel):
    """The base of what a JSON file of ours holds: every field of exactly its type, none missing, none unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


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


def _checked(path: str | os.PathLike[str], validate: Callable[[], T]) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise FileError(path, f"is not JSON: {first['ctx']['error']}") from None
        where = ".".join(str(step) for step in first["loc"])
        given = "" if first["type"] == "missing" else f", given {_short(first['input'])}"
        raise FileError(path, f"{where + ': ' if where else ''}{first['msg']}{given}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a JSON file whose content is of the type `kind`; see `check`.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not UTF-8, not JSON, or of another type.
    """
    # Lists pass for tuples here, which JSON does not have.
    return _checked(path, lambda: TypeAdapter(kind).validate_json(read_text(path), strict=True))


def read_json_lines(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> Iterator[T]:
    """Read a file that holds one JSON value on each line; see `read_json`."""
    adapter = TypeAdapter(kind)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield _checked(f"{os.fspath(path)}:{number}", partial(adapter.validate_json, line, strict=True))


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases, of which a few lines can stand for billions of items, and of bounded depth."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", event.start_mark)
        self._depth += 1
        if self._depth > YAML_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {YAML_DEPTH} deep", self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_yaml_int(self, node: Any) -> int:
        """A number of ordinary length: 1:1:1:... is a number to the base of 60, however long."""
        if len(node.value) > 40:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 40 characters", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose names are text, each given once."""
        names: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name that is not text", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a YAML file of settings whose content is of the type `kind` (an empty file is an empty mapping).

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not UTF-8, not YAML, an alias, a name twice, nested too deeply, too long, or of another type.
    """
    text = read_text(path, YAML_BYTES)
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{os.fspath(path)}:{mark.line + 1}"
        raise FileError(where, f"is not YAML that fastmask reads: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45
        raise FileError(path, f"is not YAML that fastmask reads: {error}".replace("\n", " ")) from None
    return check(path, {} if content is None else content, kind)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a safetensors file, or a truncated one.
    """
    return _opened(path)[1]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file: its tensors by name, on the CPU, and its header.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a safetensors file, or a truncated one.
    """
    file, header = _opened(path)
    try:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise FileError(path, f"is damaged ({error})") from None


def _opened(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    if not os.path.isfile(path):
        raise FileError(path, "is not a regular file (expected a safetensors file)")
    try:
        file = safe_open(os.fspath(path), framework="pt").__enter__()
        return file, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FileError(path, f"is not a safetensors file, or is truncated ({error})") from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
