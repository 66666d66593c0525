"""What the operators make of their arguments: a mask kind's pieces, ids on the host, examples as [B, T, width]."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastmask.torch_path.blocks import Blocks
from fastmask.torch_path.segments import FULL, Pieces
from fastmask.torch_path.units import Columns, Rows
from fastmask.torch_path.weights import Weights

__all__ = ["UNPACKED", "as_examples", "check_packed", "host_ids", "pieces_of", "traced"]

UNPACKED = -1


def traced(*tensors: Tensor) -> bool:
    """Whether a tracer is looking, which must be shown a custom operator."""
    return torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


def pieces_of(
    index: Tensor, extents: Tensor, kind: str, geometry: list[int], weight: Tensor, packed_width: int
) -> Pieces:
    """The mask of one weight in the form the torch path runs; made once for a mask and a packed width."""
    made = _made.setdefault(index, {})
    pieces: Pieces | None = made.get(packed_width)
    if pieces is None:
        N, K = weight.shape
        index = index.detach()  # an alias: were the key held by its own value, neither would ever be freed
        packed = None if packed_width == UNPACKED else packed_width
        if kind == "rows":
            pieces = Rows(index, extents, geometry[0], N, K, packed)
        elif kind == "columns":
            pieces = Columns(index, extents, geometry[0], N, K, packed)
        elif kind == "blocks":
            pieces = Blocks(index, extents, (geometry[0], geometry[1]), N, K)
        else:
            pieces = Weights(index, N, K)
        made[packed_width] = pieces
    return pieces


# By the tensor that holds a mask, because operators receive tensors only; masks never change.
_made: MutableMapping[Tensor, dict[int, Pieces]] = WeakIdKeyDictionary()


def host_ids(language_ids: Tensor, n_languages: int) -> list[int]:
    """The ids as a list.

    Raises:
        ValueError: an id that is not -1 to n_languages - 1.
    """
    ids: list[int] = language_ids.tolist()
    for position, language in enumerate(ids):
        if not FULL <= language < n_languages:
            raise ValueError(
                f"language_ids[{position}] is {language}; expected 0 to {n_languages - 1}, or -1 for the full network"
            )
    return ids


def check_packed(pieces: Pieces, kind: str, ids: list[int], packed_width: int) -> None:
    """See that the packed side holds every language of the batch.

    Raises:
        ValueError: a language with more live units than `packed_width`.
    """
    if packed_width == UNPACKED or not isinstance(pieces, (Rows, Columns)):
        return
    for language in set(ids):
        live = pieces.live(language)
        if live > packed_width:
            name = "the full network (-1)" if language == FULL else f"language {language}"
            raise ValueError(f"{name} has {live} live {kind}, more than the packed width {packed_width}")


def as_examples(x: Tensor) -> Tensor:
    """[B, ..., width] -> [B, T, width]; T is spelled out because -1 is ambiguous in an empty batch."""
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    return x.reshape(x.shape[0], tokens, x.shape[-1])
