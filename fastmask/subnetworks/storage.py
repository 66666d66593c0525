"""Subnetworks on disk: one safetensors file, bits packed, with a checksum and a versioned header; never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastmask.files import FileError, Record, parse_json, read_metadata, read_sealed, write_sealed
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["load", "masks_file", "metadata_of", "save"]

FORMAT, VERSION = "fastmask.subnetworks", "2"
CONTENT = "content"
IN_FOLDERS = ("masks.safetensors", "subnetworks.safetensors")  # of a run, and of a model with masks
RESERVED = ("format", "version", CONTENT, "sha256")

Size = Annotated[int, Field(ge=1)]


class Content(Record):
    """What a file says of its tensors: uint8 [L, bytes] each, a unit a bit, the lowest bit first."""

    languages: Annotated[tuple[str, ...], Field(min_length=1, max_length=10_000)]
    shapes: dict[str, tuple[Size, Size, Size]]  # name of the tensor -> of the mask it stands for


def save(subnets: Subnetworks, path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """See `Subnetworks.save`."""
    metadata = metadata or {}
    for name, text in metadata.items():
        if name in RESERVED or not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"metadata has {name!r}: {text!r} (expected names and texts, and no name of {', '.join(RESERVED)})"
            )
    masks = _named(subnets)
    shapes: dict[str, Any] = {name: tuple(keep.shape) for name, keep in masks.items()}
    content = Content(languages=subnets.languages, shapes=shapes)
    header = {"format": FORMAT, "version": VERSION, CONTENT: content.model_dump_json(), **metadata}
    write_sealed(path, {name: _packed(keep) for name, keep in masks.items()}, header)


def load(path: str | PathLike[str]) -> Subnetworks:
    """See `Subnetworks.load`."""
    path = masks_file(path)
    metadata_of(path)  # before the tensors of what may be another kind of file
    tensors, header = read_sealed(path)
    content: Content = parse_json(path, header.get(CONTENT, ""), Content)
    try:
        masks = {name: _unpacked(tensors[name], shape) for name, shape in content.shapes.items()}
        weights = {name.removeprefix("weights."): keep for name, keep in masks.items() if name.startswith("weights.")}
        return Subnetworks(content.languages, masks.get("heads"), masks.get("neurons"), weights=weights)
    except (ValueError, KeyError) as error:
        raise FileError(path, f"is damaged: {error}") from None


def masks_file(path: str | PathLike[str]) -> str | PathLike[str]:
    """The file itself; of the folder of a run or of a model with masks, the file in it."""
    return next((inside for name in IN_FOLDERS if (inside := Path(path, name)).is_file()), path)


def metadata_of(path: str | PathLike[str]) -> dict[str, str]:
    """The header of a masks file, after checking that it is one and that this version can read it."""
    header = read_metadata(path)
    if header.get("format") != FORMAT:
        raise FileError(path, "is a safetensors file, but not one of fastmask subnetworks")
    if header.get("version") != VERSION:
        raise FileError(
            path,
            f"has format version {header.get('version')} (expected {VERSION}: with a fastmask of another version it "
            "must be written, or read)",
        )
    return header


def _named(subnets: Subnetworks) -> dict[str, Tensor]:
    named = {f"weights.{name}": keep for name, keep in (subnets.weights or {}).items()}
    if subnets.heads is not None:
        named["heads"] = subnets.heads
    if subnets.neurons is not None:
        named["neurons"] = subnets.neurons
    return named


def _packed(keep: Tensor) -> Tensor:
    flags = keep.cpu().numpy()
    return torch.from_numpy(np.packbits(flags.reshape(flags.shape[0], -1), axis=1, bitorder="little"))


def _unpacked(packed: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The mask that a tensor stands for."""
    size = prod(shape[1:])
    if packed.dtype != torch.uint8 or packed.shape != (shape[0], -(-size // 8)):
        raise ValueError(f"bits are {packed.dtype} {tuple(packed.shape)} (expected uint8 for a mask of shape {shape})")
    flags = np.unpackbits(packed.numpy(), axis=1, count=size, bitorder="little")
    return torch.from_numpy(flags.view(bool).reshape(shape))
