"""Matrix products with some rows of a weight, which are gathered on the way: the only file that calls a library."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.torch_path.onednn import MOST_TERMS, by_onednn, linear, padded, suits

__all__ = ["Live", "add_outer", "add_sampled", "by_onednn", "cast", "outer", "products", "samples"]

MOST_ROWS = 1024  # of a result at once, by oneDNN: the parts of larger ones would leave the cache before they are added
SAMPLED_TOKENS = 64  # of a sampled product at once: both factors should stay in the cache
MOST_ADDED = 2**19  # weights whose gradients are added at once: what is added should still be in the cache
MOST_VIEWS = 256  # one for each size that was asked for


class Live(NamedTuple):
    """Rows of a weight: indices of all languages' own ones, one language after the other, and how many each has.

    own: where languages are alike in their numbers of tokens and rows, to be multiplied in one call: how many of the
        rows are really a language's own. Those behind them fill it up and count as zeros.
    """

    rows: Tensor
    counts: list[int]
    own: list[int] | None = None


def products(
    activations: Sequence[Tensor],
    w: Tensor,
    live: Live | None,
    outs: Sequence[Tensor],
    transposed: bool = False,
    add: bool = False,
) -> None:
    """Write (or add) to each language's out the product of its activations and its own rows of w [size, S].

    That is a [M, n] @ w[index] into out [M, S], or, `transposed`, a [M, S] @ w[index].T into out [M, n]. Without `live`
    all rows are meant. The rows of w, or its columns, lie in one piece each.
    """
    if not by_onednn(w):
        rows = _gathered(w, live, len(outs))
        rights = [part.t() for part in rows] if transposed else rows
        _multiply(activations, rights, outs, live is not None and live.own is not None, add)
        return
    indices: Sequence[Tensor | None] = [None] * len(outs) if live is None else live.rows.split_with_sizes(live.counts)
    for a, index, out in zip(activations, indices, outs, strict=True):
        if not suits(out.shape[0], out.shape[1], a.shape[1]):
            right = _gather(w, index).t() if transposed else _gather(w, index)
            out.addmm_(a, right) if add else torch.mm(a, right, out=out)
            continue
        for first in range(0, a.shape[1], MOST_TERMS):
            part = slice(first, first + MOST_TERMS)
            if not transposed:
                right = (w[part] if index is None else _gather(w, index[part])).t()
            elif index is None:
                right = w[:, part]
            else:  # anything finite behind the rows, so that there is one of few numbers of them
                behind = padded(index.shape[0]) - index.shape[0]
                right = _gather(w[:, part], torch.nn.functional.pad(index, (0, behind)))
            _add(out, a[:, part], right, add or first > 0)


def add_outer(
    grad: Tensor, live: Live | None, activations: Sequence[Tensor], others: Sequence[Tensor], fresh: bool = False
) -> None:
    """Add a.T @ c to each language's own rows of a gradient [size, S], for its a [M, n] and c [M, S].

    All of the gradient is written if it is `fresh`.
    """
    if live is None:
        for a, c in zip(activations, others, strict=True):
            if fresh and grad.dtype == a.dtype:
                outer(a, c, grad)
            elif fresh:
                grad.copy_(outer(a, c))
            else:
                grad.add_(outer(a, c))
            fresh = False
        return
    if fresh:
        grad.zero_()
    languages = max(1, MOST_ADDED // (grad.shape[1] * max(1, *live.counts)))  # at once
    for first in range(0, len(live.counts), languages):
        some = slice(first, first + languages)
        begin, counts = sum(live.counts[:first]), live.counts[some]
        rows = live.rows[begin : begin + sum(counts)]
        parts = _PRODUCT.take(len(rows), grad.shape[1], activations[0])
        pieces = parts.split_with_sizes(counts)
        if by_onednn(others[0]):
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
    out = _PRODUCT.take(n, S, c) if out is None else out
    if not by_onednn(a) or not suits(n, S, M):
        return torch.mm(a.t(), c, out=out)
    for number, (of_a, of_c) in enumerate(zip(a.split(MOST_TERMS), c.split(MOST_TERMS), strict=True)):
        tokens = of_a.shape[0]
        left, right = _LEFT.take(padded(n), padded(tokens), a), of_c
        left[:n, :tokens].copy_(of_a.t())
        if left.shape[1] > tokens:
            left[:, tokens:] = 0
            right = _ROWS.take(left.shape[1], S, c)
            right[:tokens].copy_(of_c)
            right[tokens:] = 0
        _put(out, linear(left, _without_gaps(right.t())), add=number > 0)
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
    for of_a, of_c in zip(_by_tokens(a), _by_tokens(c), strict=True):
        torch.sparse.sampled_addmm(sums, of_a, of_c.t(), out=sums)
    grad.add_(sums)


def _by_tokens(x: Tensor) -> list[Tensor]:
    """The transposes [n, tokens] of some rows after the other of x [M, n], each contiguous.

    `sampled_addmm` would transpose both factors itself, but on one core.
    """
    M = len(x) - len(x) % SAMPLED_TOKENS
    whole = x[:M].unflatten(0, (-1, SAMPLED_TOKENS)).transpose(1, 2).contiguous()
    return [*whole, x[M:].t().contiguous()] if len(x) > M else [*whole]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _multiply(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor], alike: bool, add: bool = False
) -> None:
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


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape that lie evenly spaced in memory, as one tensor."""
    first = matrices[0]
    step = matrices[1].storage_offset() - first.storage_offset() if len(matrices) > 1 else 0
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _gathered(w: Tensor, live: Live | None, languages: int) -> Sequence[Tensor]:
    """The rows of w [size, S] of each language."""
    if live is None:
        return [w] * languages
    rows = _gather(w, live.rows).split_with_sizes(live.counts)
    if live.own is not None:
        _clear_behind(rows, live.own)
    return rows


def _clear_behind(rows: Sequence[Tensor], own: Sequence[int]) -> None:
    """Set rows that are not a language's own to zero."""
    for part, n in zip(rows, own, strict=True):
        if n < len(part):
            part[n:] = 0


def _gather(w: Tensor, index: Tensor | None) -> Tensor:
    """Rows of w [size, S], in memory that the next call overwrites."""
    if index is None:
        return w
    if w.stride(1) == 1:
        return torch.index_select(w, 0, index, out=_ROWS.take(index.shape[0], w.shape[1], w))
    out = _ROWS.take(w.shape[1], index.shape[0], w)
    return torch.gather(w.t(), 1, index.expand(w.shape[1], -1), out=out).t()


class _Scratch(threading.local):
    """A buffer that every call takes in turn, one for each thread: fresh memory costs more than what is copied into it.

    The kernel clears each page of it at the first touch, and glibc gives large blocks back as soon as they are free.
    What is kept is as large as the largest live part of one weight.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.views: dict[tuple[int, int, torch.dtype], Tensor] = {}  # making one anew costs several calls

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix of the dtype of `like`; what was taken before is overwritten."""
        if not like.is_cpu:
            return like.new_empty(rows, columns)  # other devices have allocators that keep memory
        key = (rows, columns, like.dtype)
        if key not in self.views:
            size = rows * columns * like.element_size()
            if len(self.memory) < size or len(self.views) >= MOST_VIEWS:
                self.views.clear()
            with torch.inference_mode(False):  # what is made in inference mode could not be written to after it
                if len(self.memory) < size:
                    self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
                self.views[key] = self.memory[:size].view(like.dtype).view(rows, columns)
        return self.views[key]


_ROWS, _LEFT, _PRODUCT = _Scratch(), _Scratch(), _Scratch()


# ---- what oneDNN needs around it


def _add(out: Tensor, a: Tensor, w: Tensor, add: bool) -> None:
    """Write or add the products of a [M, K] with rows of w [N or more, K] into out [M, N]."""
    w = _without_gaps(w)
    for of_out, of_a in zip(out.split(MOST_ROWS), a.split(MOST_ROWS), strict=True):
        M, K = of_a.shape
        if padded(M) > M or not of_a.is_contiguous():  # anything behind its rows, so that M is one of few
            left = _LEFT.take(padded(M), K, of_a)
            left[:M].copy_(of_a)
            of_a = left
        _put(of_out, linear(of_a, w), add)


def _put(out: Tensor, product: Tensor, add: bool) -> None:
    """Write or add what fits of a product."""
    product = product[: out.shape[0], : out.shape[1]]
    out.add_(product) if add else out.copy_(product)


def _without_gaps(w: Tensor) -> Tensor:
    """The matrix, its rows or its columns one after the other."""
    return w if w.is_contiguous() or w.t().is_contiguous() else w.contiguous()
