"""Matrix products with some rows of a weight, which are gathered on the way: the only file that knows who multiplies.

PyTorch leaves float32 products on a CPU to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which
PyTorch brings along for half precision, asks what a processor can do: with AVX-512 on an AMD Zen 5 it is twice as fast,
on a Zen 4 it is not. So it is measured (`faster`). Two things have to be seen to:

- It adds up all K terms of an element one after the other, whose rounding errors grow to three times those of MKL. So
  it is given at most `MOST_TERMS` terms at a time, and the parts are added: the errors are then about those of MKL.
- It compiles code for every new shape, which takes longer than a small product, and keeps that of the last 1024.
  Batches of sentences hardly ever repeat a shape. So sizes are rounded up to the few of `_padded`, and what is too much
  is left out of the result.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.torch_path.faster import faster

__all__ = ["Live", "add_outer", "add_sampled", "by_onednn", "cast", "combined", "outer", "products", "samples"]

MOST_TERMS = 256
LEAST_MULTIPLICATIONS = 2**20  # below it the 10 us that a call of oneDNN takes are more than it saves
LEAST_SIDE = 16  # of a result: thinner ones are not what its kernels are made for
MOST_ROWS = 1024  # of a result at once: the parts of larger ones would not stay in the cache until they are added
GRAIN = 32
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


def products(activations: Sequence[Tensor], w: Tensor, live: Live | None, outs: Sequence[Tensor]) -> None:
    """Write products with each language's own rows of w [size, S] into its out [M, n]: a [M, S] @ w[index].T.

    Without `live` all rows are meant. The rows of w, or its columns, lie in one piece each.
    """
    if not by_onednn(w):
        _multiply(activations, [rows.t() for rows in _gathered(w, live, len(outs))], outs, _alike(live))
        return
    for a, index, out in zip(activations, _indices(live, len(outs)), outs, strict=True):
        if not _suits(out.shape[0], out.shape[1], w.shape[1]):
            torch.mm(a, _gather(w, index).t(), out=out)
            continue
        for first in range(0, w.shape[1], MOST_TERMS):
            part = slice(first, first + MOST_TERMS)
            _add(out, a[:, part], _padded_rows(w[:, part], index), add=first > 0)


def combined(
    activations: Sequence[Tensor], w: Tensor, live: Live | None, outs: Sequence[Tensor], add: bool = False
) -> None:
    """Write (or add) combinations of each language's own rows of w [size, S] into its out [M, S]: a @ w[index]."""
    if not by_onednn(w):
        _multiply(activations, _gathered(w, live, len(outs)), outs, _alike(live), add)
        return
    for a, index, out in zip(activations, _indices(live, len(outs)), outs, strict=True):
        if not _suits(out.shape[0], out.shape[1], a.shape[1]):
            out.addmm_(a, _gather(w, index)) if add else torch.mm(a, _gather(w, index), out=out)
            continue
        for first in range(0, a.shape[1], MOST_TERMS):
            part = slice(first, first + MOST_TERMS)
            rows = w[part] if index is None else _gather(w, index[part])
            _add(out, a[:, part], rows.t(), add=add or first > 0)


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
            _multiply([a.t() for a in activations[some]], others[some], pieces, _alike(live))
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
    if not by_onednn(a) or not _suits(n, S, M):
        return torch.mm(a.t(), c, out=out)
    for number, (of_a, of_c) in enumerate(zip(a.split(MOST_TERMS), c.split(MOST_TERMS), strict=True)):
        tokens = of_a.shape[0]
        left, right = _LEFT.take(_padded(n), _padded(tokens), a), of_c
        left[:n, :tokens].copy_(of_a.t())
        if left.shape[1] > tokens:
            left[:, tokens:] = 0
            right = _ROWS.take(left.shape[1], S, c)
            right[:tokens].copy_(of_c)
            right[tokens:] = 0
        _put(out, _linear(left, _without_gaps(right.t())), add=number > 0)
    return out


def samples(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where flags [n, S] are set, as compressed rows: where each row's begin, int32 [n + 1], and columns, int32."""
    starts = torch.nn.functional.pad(keep.sum(1), (1, 0)).cumsum(0)
    return starts.int(), keep.nonzero()[:, 1].int()


def add_sampled(grad: Tensor, where: tuple[Tensor, Tensor], a: Tensor, c: Tensor) -> None:
    """Add the elements of a.T @ c that `samples` names to a gradient [n, S], for a [M, n] and c [M, S] on a CPU."""
    starts, columns = where
    values = torch.zeros(columns.shape, dtype=c.dtype)
    sums = _compressed_rows(starts, columns, values, grad.shape)
    for of_a, of_c in zip(a.split(SAMPLED_TOKENS), c.split(SAMPLED_TOKENS), strict=True):
        torch.sparse.sampled_addmm(sums, of_a.t(), of_c, out=sums)
    grad.add_(sums)


def _compressed_rows(starts: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes its time even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _alike(live: Live | None) -> bool:
    return live is not None and live.own is not None


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
        self.memory = torch.empty(0, dtype=torch.uint8)
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
                    self.memory = torch.empty(size, dtype=torch.uint8)
                self.views[key] = self.memory[:size].view(like.dtype).view(rows, columns)
        return self.views[key]


_ROWS, _LEFT, _PRODUCT = _Scratch(), _Scratch(), _Scratch()


# ---- oneDNN


def by_onednn(x: Tensor) -> bool:
    """Whether large products with x go to oneDNN.

    They do where that is faster on this machine. `FASTMASK_PRODUCTS=torch` or `=onednn` in the environment decides
    otherwise, as it was when first asked.
    """
    return _chosen() and x.dtype == torch.float32 and x.is_cpu and bool(torch.backends.mkldnn.enabled)


@cache
def _chosen() -> bool:
    asked = os.environ.get("FASTMASK_PRODUCTS", "")
    if asked not in ("", "torch", "onednn"):
        raise ValueError(f"FASTMASK_PRODUCTS is {asked!r}; expected torch or onednn")
    if asked == "torch" or not (torch.backends.mkldnn.is_available() and _works()):
        return False
    if asked == "onednn":
        return True
    # Elsewhere PyTorch's products are not MKL's, or there is no AVX-512 that MKL could leave unused.
    held_back = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return held_back and faster(lambda a, w: a @ w.t(), _linear)


def _works() -> bool:
    """Whether the operator, which PyTorch's compiler uses but does not document, is there and does what is expected."""
    a, b = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2)
    try:
        return torch.equal(_linear(a, b.t()), a @ b)
    except (AttributeError, RuntimeError):
        return False


def _linear(a: Tensor, w: Tensor) -> Tensor:
    """Multiply a [M, K] by the transpose of w [N, K]; gaps between the rows (or columns) of w make it very slow."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, w, None, "none", [], "")
    return y


def _suits(M: int, N: int, K: int) -> bool:
    """Whether a product [M, N] of K terms is worth it."""
    return M * K * N >= LEAST_MULTIPLICATIONS and min(M, N) >= LEAST_SIDE


def _indices(live: Live | None, languages: int) -> Sequence[Tensor | None]:
    return [None] * languages if live is None else live.rows.split_with_sizes(live.counts)


def _padded(size: int) -> int:
    """A size rounded up to a multiple of an eighth of the power of 2 below it, and of `GRAIN`."""
    grain = max(GRAIN, 1 << size.bit_length() >> 4)
    return -(-size // grain) * grain


def _padded_rows(w: Tensor, index: Tensor | None) -> Tensor:
    """Rows of w, and anything finite behind them, so that there is one of few numbers of them."""
    if index is None:
        return w
    return _gather(w, torch.nn.functional.pad(index, (0, _padded(index.shape[0]) - index.shape[0])))


def _add(out: Tensor, a: Tensor, w: Tensor, add: bool) -> None:
    """Write or add the products of a [M, K] with rows of w [N or more, K] into out [M, N]."""
    w = _without_gaps(w)
    for of_out, of_a in zip(out.split(MOST_ROWS), a.split(MOST_ROWS), strict=True):
        _put(of_out, _linear(_padded_left(of_a), w), add)


def _padded_left(a: Tensor) -> Tensor:
    """A matrix [M, K] with anything behind its rows, so that M is one of few."""
    M, K = a.shape
    rows = _padded(M)
    if rows == M and a.is_contiguous():
        return a
    memory = _LEFT.take(rows, K, a)
    memory[:M].copy_(a)
    return memory


def _put(out: Tensor, product: Tensor, add: bool) -> None:
    """Write or add what fits of a product."""
    product = product[: out.shape[0], : out.shape[1]]
    out.add_(product) if add else out.copy_(product)


def _without_gaps(w: Tensor) -> Tensor:
    """The matrix, its rows or its columns one after the other."""
    return w if w.is_contiguous() or w.t().is_contiguous() else w.contiguous()
