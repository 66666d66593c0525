"""Tensors on disk: safetensors, read with messages that name the file, and written with a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmask.files.reading import FileError
from fastmask.files.writing import replace_file

__all__ = ["read_metadata", "read_sealed", "read_tensors", "write_sealed", "write_tensors"]

SEAL = "sha256"  # in the header: of everything else in it and of all tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header of a safetensors file; raises what `read_tensors` does."""
    return _opened(path)[1]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file: its tensors by name, on the CPU, and its header.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a safetensors file, or a damaged one.
    """
    file, header = _opened(path)
    try:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise FileError(path, f"is damaged ({error})") from None


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write a new safetensors file of tensors that may be views, share memory or lie on a GPU."""
    contiguous = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=contiguous) for name, tensor in tensors.items()}
    save_file(plain, path, metadata=header)


def write_sealed(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header that `read_sealed` reads, and refuses where one bit is another; see `replace_file`."""
    sealed = {**header, SEAL: _digest(tensors, header)}
    replace_file(path, lambda partial: write_tensors(partial, tensors, sealed))


def read_sealed(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_sealed` wrote: tensors and header.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: see `read_tensors`, or what is there is not what was written.
    """
    tensors, header = read_tensors(path)
    seal = header.pop(SEAL, None)
    if seal != _digest(tensors, header):
        raise FileError(path, "is damaged: its content is not what its checksum says")
    return tensors, header


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The SHA-256 of the header, and of the names, dtypes, shapes and bytes of all tensors, in any order."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([sorted(header.items()), described]).encode())
    for name in names:
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opened(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    try:
        file = safe_open(os.fspath(path), framework="pt")
        return file, file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise FileError(path, f"is not a safetensors file, or is truncated ({error})") from None
