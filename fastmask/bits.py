"""Boolean masks as bits, 32 to an int32 along the last axis; bit k % 32 of word k // 32 is element k."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

_PACK = 0x0102040810204080  # multiplied with eight flags (bytes 0 or 1), it leaves their bits in the highest byte

if sys.byteorder != "little":  # the words are read as bytes below
    raise ImportError("fastmask stores mask bits in little-endian words and does not support big-endian machines")


@lru_cache(maxsize=8)
def _eight_flags(device: torch.device) -> Tensor:
    """int64 [256]: entry b holds the 8 bits of byte b as 8 bool bytes, lowest bit first."""
    byte = torch.arange(256, device=device)[:, None]
    flags = (byte >> torch.arange(8, device=device)) & 1
    return flags.bool().view(torch.int64).flatten()


def pack(keep: Tensor) -> Tensor:
    """Bool [..., K] -> int32 [..., ceil(K / 32)]; the bits past K are 0."""
    K = keep.shape[-1]
    out = torch.empty(*keep.shape[:-1], -(-K // 32), dtype=torch.int32, device=keep.device)
    # One leading entry at a time: what is computed on the way is eight times the size of the bits.
    for source, target in zip(keep.reshape(-1, *keep.shape[-2:]), out.view(-1, *out.shape[-2:]), strict=True):
        eights = torch.nn.functional.pad(source, (0, -K % 32)).contiguous().view(torch.int64)
        target.copy_((eights * _PACK >> 56 & 255).to(torch.uint8).view(torch.int32))
    return out


def unpack(words: Tensor, K: int) -> Tensor:
    """int32 [..., ceil(K / 32)] -> bool [..., K].

    A table look-up of eight flags a byte: about a tenth of the time of shifting and masking on a CPU.
    """
    octets = words.contiguous().view(torch.uint8)
    flags = _eight_flags(words.device).index_select(0, octets.flatten().to(torch.int32))
    return flags.view(torch.bool).view(*words.shape[:-1], -1)[..., :K]


def unpack_by_shifts(words: Tensor, K: int) -> Tensor:
    """`unpack` without a table, for graphs that may hold no constant; it takes more time and memory."""
    return (words[..., None] >> torch.arange(32, device=words.device) & 1).flatten(-2)[..., :K].bool()
