"""One reader for text and JSON (YAML and safetensors are beside it): what is wrong with a file is said with its name.

Nothing that is read can run code, and nothing can make a reader hang: no pickle, no devices or FIFOs, and bounds on
size and depth.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fastmask.literal import one_line

__all__ = [
    "FileError",
    "Record",
    "check",
    "check_regular",
    "compressed",
    "descriptor_of",
    "parse_json",
    "read_json",
    "read_json_lines",
    "read_text",
    "sha256_of",
]

T = TypeVar("T")

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_NUMBERED = re.compile(r"/(?:dev|proc/self)/fd/([0-9]+)")
_LINKS = 40  # as many as Linux follows

JSON_BYTES = 1 << 28  # records of a run of a million steps have some 20 MB


class FileError(ValueError):
    """A file that is damaged or not what was asked for; the message reads ``FILE: what is wrong (expected)``."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        """Build the message: one line of bounded length, with nothing in it that a terminal would obey."""
        if len(problem) > 500:
            problem = f"{problem[:400]} ... {problem[-90:]}"
        super().__init__(one_line(f"{os.fspath(path)}: {problem}"))


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file, and nothing that has no end or waits for somebody to write."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise FileError(path, f"is not the name of a file ({error})") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise FileError(path, f"is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'} (expected a file)")
    with open(handle, "rb") as file:
        yield file


def descriptor_of(path: str | os.PathLike[str]) -> int | None:
    """The number of the open file that a path stands for, perhaps through links; None for any other path.

    That is standard output, or what a shell hands over as ``/dev/fd/63``. Such a file must not be opened again, nor
    replaced: a shell's ``>>`` would lose what is in it, and a socket cannot be opened at all.
    """
    name = os.path.abspath(path)
    for _ in range(_LINKS):
        if name in _STANDARD:
            return _STANDARD[name]
        if number := _NUMBERED.fullmatch(name):
            return int(number[1])
        if not os.path.islink(name):
            break
        name = os.path.abspath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def check_regular(path: str | os.PathLike[str]) -> None:
    """See that a path leads to a regular file that can be opened.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: a folder, a device, a FIFO, or not readable.
    """
    with _opened(path):
        pass


def read_text(path: str | os.PathLike[str], limit: int | None = None) -> str:
    """Read a UTF-8 file.

    Args:
        path: a regular file; links are followed.
        limit: at most so many bytes.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a regular file, not UTF-8, longer than `limit`, or not readable.
    """
    with _opened(path) as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise FileError(path, f"has more than {limit} bytes (expected a smaller file)")
        try:
            content = file.read()
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            packed = compressed(content)
            raise FileError(path, packed or f"byte {error.start + 1} is not UTF-8 (expected a UTF-8 file)") from None
        except OSError as error:
            raise FileError(path, f"cannot be read: {error.strerror or error}") from None


def compressed(content: bytes) -> str | None:
    """What is wrong with a file that begins so and should be text, if it is compressed."""
    kinds = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
    found = next((name for begins, name in kinds.items() if content.startswith(begins)), None)
    return found and f"is compressed by {found} (expected text: unpack it first)"


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


def parse_json(path: str | os.PathLike[str], text: str, kind: type[T] | Any = dict) -> T:
    """Return what a JSON text holds, which is of the type `kind`; see `check`. No name stands twice in an object.

    Args:
        path: where it was read, for the message.
        text: JSON.
        kind: see `check`; a list passes for a tuple, which JSON does not have.

    Raises:
        FileError: not JSON, or of another type.
    """
    found: T = _checked(path, lambda: TypeAdapter(kind).validate_json(text, strict=True))
    try:
        json.loads(text, object_pairs_hook=_once)  # of two values of one name the first would be lost without a word
    except ValueError as error:
        raise FileError(path, f"is not JSON: {error}") from None
    return found


def _once(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"{name!r} stands twice in one object")
        names.add(name)


def read_json(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> T:
    """Read a JSON file whose content is of the type `kind`; see `parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not UTF-8, not JSON, too long, or of another type.
    """
    return parse_json(path, read_text(path, JSON_BYTES), kind)


def read_json_lines(path: str | os.PathLike[str], kind: type[T] | Any = dict) -> Iterator[T]:
    """Read a file that holds one JSON value on each line; see `read_json`."""
    for number, line in enumerate(read_text(path, JSON_BYTES).split("\n"), start=1):
        if line.strip():
            yield parse_json(f"{os.fspath(path)}:{number}", line, kind)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a regular file's bytes, as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a regular file, or not readable.
    """
    digest = hashlib.sha256()
    with _opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
