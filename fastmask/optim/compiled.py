"""The AdamW step of many parameters as one compiled pass over memory, which skips what is dead; CPU, float32/float64.

A step moves 28 bytes for each float32 weight and computes little, so memory traffic is all that counts. Plain PyTorch
would have to gather the live part of four tensors and to scatter three of them back, which moves more than it saves.
Here 16 neighbouring weights at a time are read, updated, and written back where their bits are set.

What is skipped: dead rows, and gaps of 256 weights in a row. A processor fetches ahead what follows in memory, dead or
not, and is slow to start anew behind a gap, so rows ask for the next live row while they are worked on, and shorter
gaps are not worth it. Masks over single columns touch every cache line all the same: their traffic is that of the
whole parameter.

`numba` compiles it, in about a second, once in a process. The threads are those of PyTorch's own OpenMP pool: a second
pool would compete with PyTorch's threads, which keep spinning for milliseconds after a backward pass. Where PyTorch
runs without GNU-compatible OpenMP, one thread does it all.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmask.optim.live import Live

__all__ = ["DTYPES", "Update", "fits", "installed", "update_all"]

DTYPES = (torch.float32, torch.float64)
CHUNK = 1 << 18  # weights that a thread takes at a time


class Update(NamedTuple):
    """One parameter's step; all tensors contiguous and on the CPU, of one dtype and shape but for `step`.

    Attributes:
        step: float32 [], the steps that the parameter has taken; one more afterwards.
        live: None for the whole parameter.
        options: (lr, beta1, beta2, eps, weight_decay, 1 to maximize or 0).
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    live: Live | None
    options: tuple[float, ...]


def fits(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether `update_all` can take them."""
    return (
        parameter.dtype in DTYPES
        and parameter.is_cpu
        and gradient.dtype == parameter.dtype
        and parameter.is_contiguous()
        and gradient.is_contiguous()
        and exp_avg.is_contiguous()
        and exp_avg_sq.is_contiguous()
    )


@cache
def installed() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


# Of a job: addresses of p, g, m, v and of the step; which options; address of the flags, kind, N, K, rows that share a
# line of bits, rows of a chunk. A parameter that is live as a whole counts as one row.
FIELDS = 12
WHOLE, ROWS, WORDS = 0, 1, 2
FACTORS = 8  # numbers that `vector_code.lanes` takes
GAP = 16  # times 16 weights: shorter gaps in a row cost more to jump over than to rewrite as they are


def update_all(updates: list[Update]) -> None:
    """Take the step of every parameter; they are all of one dtype of `DTYPES`."""
    table: list[int] = []
    first_chunk = [0]
    options: dict[tuple[float, ...], int] = {}
    for p, g, m, v, step, live, choice in updates:
        kind, N, K, sharing, tall, flags = WHOLE, 1, p.numel(), 1, 1, 0
        chunks = -(-K // CHUNK)
        if live is not None:
            N, K = live.shape
            tall = max(1, CHUNK // K)
            chunks = -(-N // tall)
            if live.rows is not None:
                kind, flags = ROWS, live.rows.data_ptr()
            elif live.words is not None:
                kind, flags, sharing = WORDS, live.words.data_ptr(), N // len(live.words)
        table += (
            p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), step.data_ptr(),
            options.setdefault(choice, len(options)), flags, kind, N, K, sharing, tall,
        )  # fmt: skip
        first_chunk.append(first_chunk[-1] + chunks)
    arrays = (
        np.zeros(1, np.int64),  # the next chunk
        np.array(first_chunk, np.int64),
        np.array(table, np.int64),
        np.array(list(options), np.float64),
        np.empty((len(updates), FACTORS), np.float64),
    )
    call = np.array([len(updates), *(array.ctypes.data for array in arrays)], np.int64)
    prepare, move = _code_for(updates[0].parameter.dtype)
    prepare(call.ctypes.data)
    _in_threads(move.address, call.ctypes.data, torch.get_num_threads())


# ---- threads


def _in_threads(function: int, argument: int, threads: int) -> None:
    """Call a compiled function of one address, once in each of `threads` threads."""
    parallel = _openmp() if threads > 1 else None
    if parallel is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
    else:
        parallel(function, argument, threads, 0)


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP that PyTorch has loaded, globally.

    GNU's runtime and LLVM's have it.
    """
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime, or Windows, which has no global names
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    found: Callable[[int, int, int, int], None] = parallel
    return found


# ---- what is compiled


@cache
def _code_for(dtype: torch.dtype) -> tuple[Any, Any]:
    """Two compiled functions of the address of `call`: one that counts the steps, and one that takes them.

    The second is for any number of threads at once: each takes the next chunk until none is left. Both know addresses
    only: an array for each tensor would cost more to prepare than small parameters take.
    """
    import numba
    from numba import types

    from fastmask.optim import vector_code

    LANES = vector_code.LANES
    scalar = {torch.float32: types.float32, torch.float64: types.float64}[dtype]
    lanes, prefetch = vector_code.lanes(scalar), vector_code.prefetch(scalar)
    next_of, numbers = vector_code.fetch_and_add(), vector_code.pointer_to(types.int64)
    floats, doubles = vector_code.pointer_to(scalar), vector_code.pointer_to(types.float64)
    singles = vector_code.pointer_to(types.float32)
    bytes_at, halves = vector_code.pointer_to(types.uint8), vector_code.pointer_to(types.uint16)
    jit = numba.njit(nogil=True, error_model="numpy")

    @jit
    def one(p, g, m, v, at, f):  # type: ignore[no-untyped-def]
        """A single weight, as in `lanes`."""
        gradient = g[at] * f[0]
        m[at] += f[2] * (gradient - m[at])
        v[at] = f[3] * v[at] + f[4] * (gradient * gradient)
        p[at] = p[at] - f[1] * p[at] - f[5] * m[at] / (f[6] * np.sqrt(v[at]) + f[7])

    @jit
    def row(p, g, m, v, first, last, jump, f):  # type: ignore[no-untyped-def]
        """All weights from `first` to before `last`; those `jump` weights further on are prefetched, if it is not 0."""
        at = first
        while at + LANES <= last:
            if jump:
                prefetch(p, at + jump)
                prefetch(g, at + jump)
                prefetch(m, at + jump)
                prefetch(v, at + jump)
            lanes(p, g, m, v, at, np.int32(-1), *f)
            at += LANES
        while at < last:
            one(p, g, m, v, at, f)
            at += 1

    @jit
    def marked(p, g, m, v, first, K, bits, f):  # type: ignore[no-untyped-def]
        """Of K weights from `first` on those whose bit is set."""
        whole = K // LANES
        for begin in range(0, whole, GAP):
            end = min(begin + GAP, whole)
            any_bit = 0
            for c in range(begin, end):
                any_bit |= bits[c]
            if any_bit:
                for c in range(begin, end):
                    lanes(p, g, m, v, first + c * LANES, np.int32(bits[c]), *f)
        for k in range(whole * LANES, K):
            if bits[whole] >> (k % LANES) & 1:
                one(p, g, m, v, first + k, f)

    @jit
    def next_live(keep, n, end):  # type: ignore[no-untyped-def]
        while n < end and not keep[n]:
            n += 1
        return n

    @numba.cfunc(types.void(types.int64), error_model="numpy")
    def prepare(address):  # type: ignore[no-untyped-def]
        """Count the steps, and write the factors of each job."""
        call = numbers(address)
        jobs, options, factors = numbers(call[3]), doubles(call[4]), doubles(call[5])
        for job in range(call[0]):
            step = singles(jobs[job * FIELDS + 4])
            step[0] += 1
            o, f = jobs[job * FIELDS + 5] * 6, job * FACTORS
            lr, beta1, beta2, eps, decay = options[o], options[o + 1], options[o + 2], options[o + 3], options[o + 4]
            factors[f] = -1.0 if options[o + 5] else 1.0
            factors[f + 1] = lr * decay
            factors[f + 2] = 1 - beta1
            factors[f + 3] = beta2
            factors[f + 4] = 1 - beta2
            factors[f + 5] = lr / (1 - beta1 ** np.float64(step[0]))
            factors[f + 6] = (1 - beta2 ** np.float64(step[0])) ** -0.5
            factors[f + 7] = eps

    @numba.cfunc(types.void(types.int64), error_model="numpy")
    def move(address):  # type: ignore[no-untyped-def]
        """Take chunks of jobs until none is left."""
        call = numbers(address)
        counter, first_chunk, jobs, factors = numbers(call[1]), numbers(call[2]), numbers(call[3]), doubles(call[5])
        job = 0
        while True:
            chunk = next_of(counter)
            if chunk >= first_chunk[call[0]]:
                return
            while chunk >= first_chunk[job + 1]:  # a thread's chunks only grow
                job += 1
            at, t = job * FIELDS, job * FACTORS
            p, g, m, v = floats(jobs[at]), floats(jobs[at + 1]), floats(jobs[at + 2]), floats(jobs[at + 3])
            flags, kind, N, K = jobs[at + 6], jobs[at + 7], jobs[at + 8], jobs[at + 9]
            sharing, tall = jobs[at + 10], jobs[at + 11]
            f = (
                scalar(factors[t]), scalar(factors[t + 1]), scalar(factors[t + 2]), scalar(factors[t + 3]),
                scalar(factors[t + 4]), scalar(factors[t + 5]), scalar(factors[t + 6]), scalar(factors[t + 7]),
            )  # fmt: skip
            chunk -= first_chunk[job]
            first, last = chunk * tall, min((chunk + 1) * tall, N)
            if kind == WHOLE:
                row(p, g, m, v, chunk * CHUNK, min((chunk + 1) * CHUNK, K), 0, f)
            elif kind == ROWS:
                keep = bytes_at(flags)
                n = next_live(keep, first, last)
                while n < last:
                    following = next_live(keep, n + 1, N)
                    row(p, g, m, v, n * K, (n + 1) * K, (following - n) * K if following < N else 0, f)
                    n = following
            else:
                width = (K + 31) // 32 * 4
                for n in range(first, last):
                    marked(p, g, m, v, n * K, K, halves(flags + n // sharing * width), f)

    return prepare.ctypes, move
