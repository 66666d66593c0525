"""Matrix products with some rows of a weight, which are gathered on the way: the only file that calls a library."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.torch_path import onednn
from fastmask.torch_path.measured import SIZES, gains
from fastmask.torch_path.onednn import HALF, by_onednn, compiles
from fastmask.torch_path.scratch import LEFT, PRODUCT, ROWS, Scratch, gather_each

__all__ = [
    "HALF", "Live", "Tensors", "add_outer", "add_sampled", "by_onednn", "cast", "compiles", "outer", "products",
    "samples", "speed",
]  # fmt: skip

GAP = 16  # numbers between rows that are read by columns
SAMPLED_TOKENS = 64  # of a sampled product at once: both factors should stay in the cache
TURNED_TOKENS = 512  # whose factors are transposed at once
MOST_PADDED = 512  # tokens; of more, a product takes so long that it pays to compile code for their number
MOST_ADDED = 2**19  # weights whose gradients are added at once: what is added should still be in the cache

Tensors = Sequence[Tensor]


class Live(NamedTuple):
    """Rows of a weight: indices of all languages' own ones, one language after the other, and how many each has.

    own: where that is rounded up, how many of the rows are really a language's own. Those behind them count as zeros.
        In half precision that makes few shapes of many; otherwise languages are alike then in their numbers of rows
        and of tokens, and multiplied in one call.
    """

    rows: Tensor
    counts: list[int]
    own: list[int] | None = None


def products(
    activations: Tensors, w: Tensor, live: Live | None, outs: Tensors, transposed: bool = False, add: bool = False
) -> None:
    """Write (or add) to each language's out the product of its activations and its own rows of w [size, S].

    That is a [M, n] @ w[index] into out [M, S], or, `transposed`, a [M, S] @ w[index].T into out [M, n]. Without `live`
    all rows are meant. The rows of w, or its columns, lie in one piece each.
    """
    if not by_onednn(w):
        own = None if live is None else live.own
        rows: Tensors = [w] * len(outs) if live is None else gather_each(w, live.rows, live.counts)
        if own is not None:
            _clear_behind(rows, own)
        rights = [part.t() for part in rows] if transposed else rows
        if compiles(w):
            _multiply_padded(activations, rights, outs, add)
        else:
            _multiply(activations, rights, outs, own is not None, add)
        return
    indices: Sequence[Tensor | None] = [None] * len(outs) if live is None else live.rows.split_with_sizes(live.counts)
    for a, index, out in zip(activations, indices, outs, strict=True):
        onednn.product(a, w, index, out, transposed, add)


def add_outer(grad: Tensor, live: Live | None, activations: Tensors, others: Tensors, fresh: bool = False) -> None:
    """Add a.T @ c to each language's own rows of a gradient [size, S], for its a [M, n] and c [M, S].

    All of the gradient is written if it is `fresh`.
    """
    if live is None:  # one language, which owns everything
        part = outer(activations[0], others[0], grad if fresh and grad.dtype == others[0].dtype else None)
        if not fresh:
            grad.add_(part)
        elif part is not grad:
            grad.copy_(part)
        return
    if fresh:
        grad.zero_()
    languages = max(1, MOST_ADDED // (grad.shape[1] * max(1, *live.counts)))  # at once
    for first in range(0, len(live.counts), languages):
        some = slice(first, first + languages)
        begin, counts = sum(live.counts[:first]), live.counts[some]
        rows = live.rows[begin : begin + sum(counts)]
        parts = PRODUCT.take(len(rows), grad.shape[1], activations[0])
        pieces = parts.split_with_sizes(counts)
        if compiles(others[0]) or by_onednn(others[0]):
            for a, c, piece in zip(activations[some], others[some], pieces, strict=True):
                outer(a, c, piece)
        else:
            _multiply([a.t() for a in activations[some]], others[some], pieces, live.own is not None)
        if live.own is not None:
            _clear_behind(pieces, live.own[some])
        parts = cast(parts, grad.dtype)
        if grad.stride(1) == 1:
            grad.index_add_(0, rows, parts)
        else:  # columns of a gradient [S, size]; `index_add_` would take one after the other
            grad.t().scatter_add_(1, rows.expand(grad.shape[1], -1), parts.t())


def outer(a: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """The transpose of a [M, n] times c [M, S], [n, S]; without `out` in memory that the next call overwrites."""
    (M, n), S = a.shape, c.shape[1]
    out = PRODUCT.take(n, S, c) if out is None else out
    if by_onednn(a) and onednn.suits(n, S, M):
        onednn.outer(a, c, out)
    else:
        torch.mm(_padded(a, LEFT).t(), _padded(c, ROWS), out=out)
    return out


def samples(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where flags [n, S] are set, as compressed rows: where each row's begin, int32 [n + 1], and columns, int32."""
    starts = torch.nn.functional.pad(keep.sum(1), (1, 0)).cumsum(0)
    return starts.int(), keep.nonzero()[:, 1].int()


def add_sampled(grad: Tensor, where: tuple[Tensor, Tensor], a: Tensor, c: Tensor) -> None:
    """Add the elements of a.T @ c that `samples` names to a gradient [n, S], for a [M, n] and c [M, S] on a CPU."""
    values = torch.zeros(where[1].shape, dtype=c.dtype, device=c.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        sums = torch.sparse_csr_tensor(*where, values, grad.shape, check_invariants=False)
    for some_a, some_c in zip(a.split(TURNED_TOKENS), c.split(TURNED_TOKENS), strict=True):
        for of_a, of_c in zip(_turned(some_a, LEFT), _turned(some_c, PRODUCT), strict=True):
            torch.sparse.sampled_addmm(sums, of_a, of_c.t(), out=sums)
    grad.add_(sums)


def _turned(x: Tensor, memory: Scratch) -> Tensor:
    """The transposes [parts, n, SAMPLED_TOKENS] of some rows of x [M, n] after the other; zeros fill up the last.

    `sampled_addmm` would transpose both factors itself, but on one core. Rows are copied first, to where a gap is
    behind each: of a width like 3,072 all elements of a column would take turns in the same lines of a cache.
    """
    M, n = x.shape
    parts = -(-M // SAMPLED_TOKENS)
    rows = ROWS.take(parts * SAMPLED_TOKENS, n + GAP, x)[:, :n]
    rows[:M] = x
    rows[M:] = 0
    turned = memory.take(parts * n, SAMPLED_TOKENS, x).view(parts, n, SAMPLED_TOKENS)
    return turned.copy_(rows.unflatten(0, (parts, SAMPLED_TOKENS)).transpose(1, 2))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def speed(x: Tensor, tokens: int) -> float:
    """How many times as fast products of so many tokens with x are as in float32, on this CPU, as first measured."""
    if x.dtype not in HALF or not x.is_cpu:
        return 1.0
    near = min(range(len(SIZES)), key=lambda number: abs(math.log(SIZES[number][0] / max(1, tokens))))
    return _speeds(x.dtype)[near]


@cache
def _speeds(dtype: torch.dtype) -> list[float]:
    def product(a: Tensor, w: Tensor) -> Tensor:
        return a @ w.t()

    return gains(str(dtype).removeprefix("torch."), product, product, (torch.float32, dtype))


def _multiply(lefts: Tensors, rights: Tensors, outs: Tensors, alike: bool, add: bool = False) -> None:
    """Write (or add) the product of each left and right matrix; those that are alike in one call, as far as it pays.

    In such a call each thread has products of its own. Where threads share one, a core waits for rows that another has
    gathered: without a cache in common, that doubles the time.
    """
    first = 0
    if alike and len(outs) > 1:
        threads = torch.get_num_threads()
        first = len(outs) - len(outs) % threads or len(outs)  # what is left over would keep some of them waiting
        left, right, out = (_stacked(matrices[:first]) for matrices in (lefts, rights, outs))
        out.baddbmm_(left, right) if add else torch.bmm(left, right, out=out)
    for left, right, out in zip(lefts[first:], rights[first:], outs[first:], strict=True):
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)


def _multiply_padded(lefts: Tensors, rights: Tensors, outs: Tensors, add: bool) -> None:
    """As `_multiply`, one after the other, where code is compiled for each shape and stride of a matrix."""
    for left, right, out in zip(lefts, rights, outs, strict=True):
        whole = _padded(left, LEFT)
        if len(left) > MOST_PADDED or (whole is left and out.is_contiguous() and not add):
            out.addmm_(left, right) if add else torch.mm(left, right, out=out)
        else:
            product = torch.mm(whole, right, out=PRODUCT.take(len(whole), out.shape[1], out))[: len(out)]
            out.add_(product) if add else out.copy_(product)


def _padded(x: Tensor, memory: Scratch) -> Tensor:
    """As x [M, n], with rows of zeros behind and none of its gaps, where code is compiled for each shape and stride."""
    M, whole = len(x), onednn.padded(len(x))
    if not compiles(x) or M > MOST_PADDED or (whole == M and x.is_contiguous()):
        return x
    longer = memory.take(whole, x.shape[1], x)
    longer[:M] = x
    longer[M:] = 0
    return longer


def _stacked(matrices: Tensors) -> Tensor:
    """Matrices of one shape that lie evenly spaced in memory, as one tensor."""
    first = matrices[0]
    step = matrices[1].storage_offset() - first.storage_offset() if len(matrices) > 1 else 0
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _clear_behind(rows: Tensors, own: Sequence[int]) -> None:
    """Set rows that are not a language's own to zero."""
    for part, n in zip(rows, own, strict=True):
        if n < len(part):
            part[n:] = 0
