"""The step of AdamW on live cells only, against AdamW written out in float64 and in the parameters' own dtype."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from covering import covering
from fastmask_kernels import live_adamw as live_adamw_module
from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import interpreting
from fastmask_kernels.live_adamw import Job, live_adamw
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, assert_close
from recorded_code import recorded
from torch import Tensor

SMALL = Config((("BN", 2), ("BK", 16)), num_warps=1, num_stages=1)
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class Sample:
    """A parameter whose dead cells hold NaN gradients, and which of its weights live."""

    job: Job
    keep: Tensor


def packed(cells: Tensor) -> Tensor:
    """Bits of flags [R, C], int32 [R, ceil(C / 32)]: bit c % 32 of word c // 32."""
    words = torch.zeros(len(cells), -(-cells.shape[1] // 32), dtype=torch.int64)
    for c in range(cells.shape[1]):
        words[:, c // 32] |= cells[:, c].long() << (c % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def sample(shape: tuple[int, ...], cell: tuple[int, int], dtype: torch.dtype, steps: int = 3, seed: int = 0) -> Sample:
    """Random numbers; `cell` divides `shape`, [N, K] or [N]."""
    generator = torch.Generator().manual_seed(seed)
    N, K = shape[0], shape[1] if len(shape) == 2 else 1
    bn, bk = cell[0], min(cell[1], K)
    cells = torch.rand(N // bn, K // bk, generator=generator) < 0.5
    keep = cells.repeat_interleave(bn, 0).repeat_interleave(bk, 1).view(shape)
    p, g, m = (torch.randn(shape, generator=generator) for _ in range(3))
    v = torch.rand(shape, generator=generator)
    tensors = [t.to(DEVICE, dtype) for t in (p, g.where(keep, torch.nan), m * 0.1, v)]
    step = torch.tensor(float(steps), device=DEVICE)
    return Sample(Job(*tensors, step, packed(cells).to(DEVICE), cell), keep.to(DEVICE))


def written_out(job: Job, maximize: bool = False, **options: float) -> list[Tensor]:
    """Parameter and moments after a step of AdamW on all weights, in the dtype of the job."""
    p, g, m, v = job[:4]
    o = OPTIONS | options
    t = float(job.step)
    g = -g if maximize else g
    m = o["beta1"] * m + (1 - o["beta1"]) * g
    v = o["beta2"] * v + (1 - o["beta2"]) * g * g
    scale = (v / (1 - o["beta2"] ** t)).sqrt() + o["eps"]
    return [p - o["lr"] * o["weight_decay"] * p - o["lr"] * (m / (1 - o["beta1"] ** t)) / scale, m, v]


def check(samples: list[Sample], config: Config | None = None, maximize: bool = False, **options: float) -> None:
    """One call for all; live weights close to AdamW, dead ones the same bits."""
    jobs = [s.job for s in samples]
    before = [[t.clone() for t in (j.parameter, j.exp_avg, j.exp_avg_sq)] for j in jobs]
    truth = [written_out(Job(*(t.double() for t in j[:4]), *j[4:]), maximize, **options) for j in jobs]
    plain = [written_out(j, maximize, **options) for j in jobs]
    chosen = {} if config is None else {"config": config}
    live_adamw(jobs, **(OPTIONS | options), maximize=maximize, **chosen)
    for s, old, exact, rounded in zip(samples, before, truth, plain, strict=True):
        for i, name in enumerate(("parameter", "exp_avg", "exp_avg_sq")):
            new = (s.job.parameter, s.job.exp_avg, s.job.exp_avg_sq)[i]
            assert_close(name, new[s.keep], exact[i][s.keep], rounded[i][s.keep])
            assert torch.equal(new[~s.keep], old[i][~s.keep])


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "rows": ((6, 40), (1, 40)),
    "rows, of whole vectors": ((6, 64), (1, 64)),
    "columns": ((5, 37), (5, 1)),
    "columns by the head": ((5, 96), (5, 16)),
    "blocks": ((12, 24), (4, 8)),
    "single weights": ((7, 70), (1, 1)),
    "a bias": ((37,), (1, 40)),
    "one weight": ((1, 1), (1, 1)),
}


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, DTYPES, whole=ON_GPU))
def test_every_kind_of_cell(shape: tuple, dtype: torch.dtype) -> None:
    """Live weights move as AdamW moves them, dead ones keep their bits, NaN or not."""
    check([sample(*shape, dtype)], SMALL)


def test_default_blocks() -> None:
    """The block sizes that are shipped step every weight of several pieces."""
    check([sample((9, 1100), (1, 1), torch.float32), sample((9, 1104), (1, 1104), torch.float32)])


def test_many_parameters_in_one_call() -> None:
    """Each parameter gets its own mask, step and sizes; dtypes and alignments may differ."""
    shapes = [*SHAPES.values(), *SHAPES.values()]
    check([sample(*shape, DTYPES[i % 2], steps=i + 1, seed=i) for i, shape in enumerate(shapes)], SMALL)


@pytest.mark.parametrize("steps", [1, 2, 1000, 100_000])
def test_bias_correction(steps: int) -> None:
    """The correction is right in the first step, where float32 would lose four digits of it, and after many."""
    check([sample((4, 32), (1, 32), torch.float32, steps)], SMALL)


def test_options() -> None:
    """Settings reach the kernel."""
    check(
        [sample((4, 32), (4, 1), torch.float32)], SMALL, maximize=True, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0
    )
    check([sample((4, 32), (4, 1), torch.float32)], SMALL, beta1=0.0)


def test_a_learning_rate_on_the_device() -> None:
    """A learning rate that is a tensor is read where it lies."""
    one, other = (sample((4, 32), (1, 32), torch.float32) for _ in range(2))
    live_adamw([one.job], **(OPTIONS | {"lr": torch.tensor(1e-2, device=DEVICE)}), config=SMALL)
    live_adamw([other.job], **OPTIONS, config=SMALL)
    assert torch.equal(one.job.parameter, other.job.parameter)


def test_memory_that_is_not_aligned() -> None:
    """Gradients in the middle of a bucket begin anywhere."""
    s = sample((4, 32), (1, 32), torch.float32)
    bucket = torch.empty(4 * 32 + 1, device=DEVICE)[1:].view(4, 32).copy_(s.job.gradient)
    check([Sample(s.job._replace(gradient=bucket), s.keep)], SMALL)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    cell=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 8, 33])),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_and_cell(rows: int, columns: int, cell: tuple[int, int], seed: int) -> None:
    """Sizes, cells and pieces that no list of cases has."""
    shape = (rows * cell[0], columns * cell[1])
    check([sample(shape, cell, torch.float32, seed=seed)], SMALL)


def test_wrong_use_is_named() -> None:
    """A wrong argument would become an access past a tensor's end."""
    job = sample((4, 32), (1, 32), torch.float32).job

    def refused(error: type[Exception], text: str, **changes: object) -> None:
        with pytest.raises(error, match=text):
            live_adamw([job._replace(**changes)], **OPTIONS)

    refused(TypeError, r"16 or 32 bits, given torch\.float64", parameter=job.parameter.double())
    refused(ValueError, r"gradient: expected torch\.float32 \(4, 32\)", gradient=job.gradient[:3])
    refused(ValueError, "exp_avg: .*contiguous", exp_avg=job.exp_avg.t().contiguous().t())
    refused(ValueError, "cells of 3 x 32 do not divide", cell=(3, 32))
    refused(ValueError, r"words: expected int32 \(4, 1\)", words=job.words[:3])
    refused(ValueError, "step: expected one float32", step=job.step.double())
    if not interpreting():
        refused(ValueError, "device of the parameter", step=job.step.cpu())


def test_a_step_like_the_last_makes_no_table() -> None:
    """Where tensors lie is written to the device once, not at every step; other addresses are other tables."""
    found = recorded("""
from fastmask_kernels.live_adamw import Job, live_adamw
tensors = [torch.empty(4, 32, device="meta") for _ in range(4)]
words = torch.empty(4, 1, dtype=torch.int32, device="meta")
job, counts = Job(*tensors, torch.empty((), device="meta"), words, (1, 32)), []
for jobs in ([job], [job], [job, job], [job]):
    with Recorder() as recorder:
        live_adamw(jobs, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    counts.append([len(recorder.launches), len(recorder.operations)])
print(json.dumps(counts))
""")
    assert found == [[1, 2], [1, 0], [1, 2], [1, 0]]


def test_other_addresses_are_another_table() -> None:
    """A gradient that lies elsewhere in the next step is found there; and only so many tables are kept."""
    for seed in range(20):
        check([sample((4, 32), (1, 32), torch.float32, seed=seed)], SMALL)
    assert len(live_adamw_module._tables) <= live_adamw_module._MOST_TABLES
