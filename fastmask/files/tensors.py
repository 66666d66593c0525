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

from fastmask.files.reading import FileError, check_regular
from fastmask.files.writing import replace_file

__all__ = ["read_metadata", "read_sealed", "read_tensors", "write_sealed"]

SEAL = "sha256"  # in the header: of everything else in it and of all tensors
MOST_TENSORS = 1 << 16  # a header of a few megabytes can promise millions of empty ones


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
        FileError: not a safetensors file, a truncated one, or one with truth values that are neither true nor false.
    """
    file, header = _opened(path)
    try:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise FileError(path, f"is damaged ({error})") from None
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(_bytes(tensor).max()) > 1:
            raise FileError(path, f"is damaged: {name!r} holds other bytes than 0 and 1 for true and false")
    return tensors, header


def write_sealed(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str], *, follow: bool = True
) -> None:
    """Write tensors and a header that `read_sealed` reads, and refuses where one bit is another; see `replace_file`."""
    # Copies: safetensors takes no views, and no tensors that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    sealed = {**header, SEAL: _digest(plain, header)}
    replace_file(path, lambda partial: save_file(plain, partial, metadata=sealed), follow=follow)


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
        digest.update(_bytes(tensors[name]).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _opened(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    check_regular(path)
    try:
        file = safe_open(os.fspath(path), framework="pt")
        header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FileError(path, f"is not a safetensors file, or is truncated ({error})") from None
    if len(file.keys()) > MOST_TENSORS:
        raise FileError(path, f"holds {len(file.keys())} tensors (expected at most {MOST_TENSORS})")
    return file, header
