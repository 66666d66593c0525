"""Activations to and from their packed form: a language's live units in front of its rows, exact zeros behind.

Both directions are one gather of columns with a table for each language: packed column c comes from unit `index[l, c]`,
unit n from packed column `positions(...)[l, n]`. Every element of the result is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.configs import Config
from fastmask_kernels.launching import launch
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_arguments import check_activation, check_index

__all__ = ["pack", "positions", "unpack"]

CONFIG = Config((("BM", 8), ("BN", 256)), num_warps=4, num_stages=1)


# One program copies BN columns of at most BM tokens of one language; a column that its table does not name is zero.
# Grid: (token tiles, blocks of BN columns of the result).
@triton.jit(do_not_specialize=["entries"])
def gather_columns_kernel(
    x, y, table, counts, token_rows, tiles, x_stride, x_width, y_width, entries,
    COUNTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    segment = tl.load(tiles + 3 * tile)
    if segment < 0:
        return  # a spare tile
    first = tl.load(tiles + 3 * tile + 1)
    last = tl.load(tiles + 3 * tile + 2)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    # COUNTED: the table is `index`, whose entries past `counts` are padding; else dead units are marked -1.
    known = entries
    if COUNTED:
        known = tl.minimum(tl.load(counts + segment - 1, mask=segment > 0, other=0).to(tl.int32), entries)
    language = tl.maximum(segment - 1, 0).to(tl.int64)
    source = tl.load(table + language * entries + c, mask=c < tl.where(segment == 0, 0, known), other=-1).to(tl.int32)
    source = tl.where(c < tl.where(segment == 0, x_width, 0), c, source)  # the full network moves nothing
    m = first + tl.arange(0, BM)
    token = tl.load(token_rows + tl.minimum(m, last - 1)).to(tl.int64)
    inside = (m < last)[:, None]
    taken = inside & ((source >= 0) & (source < x_width))[None, :]
    values = tl.load(x + token[:, None] * x_stride + source[None, :], mask=taken, other=0.0)
    tl.store(y + token[:, None] * y_width + c[None, :], values, mask=inside & (c < y_width)[None, :])


def pack(x: Tensor, index: Tensor, counts: Tensor, plan: Plan, width: int, *, config: Config = CONFIG) -> Tensor:
    """Live columns of x to the front, in the order of `index`, exact zeros behind.

    Args:
        x: [M, N], float16, bfloat16 or float32.
        index: the live units of each language, int64 [L, most].
        counts: how many they are, int64 [L].
        plan: the batch; rows of the full network stay as they are (cut or filled with zeros to `width`).
        width: of the result.
        config: block sizes BM (tokens) and BN (columns).

    Returns:
        [M, width] in x's dtype.

    Raises:
        TypeError, ValueError: what does not fit. RuntimeError: bfloat16 in the interpreter.
    """
    return _gather(x, index, counts, plan, width, config)


def unpack(xp: Tensor, table: Tensor, plan: Plan, *, config: Config = CONFIG) -> Tensor:
    """Packed columns back to their places, exact zeros where a language owns nothing; undoes `pack`.

    Args:
        xp: [M, width], of which what lies behind the live units is never used.
        table: int32 [L, N], where each of N units lies: what `positions` makes of the mask.
        plan: like what follows, as for `pack`.
        config: see there.

    Returns:
        [M, N] in xp's dtype.
    """
    L = plan.n_languages
    if table.dtype != torch.int32 or table.ndim != 2 or table.shape[0] != L or not table.is_contiguous():
        raise ValueError(f"table: expected contiguous int32 [{L}, N], given {table.dtype} {tuple(table.shape)}")
    if table.device != xp.device:
        raise ValueError(f"table: expected on {xp.device} with the activations, given on {table.device}")
    return _gather(xp, table, None, plan, table.shape[1], config)


def positions(index: Tensor, counts: Tensor, n: int) -> Tensor:
    """Where each of n units lies in the packed form of each language: int32 [L, n], -1 for dead ones. Never waits."""
    L, most = index.shape
    place = torch.arange(most, device=index.device)
    # Padding goes to a column of its own, which is cut off.
    unit = torch.where(place < counts[:, None], index, n)
    table = torch.full((L, n + 1), -1, dtype=torch.int32, device=index.device)
    table.scatter_(1, unit, place.to(torch.int32).expand(L, most))
    return table[:, :n].contiguous()


def _gather(x: Tensor, table: Tensor, counts: Tensor | None, plan: Plan, width: int, config: Config) -> Tensor:
    check_activation("x", x, plan)
    if counts is not None:
        check_index(0, table, counts, plan, x.device)
    if width < 1:
        raise ValueError(f"width: expected a positive integer, given {width}")
    out = torch.empty(plan.n_rows, width, dtype=x.dtype, device=x.device)
    if plan.n_rows == 0:
        return out
    tiles = plan.tiles(config["BM"])
    launch(
        gather_columns_kernel, (tiles.shape[0], triton.cdiv(width, config["BN"])), out,
        x, out, table, table if counts is None else counts, plan.token_rows, tiles, x.stride(0),
        x.shape[1], width, table.shape[1],
        COUNTED=counts is not None, **config.options,
    )  # fmt: skip
    return out
