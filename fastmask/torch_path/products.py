"""Matrix products: by MKL, as PyTorch does them, or by oneDNN where that is faster.

PyTorch leaves float32 products on a CPU to MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which
PyTorch brings along for half precision, asks what a processor can do: with AVX-512 on an AMD Zen 5 it is twice as fast.
It adds up all K terms of an element one after the other, whose rounding errors grow to three times those of MKL. So it
is given at most `MOST_TERMS` terms at a time here, and the parts are added: the errors are then about those of MKL,
for 5 to 8% of the time.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastmask.torch_path.scratch import Scratch

__all__ = ["add_multiply", "by_onednn", "multiply", "rows_at_once", "temporary_product"]

MOST_TERMS = 256
LEAST_MULTIPLICATIONS = 2**20  # below it the 10 us that a call of oneDNN takes are more than it saves
LEAST_SIDE = 16  # of a result: thinner ones are not what its kernels are made for

_PRODUCT = Scratch()


def multiply(a: Tensor, b: Tensor | Sequence[Tensor], bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return a [M, K] @ b [K, N] (+ bias [N]), [M, N], written into `out` if given.

    b may come in the parts [k, N] of its rows that `rows_at_once` says, which spares splitting it here.
    """
    parts = _parts(a, b)
    if parts is None:
        assert isinstance(b, Tensor)
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    y = _linear(*parts[0], bias)
    for part in parts[1:-1]:
        y += _linear(*part, None)
    if len(parts) > 1:
        return torch.add(y, _linear(*parts[-1], None), out=y if out is None else out)
    return y if out is None else out.copy_(y)


def add_multiply(out: Tensor, a: Tensor, b: Tensor | Sequence[Tensor]) -> None:
    """Add a [M, K] @ b [K, N] to `out` [M, N]; b as in `multiply`."""
    parts = _parts(a, b)
    if parts is None:
        assert isinstance(b, Tensor)
        out.addmm_(a, b)
        return
    for part in parts:
        out += _linear(*part, None)


def temporary_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a [M, K] @ b [K, N] in memory that the next call may overwrite."""
    return multiply(a, b) if _suits(a, *b.shape) else torch.mm(a, b, out=_PRODUCT.take(a.shape[0], b.shape[1], a))


def rows_at_once(a: Tensor, K: int, N: int) -> int:
    """How many rows of b a product a [M, K] @ b [K, N] takes at once: a caller that gathers b may gather parts."""
    return _share(K) if _suits(a, K, N) else max(K, 1)


# ---- oneDNN


def by_onednn(x: Tensor) -> bool:
    """Whether large products with x go to oneDNN.

    `FASTMASK_PRODUCTS=torch` or `=onednn` in the environment decides; else they do where PyTorch would use MKL and MKL
    would not use the processor's AVX-512.
    """
    if x.dtype != torch.float32 or not x.is_cpu or not torch.backends.mkldnn.enabled:
        return False
    return _chosen(os.environ.get("FASTMASK_PRODUCTS", ""))


@cache
def _chosen(asked: str) -> bool:
    if asked not in ("", "torch", "onednn"):
        raise ValueError(f"FASTMASK_PRODUCTS is {asked!r}; expected torch or onednn")
    if asked == "torch" or not (torch.backends.mkldnn.is_available() and _works()):
        return False
    held_back = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return asked == "onednn" or (held_back and not _made_by_intel())


def _works() -> bool:
    """Whether the operator, which PyTorch's compiler uses but does not document, is there and does what is expected."""
    a, b, bias = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2), torch.ones(2)
    try:
        return torch.equal(_linear(a, b.t(), bias), a @ b + 1)
    except (AttributeError, RuntimeError):
        return False


def _made_by_intel() -> bool:
    info = Path("/proc/cpuinfo")
    described = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else platform.processor()
    return "GenuineIntel" in described


def _linear(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a [M, K] by the transpose of w [N, K]; gaps between the rows (or columns) of w make it very slow."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, w, bias, "none", [], "")
    return y


def _suits(a: Tensor, K: int, N: int) -> bool:
    M = a.shape[0]
    return M * K * N >= LEAST_MULTIPLICATIONS and min(M, N) >= LEAST_SIDE and by_onednn(a)


def _share(K: int) -> int:
    """K terms in equal shares of at most `MOST_TERMS`."""
    steps = -(-K // MOST_TERMS)
    return K if steps == 1 else -(-K // (steps * LEAST_SIDE)) * LEAST_SIDE


def _parts(a: Tensor, b: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
    """Pairs [M, k] and [N, k] for oneDNN whose products add up to a @ b; None if the product is not for oneDNN."""
    if isinstance(b, Tensor):
        K = b.shape[0]
        if not _suits(a, *b.shape):
            return None
        k = _share(K)
        b = [b] if k == K else b.split(k)
    if len(b) == 1:
        return [(a, _whole(b[0]).t())]
    return [(of_a, _whole(of_b).t()) for of_a, of_b in zip(a.split([len(part) for part in b], 1), b, strict=True)]


def _whole(b: Tensor) -> Tensor:
    """The matrix without gaps, its rows or its columns one after the other."""
    if b.is_contiguous() or b.t().is_contiguous():
        return b
    return b.contiguous() if b.stride(1) == 1 else b.t().contiguous().t()
