"""Subnetworks on disk: one safetensors file, bits packed, with versioned metadata; never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["load", "read_metadata", "save"]

FORMAT, VERSION = "fastmask.subnetworks", 1
RESERVED = ("format", "version", "languages", "shapes")


def save(subnets: Subnetworks, path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """See `Subnetworks.save`."""
    target, metadata = Path(path), dict(metadata or {})
    _check_metadata(metadata)
    tensors, shapes = {}, {}
    for name, keep in _named(subnets).items():
        flags = keep.cpu().numpy()
        tensors[name] = torch.from_numpy(np.packbits(flags.reshape(flags.shape[0], -1), axis=1, bitorder="little"))
        shapes[name] = list(flags.shape)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "languages": json.dumps(list(subnets.languages), ensure_ascii=False),
        "shapes": json.dumps(shapes),
        **metadata,
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(to_bytes(tensors, metadata=header))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name, value in metadata.items():
        if name in RESERVED:
            raise ValueError(
                f"metadata {name!r} is what the file says of itself (as are {', '.join(RESERVED)}): rename it"
            )
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"expected metadata as text for text, given {name!r}: {value!r}")


def load(path: str | PathLike[str]) -> Subnetworks:
    """See `Subnetworks.load`."""
    header = read_metadata(path)
    languages, shapes = json.loads(header["languages"]), json.loads(header["shapes"])
    keeps = {}
    with safe_open(path, framework="pt") as file:
        for name, shape in shapes.items():
            size = int(np.prod(shape[1:]))
            packed = file.get_tensor(name).numpy()
            if packed.shape != (shape[0], (size + 7) // 8):
                raise ValueError(f"{path}: {name} holds {packed.shape} bytes, which do not fit its shape {shape}")
            flags = np.unpackbits(packed, axis=1, count=size, bitorder="little")
            keeps[name] = torch.from_numpy(flags.astype(bool).reshape(shape))
    weights = {name.removeprefix("weights."): keep for name, keep in keeps.items() if name.startswith("weights.")}
    return Subnetworks(languages, keeps.get("heads"), keeps.get("neurons"), weights or None)


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The header of a masks file, after checking that it is one and that this version can read it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no masks file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a masks file, or is truncated ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one of fastmask subnetworks")
    if int(header["version"]) > VERSION:
        raise ValueError(
            f"{path} has format version {header['version']}, this fastmask reads up to {VERSION}: update fastmask"
        )
    return header


def _named(subnets: Subnetworks) -> dict[str, torch.Tensor]:
    named = {f"weights.{name}": keep for name, keep in (subnets.weights or {}).items()}
    if subnets.heads is not None:
        named["heads"] = subnets.heads
    if subnets.neurons is not None:
        named["neurons"] = subnets.neurons
    return named
