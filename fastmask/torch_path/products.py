"""Matrix products: by MKL, as PyTorch does them, or by oneDNN where that is faster.

PyTorch leaves float32 products on a CPU to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which
PyTorch brings along for half precision, asks what a processor can do: with AVX-512 on an AMD Zen 5 it is twice as fast,
on a Zen 4 it is not. So it is measured. Two things have to be seen to:

- It adds up all K terms of an element one after the other, whose rounding errors grow to three times those of MKL. So
  it is given at most `MOST_TERMS` terms at a time, and the parts are added: the errors are then about those of MKL.
- It compiles code for every new shape, which takes longer than a small product, and keeps that of the last 1024.
  Batches of sentences hardly ever repeat a shape. So the sizes that vary, tokens and live units, are rounded up to the
  few of `padded`, and what is too much is left out of the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from fastmask.torch_path.faster import faster
from fastmask.torch_path.scratch import Scratch

__all__ = ["add_multiply", "by_onednn", "multiply", "over_tokens", "padded", "rows_at_once"]

MOST_TERMS = 256
LEAST_MULTIPLICATIONS = 2**20  # below it the 10 us that a call of oneDNN takes are more than it saves
LEAST_SIDE = 16  # of a result: thinner ones are not what its kernels are made for
GRAIN = 32
LARGE_RESULT, PIECE_OF_RESULT = 2**23, 2**20  # elements

_PRODUCT, _LEFT, _RIGHT = Scratch(), Scratch(), Scratch()


def multiply(a: Tensor, b: Tensor | Sequence[Tensor], bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return a [M, K] @ b [K, N] (+ bias [N]), [M, N], written into `out` if given; M varies, K and N do not.

    b may come in the parts [k, N] of its rows that `rows_at_once` says, which spares splitting it here.
    """
    parts = _parts(a, b)
    if parts is None:
        assert isinstance(b, Tensor)
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    M, N = a.shape[0], parts[0].shape[1]
    rows = _rows_of_results(M, N, len(parts))
    if rows >= M:
        return _total(_by_parts(a, parts, bias), len(parts), out)
    out = a.new_empty(M, N) if out is None else out
    for of_a, of_out in zip(a.split(rows), out.split(rows), strict=True):
        _total(_by_parts(of_a, parts, bias), len(parts), of_out)
    return out


def add_multiply(out: Tensor, a: Tensor, b: Tensor | Sequence[Tensor]) -> None:
    """Add a [M, K] @ b [K, N] to `out` [M, N]; b as in `multiply`."""
    parts = _parts(a, b)
    if parts is None:
        assert isinstance(b, Tensor)
        out.addmm_(a, b)
        return
    rows = _rows_of_results(out.shape[0], out.shape[1], len(parts))
    for of_a, of_out in zip(a.split(rows), out.split(rows), strict=True):
        for part in _by_parts(of_a, parts, None):
            of_out += part


def over_tokens(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the transpose of dy [M, N] @ x [M, K], [N, K]; M and N vary.

    It is written into `out` if given, else into memory that the next call may overwrite.
    """
    (M, N), K = dy.shape, x.shape[1]
    if not _suits(M, N, K, dy):
        return torch.mm(dy.t(), x, out=_PRODUCT.take(N, K, x) if out is None else out)
    parts = -(-M // MOST_TERMS)
    rows = _rows_of_results(N, K, parts)
    if rows >= N:
        return _total(_over_parts_of_tokens(dy, x), parts, out)
    out = _PRODUCT.take(N, K, x) if out is None else out
    for of_dy, of_out in zip(dy.split(rows, 1), out.split(rows), strict=True):
        _total(_over_parts_of_tokens(of_dy, x), parts, of_out)
    return out


def rows_at_once(a: Tensor, K: int, N: int) -> int:
    """How many rows of b a product a [M, K] @ b [K, N] takes at once: a caller that gathers b may gather parts."""
    return min(K, MOST_TERMS) if _suits(a.shape[0], K, N, a) else max(K, 1)


def padded(size: int) -> int:
    """A size rounded up to a multiple of an eighth of the power of 2 below it, and of `GRAIN`."""
    grain = _grain(size)
    return -(-size // grain) * grain


def _grain(size: int) -> int:
    return max(GRAIN, 1 << size.bit_length() >> 4)


# ---- oneDNN


def by_onednn(x: Tensor) -> bool:
    """Whether large products with x go to oneDNN.

    They do where that is faster on this machine (`faster`). `FASTMASK_PRODUCTS=torch` or `=onednn` in the environment
    decides otherwise, as it was when first asked.
    """
    return x.dtype == torch.float32 and x.is_cpu and bool(torch.backends.mkldnn.enabled) and _chosen()


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
    return held_back and faster(lambda a, w: a @ w.t(), lambda a, w: _linear(a, w, None))


def _works() -> bool:
    """Whether the operator, which PyTorch's compiler uses but does not document, is there and does what is expected."""
    a, b, bias = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2), torch.ones(2)
    try:
        return torch.equal(_linear(a, b.t(), bias), a @ b + 1)
    except (AttributeError, RuntimeError):
        return False


def _linear(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a [M, K] by the transpose of w [N, K]; gaps between the rows (or columns) of w make it very slow."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, w, bias, "none", [], "")
    return y


def _suits(M: int, K: int, N: int, like: Tensor) -> bool:
    return M * K * N >= LEAST_MULTIPLICATIONS and min(M, N) >= LEAST_SIDE and by_onednn(like)


def _parts(a: Tensor, b: Tensor | Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The rows of b in parts for oneDNN; None if the product is not for it."""
    if not isinstance(b, Tensor):
        return b
    K, N = b.shape
    if not _suits(a.shape[0], K, N, a):
        return None
    return [b] if K <= MOST_TERMS else b.split(MOST_TERMS)


def _rows_of_results(rows: int, columns: int, parts: int) -> int:
    """How many rows of a result to sum up at once.

    Each part of one from 32 MB on would be written to memory fresh from the kernel (glibc keeps no larger blocks), and
    read from there again. Smaller pieces stay in the cache; but for each of them oneDNN lays out the other matrix anew.
    """
    if parts == 1 or rows * columns < LARGE_RESULT:
        return max(rows, 1)
    piece = max(PIECE_OF_RESULT // columns, 4 * GRAIN)
    return piece - piece % _grain(piece)


def _columns(a: Tensor, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The columns of a [M, K] that belong to each part, one after the other in the same memory; `padded` rows."""
    M, K = a.shape
    rows, first = padded(M), 0
    for part in parts:
        last = first + part.shape[0]
        if rows == M and last - first == K and a.is_contiguous():
            yield a
        else:
            memory = _LEFT.take(rows, last - first, a)
            _top(memory, M).copy_(a[:, first:last])
            yield memory
        first = last


def _by_parts(a: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Iterator[Tensor]:
    """The products [M, N] that add up to a @ b (+ bias); the bias is in the first."""
    for number, (of_a, of_b) in enumerate(zip(_columns(a, parts), parts, strict=True)):
        yield _top(_linear(of_a, _as_weight(of_b), None if number else bias), a.shape[0])


def _over_parts_of_tokens(dy: Tensor, x: Tensor) -> Iterator[Tensor]:
    """The products [N, K] that add up to that of all tokens."""
    N, K = dy.shape[1], x.shape[1]
    for of_dy, of_x in zip(dy.split(MOST_TERMS), x.split(MOST_TERMS), strict=True):
        tokens = of_dy.shape[0]
        # Transposed here, not by oneDNN, so that it can be padded.
        left, right = _LEFT.take(padded(N), padded(tokens), dy), of_x
        if left.shape == (N, tokens):
            left.copy_(of_dy.t())
        else:
            left[:N, :tokens].copy_(of_dy.t())
        if left.shape[1] > tokens:
            left[:N, tokens:] = 0
            right = _RIGHT.take(left.shape[1], K, x)
            right[:tokens].copy_(of_x)
            right[tokens:] = 0
        yield _top(_linear(left, _as_weight(right), None), N)


def _total(parts: Iterator[Tensor], count: int, out: Tensor | None) -> Tensor:
    """The sum of so many products, in the memory of the first or in `out`."""
    y = next(parts)
    if count == 1:
        return y if out is None else out.copy_(y)
    for number, part in enumerate(parts, 2):
        y = torch.add(y, part, out=out if number == count and out is not None else y)
    return y


def _top(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else x[:rows]


def _as_weight(b: Tensor) -> Tensor:
    """The transpose of b, as `_linear` takes it: its rows or its columns one after the other, without gaps."""
    w = b.t()
    if w.is_contiguous() or b.is_contiguous():
        return w
    return w.contiguous() if w.stride(1) == 1 else b.contiguous().t()
