"""The masked operator in plain operators of ATen, for exported graphs that have to run without fastmask.

    program = torch.export.export(model, (), kwargs)              # kwargs with language_ids: a mixed batch
    program = program.run_decompositions(fastmask.decompositions())

It computes the full layer, and is as right and as slow as multiplying by masks: to deploy one language, export what
`fastmask.extract` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import bits, operators
from fastmask.masks import UNPACKED
from fastmask.torch_path.layers import activate

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for `ExportedProgram.run_decompositions`: PyTorch's own, and that of fastmask's operator."""
    assert operators._forward_op  # registered where it is defined
    return {**torch.export.default_decompositions(), torch.ops.fastmask.masked_linear.default: _masked_linear}


def _masked_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    language_ids: Tensor,
    indices: list[Tensor],
    extents: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    kind, geometries, n_languages, packed_widths, activation, full_forward = operators.Settings(*settings)
    x = activate(x, activation)
    found = []
    for g, weight in enumerate(weights):
        w, bias = weight.to(x.dtype), biases[g].to(x.dtype) if biases else None
        width = packed_widths[g]
        if full_forward:
            found.append(F.linear(x, w, bias))
        elif kind in ("rows", "columns"):
            size = weight.shape[0] if kind == "rows" else weight.shape[1]
            slots, live = _slots(indices[g], extents[g], language_ids, size)
            if kind == "rows":
                found.append(_of_rows(F.linear(x, w, bias), slots, live, width))
            else:
                found.append(F.linear(_of_columns(x, slots, live, size, width), w, bias))
        else:
            bn, bk = geometries[2 * g : 2 * g + 2]
            keep = bits.unpack_by_shifts(indices[g], weight.shape[1] // bk)
            keep = keep.repeat_interleave(bn, 1).repeat_interleave(bk, 2)
            y = F.linear(x, w)
            at = language_ids.view(-1, *[1] * (x.ndim - 1))
            for language in range(n_languages):
                y = torch.where(at == language, F.linear(x, w * keep[language]), y)
            found.append(y if bias is None else y + bias)
    return found


def _slots(index: Tensor, extents: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The unit in each slot of every example, [B, size], live ones in front; and which slots are live."""
    whole = torch.arange(size, device=index.device)
    table = torch.cat([F.pad(index, (0, size - index.shape[1])), whole[None]])
    counts = torch.cat([extents, extents.new_full((1,), size)])
    row = torch.where(ids < 0, index.shape[0], ids)
    return table[row], whole[None] < counts[row][:, None]


def _kept(slots: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for units that live, 0 for others, [B, size]."""
    return torch.zeros_like(slots, dtype=dtype).scatter_add(1, slots, live.to(dtype))


def _beside(flags: Tensor, x: Tensor) -> Tensor:
    """[B, size] as [B, 1, ..., size] of x [B, ..., size]."""
    return flags.view(x.shape[0], *[1] * (x.ndim - 2), flags.shape[1])


def _of_rows(y: Tensor, slots: Tensor, live: Tensor, width: int) -> Tensor:
    if width == UNPACKED:
        return y * _beside(_kept(slots, live, y.dtype), y)
    at = _beside(slots[:, :width], y).expand(*y.shape[:-1], width)
    return y.gather(-1, at) * _beside(live[:, :width].to(y.dtype), y)


def _of_columns(x: Tensor, slots: Tensor, live: Tensor, size: int, width: int) -> Tensor:
    if width == UNPACKED:
        return x * _beside(_kept(slots, live, x.dtype), x)
    width = x.shape[-1]
    at = _beside(slots[:, :width], x).expand(x.shape)
    # What lies behind the live units need not be zero.
    return x.new_zeros(*x.shape[:-1], size).scatter_add(-1, at, x * _beside(live[:, :width].to(x.dtype), x))
