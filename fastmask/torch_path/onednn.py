"""What products by oneDNN need: those in half precision, and large ones in float32 where it is faster than MKL.

PyTorch leaves float32 products on a CPU to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which
PyTorch takes for half precision, asks what a processor can do: with AVX-512 on an AMD Zen 5 it is twice as fast, on a
Zen 4 it is not. No name of a processor tells, so it is measured once. Two things have to be seen to:

- It compiles code for every new shape, which takes 2 to 8 ms where a small product takes 0.1, and keeps that of the
  last 1024. Batches of sentences hardly ever repeat a shape. So sizes are rounded up to the few of `padded`, and what
  is too much is left out of the result.
- In float32 it adds up all K terms of an element one after the other, whose rounding errors grow to three times those
  of MKL. So it is given at most `MOST_TERMS` terms at a time, and the parts are added: the errors are then about those
  of MKL.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from fastmask.torch_path.measured import gains
from fastmask.torch_path.scratch import LEFT, ROWS, gather

HALF = (torch.bfloat16, torch.float16)
MOST_TERMS = 256
MOST_ROWS = 1024  # of a result at once: the parts of larger ones would leave the cache before they are added
LEAST_MULTIPLICATIONS = 2**20  # below it the 10 us that a call of oneDNN takes are more than it saves
LEAST_SIDE = 16  # of a result: thinner ones are not what its kernels are made for
GRAIN = 32

GAIN = 1.15  # how much faster it must be, for all that is measured: less does not pay for what it needs around it


def by_onednn(x: Tensor) -> bool:
    """Whether large products with x go to oneDNN.

    They do where that is faster on this machine. `FASTMASK_PRODUCTS=torch` or `=onednn` in the environment decides
    otherwise, as it was when first asked.
    """
    return _chosen() and x.dtype == torch.float32 and x.is_cpu and bool(torch.backends.mkldnn.enabled)


def compiles(x: Tensor) -> bool:
    """Whether PyTorch's own products with x are oneDNN's, which compiles code for each new shape."""
    return x.dtype in HALF and x.is_cpu and bool(torch.backends.mkldnn.enabled)


def suits(M: int, N: int, K: int) -> bool:
    """Whether a product [M, N] of K terms is worth a call."""
    return M * K * N >= LEAST_MULTIPLICATIONS and min(M, N) >= LEAST_SIDE


def padded(size: int) -> int:
    """A size rounded up to a multiple of an eighth of the power of 2 below it, and of `GRAIN`."""
    grain = max(GRAIN, 1 << size.bit_length() >> 4)
    return -(-size // grain) * grain


def linear(a: Tensor, w: Tensor) -> Tensor:
    """Multiply a [M, K] by the transpose of w [N, K]; gaps between the rows (or columns) of w make it very slow."""
    return torch.ops.mkldnn._linear_pointwise.default(a, w, None, "none", [], "")


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
    return held_back and min(gains("products", lambda a, w: a @ w.t(), linear)) >= GAIN


def _works() -> bool:
    """Whether the operator, which PyTorch's compiler uses but does not document, is there and does what is expected."""
    a, b = torch.arange(12.0, device="cpu").view(3, 4), torch.arange(8.0, device="cpu").view(4, 2)
    try:
        return torch.equal(linear(a, b.t()), a @ b)
    except (AttributeError, RuntimeError):
        return False


# ---- products, and what they need around them


def product(a: Tensor, w: Tensor, index: Tensor | None, out: Tensor, transposed: bool, add: bool) -> None:
    """One language's part of `gemm.products`: with rows `index` of w [size, S], or with all."""
    if not suits(out.shape[0], out.shape[1], a.shape[1]):
        right = gather(w, index).t() if transposed else gather(w, index)
        out.addmm_(a, right) if add else torch.mm(a, right, out=out)
        return
    for first in range(0, a.shape[1], MOST_TERMS):
        part = slice(first, first + MOST_TERMS)
        if not transposed:
            right = (w[part] if index is None else gather(w, index[part])).t()
        elif index is None:
            right = w[:, part]
        else:  # anything finite behind the rows, so that there is one of few numbers of them
            behind = padded(index.shape[0]) - index.shape[0]
            right = gather(w[:, part], torch.nn.functional.pad(index, (0, behind)))
        _add(out, a[:, part], right, add or first > 0)


def outer(a: Tensor, c: Tensor, out: Tensor) -> None:
    """Write the transpose of a [M, n] times c [M, S] into out [n, S]."""
    n, S = out.shape
    for number, (of_a, of_c) in enumerate(zip(a.split(MOST_TERMS), c.split(MOST_TERMS), strict=True)):
        tokens = of_a.shape[0]
        left, right = LEFT.take(padded(n), padded(tokens), a), of_c
        left[:n, :tokens].copy_(of_a.t())
        if left.shape[1] > tokens:
            left[:, tokens:] = 0
            right = ROWS.take(left.shape[1], S, c)
            right[:tokens].copy_(of_c)
            right[tokens:] = 0
        _put(out, linear(left, _without_gaps(right.t())), add=number > 0)


def _add(out: Tensor, a: Tensor, w: Tensor, add: bool) -> None:
    """Write or add the products of a [M, K] with rows of w [N or more, K] into out [M, N]."""
    w = _without_gaps(w)
    for of_out, of_a in zip(out.split(MOST_ROWS), a.split(MOST_ROWS), strict=True):
        M, K = of_a.shape
        if padded(M) > M or not of_a.is_contiguous():  # anything behind its rows, so that M is one of few
            left = LEFT.take(padded(M), K, of_a)
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
