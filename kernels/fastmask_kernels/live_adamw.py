"""One launch that takes the step of AdamW on the live part of many parameters, and reads and writes nothing else.

Which weights are live is said by cells, which live or die as one: rows (1, K), columns (N, unit), blocks (bn, bk), or
single weights (1, 1); a bit for each. All arithmetic is in float32. The bias correction comes from step counters on the
GPU, so nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import runs_on
from fastmask_kernels.launching import launch

__all__ = ["DTYPES", "Job", "live_adamw"]

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
CONFIG = Config((("BN", 4), ("BK", 512)), num_warps=8, num_stages=1)
FIELDS = tl.constexpr(13)  # of a job in the table


class Job(NamedTuple):
    """One parameter's step.

    Attributes:
        parameter, gradient, exp_avg, exp_avg_sq: contiguous, of one shape, [N, K] or [N], and one dtype of `DTYPES`.
        step: float32 [], the number of this step, on the device of the parameter.
        words: which cells live, int32 [N / bn, ceil(K / bk / 32)]: bit c % 32 of word c // 32 is cell c of a line.
        cell: (bn, bk), size of a cell. [N] counts as [N, 1].
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    words: Tensor
    cell: tuple[int, int]


# One program steps a piece of BN x BK weights of one parameter. Grid: the pieces of all parameters.
# VECTOR neighbours, from multiples of VECTOR on, live or die together: they are moved by one instruction.
@triton.jit
def live_adamw_kernel(
    table, job_of, lr, decay, new1, beta2, new2, log1_high, log1_low, log2_high, log2_low, eps, sign,
    LR_ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    ALIGNED: tl.constexpr = 16 if VECTOR > 1 else 1
    job = table + tl.load(job_of + tl.program_id(0)) * FIELDS
    parameter = tl.multiple_of(tl.load(job).to(tl.pointer_type(DTYPE)), ALIGNED)
    gradient = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(DTYPE)), ALIGNED)
    exp_avg = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(DTYPE)), ALIGNED)
    exp_avg_sq = tl.multiple_of(tl.load(job + 3).to(tl.pointer_type(DTYPE)), ALIGNED)
    step = tl.load(tl.load(job + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    words = tl.load(job + 5).to(tl.pointer_type(tl.int32))
    N, K = tl.load(job + 6).to(tl.int32), tl.load(job + 7).to(tl.int32)
    bn, bk = tl.load(job + 8).to(tl.int32), tl.load(job + 9).to(tl.int32)
    line, across = tl.load(job + 10), tl.load(job + 11).to(tl.int32)  # words of a line of cells, pieces of a row
    piece = tl.program_id(0) - tl.load(job + 12).to(tl.int32)

    n = piece // across * BN + tl.arange(0, BN)
    k = piece % across * BK + tl.arange(0, BK // VECTOR) * VECTOR
    cell = k // bk
    inside = (n < N)[:, None] & (k < K)[None, :]
    word = tl.load(words + (n // bn)[:, None] * line + (cell // 32)[None, :], mask=inside, other=0)
    live = (word >> (cell % 32)[None, :]) & 1
    live = tl.broadcast_to((live != 0)[:, :, None], (BN, BK // VECTOR, VECTOR))
    first = n.to(tl.int64)[:, None] * tl.multiple_of(K, VECTOR) + k[None, :]
    at = first[:, :, None] + tl.arange(0, VECTOR)[None, None, :]

    p = tl.load(parameter + at, mask=live, other=0).to(tl.float32)
    g = tl.load(gradient + at, mask=live, other=0).to(tl.float32) * sign
    m = tl.load(exp_avg + at, mask=live, other=0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=live, other=0).to(tl.float32)
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
    # 1 - beta^step is the difference of close numbers: float64.
    bias1 = (1 - tl.exp(step * log1_high + step * log1_low)).to(tl.float32)
    bias2 = (1 - tl.exp(step * log2_high + step * log2_low)).to(tl.float32)
    size, root = lr / bias1, tl.sqrt(bias2)
    m += new1 * (g - m)
    v = beta2 * v + new2 * (g * g)
    p -= lr * decay * p
    p -= size * m / (tl.sqrt(v) / root + eps)
    tl.store(parameter + at, p.to(DTYPE), mask=live)
    tl.store(exp_avg + at, m.to(DTYPE), mask=live)
    tl.store(exp_avg_sq + at, v.to(DTYPE), mask=live)


def live_adamw(
    jobs: Sequence[Job], *, lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    maximize: bool = False, config: Config = CONFIG,
) -> None:  # fmt: skip
    """Take a step of AdamW (Loshchilov and Hutter 2019) on what is live of each parameter, and of its moments.

    Args:
        jobs: the parameters; one launch for all of one device, dtype and alignment.
        lr: a number, or a tensor of one number on the device of the parameters.
        beta1: like all that follows, as in `torch.optim.AdamW`.
        beta2: of the squares.
        eps: added to the denominator.
        weight_decay: times the learning rate, what a weight loses in a step.
        maximize: whether to climb.
        config: block sizes BN and BK.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit each other.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[Job]] = {}
    for job in jobs:
        _check(job)
        groups.setdefault((job.parameter.device, job.parameter.dtype, _vector(job)), []).append(job)
    logs = [part for beta in (beta1, beta2) for part in _in_two(math.log(max(beta, 1e-30)))]
    for (device, dtype, vector), group in groups.items():
        numbers, job_of = _table(group, device, (dtype, vector), config)
        rate = lr.to(device, torch.float32) if isinstance(lr, Tensor) else lr
        launch(
            live_adamw_kernel, (len(job_of),), numbers,
            numbers, job_of, rate, weight_decay, 1 - beta1, beta2, 1 - beta2, *logs, eps, -1.0 if maximize else 1.0,
            LR_ON_DEVICE=isinstance(rate, Tensor), DTYPE=DTYPES[dtype], VECTOR=vector,
            **config.options,
        )  # fmt: skip


_tables: dict[Hashable, tuple[Tensor, Tensor]] = {}
_MOST_TABLES = 16  # gradients lie where they lay in the last step, if the same weights live


def _table(jobs: list[Job], device: torch.device, kind: Hashable, config: Config) -> tuple[Tensor, Tensor]:
    """What the kernel reads of each job, int64 [jobs, FIELDS], and the job of each program; kept for the next step."""
    rows, pieces, counts = [], 0, []
    for job in jobs:
        (N, K), (bn, bk) = _shape(job.parameter), job.cell
        across = triton.cdiv(K, config["BK"])
        pointers = [tensor.data_ptr() for tensor in job[:6]]
        rows.append((*pointers, N, K, bn, min(bk, K), job.words.shape[1], across, pieces))
        counts.append(across * triton.cdiv(N, config["BN"]))
        pieces += counts[-1]
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0  # another's may not be written yet
    key = (device, stream, kind, config, *rows)
    found = _tables.get(key)
    # What a CUDA graph makes lies in its own memory, and what is kept may go before the graph does.
    captured = on_gpu and torch.cuda.is_current_stream_capturing()
    if found is None or captured:
        numbers, each = torch.tensor(rows, device="cpu"), torch.tensor(counts, device="cpu")
        job_of = torch.repeat_interleave(each, output_size=pieces)
        if on_gpu:  # from pinned memory nothing waits for the copy
            numbers, job_of = numbers.pin_memory(), job_of.pin_memory()
        found = numbers.to(device, non_blocking=True), job_of.to(device, non_blocking=True)
        if not captured:
            if len(_tables) >= _MOST_TABLES:
                _tables.pop(next(iter(_tables)))
            _tables[key] = found
    return found


def _shape(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter.shape[1] if parameter.ndim == 2 else 1


def _vector(job: Job) -> int:
    """How many weights are moved at once: those of 16 bytes, if all of them live or die together, or one."""
    size = 16 // job.parameter.itemsize
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in job[:4])
    K = _shape(job.parameter)[1]
    return size if aligned and K % size == 0 and min(job.cell[1], K) % size == 0 else 1


def _in_two(number: float) -> tuple[float, float]:
    """A float64 as the sum of two float32: a kernel takes no other."""
    high = float(torch.tensor(number, dtype=torch.float32, device="cpu"))
    return high, number - high


def _check(job: Job) -> None:
    p, (bn, bk) = job.parameter, job.cell
    if p.dtype not in DTYPES or p.ndim not in (1, 2):
        raise TypeError(f"expected a parameter [N, K] or [N] of 16 or 32 bits, given {p.dtype} {tuple(p.shape)}")
    for name, tensor in zip(job._fields[:4], job[:4], strict=True):
        if tensor.shape != p.shape or tensor.dtype != p.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {p.dtype} {tuple(p.shape)}, contiguous, given {tensor.dtype} {tuple(tensor.shape)}"
            )
    N, K = _shape(p)
    if N % bn or (p.ndim == 2 and K % bk):
        raise ValueError(f"cells of {bn} x {bk} do not divide a parameter of shape {tuple(p.shape)}")
    expected = (N // bn, triton.cdiv(K // min(bk, K), 32))
    if tuple(job.words.shape) != expected or job.words.dtype != torch.int32 or not job.words.is_contiguous():
        raise ValueError(f"words: expected int32 {expected}, given {job.words.dtype} {tuple(job.words.shape)}")
    if job.step.dtype != torch.float32 or job.step.numel() != 1:
        raise ValueError(f"step: expected one float32, given {job.step.dtype} {tuple(job.step.shape)}")
    if any(tensor.device != p.device for tensor in job[1:6]):
        raise ValueError(f"expected everything on the device of the parameter, {p.device}")
    if not runs_on(p.device):  # and with bfloat16 in the interpreter, whose faults are in `tl.dot` alone
        raise ValueError(f"Triton kernels run on a GPU, given a tensor on {p.device}")
