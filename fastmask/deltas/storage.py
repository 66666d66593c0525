"""Deltas on disk: one safetensors file with a checksum and a versioned header; never pickle."""

from __future__ import annotations

from os import PathLike
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fastmask.deltas.delta import Change, Delta
from fastmask.deltas.part import Part
from fastmask.files import FileError, Record, parse_json, read_metadata, read_sealed, write_sealed

__all__ = ["load", "save"]

FORMAT, VERSION = "fastmask.delta", "1"
CONTENT = "content"

Size = Annotated[int, Field(ge=1)]


class StoredPart(Record):
    """What a file says of one parameter, beside its tensors."""

    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=2)]
    base: str


class StoredChange(Record):
    """What a file says of one language."""

    language: str
    parts: Annotated[dict[str, StoredPart], Field(min_length=1)]


class Content(Record):
    """What a file says of its tensors, four for each parameter of each change."""

    changes: Annotated[list[StoredChange], Field(min_length=1)]


def save(delta: Delta, path: str | PathLike[str]) -> None:
    """See `Delta.save`."""
    tensors: dict[str, Tensor] = {}
    changes = []
    for number, change in enumerate(delta.changes):
        stored = {}
        for name, part in change.parts.items():
            stored[name] = StoredPart(shape=part.shape, base=part.base)
            tensors |= dict(
                zip(_names(number, name), (part.code, part.difference, part.places, part.values), strict=True)
            )
        changes.append(StoredChange(language=change.language, parts=stored))
    header = {"format": FORMAT, "version": VERSION, CONTENT: Content(changes=changes).model_dump_json()}
    write_sealed(path, tensors, header)


def load(path: str | PathLike[str]) -> Delta:
    """See `Delta.load`."""
    header = read_metadata(path)
    if header.get("format") != FORMAT:
        raise FileError(path, "is a safetensors file, but not one of a fastmask delta")
    if header.get("version") != VERSION:
        raise FileError(path, f"has format version {header.get('version')} (expected {VERSION})")
    tensors, header = read_sealed(path)
    content: Content = parse_json(path, header.get(CONTENT, ""), Content)
    changes = []
    for number, change in enumerate(content.changes):
        parts = {}
        for name, stored in change.parts.items():
            try:
                given = [tensors[key] for key in _names(number, name)]
                parts[name] = Part.decoded(stored.shape, stored.base, *given)
            except KeyError as error:
                raise FileError(path, f"is damaged: it has no tensor {error}") from None
            except ValueError as error:
                raise FileError(path, f"is damaged: {name}: {error}") from None
        changes.append(Change(change.language, parts))
    return Delta(changes)


def _names(number: int, name: str) -> list[str]:
    return [f"{number}.{name}.{kind}" for kind in ("live", "difference", "places", "values")]
