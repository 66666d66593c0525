"""Whether oneDNN multiplies float32 matrices faster than MKL on this machine: measured once, then remembered.

No name of a processor answers it: oneDNN takes half of MKL's time on one AMD processor with AVX-512, and 1.1 times its
time on another. A run that is resumed must multiply as it did before, to end with the same bits, so the answer is
kept on disk, and the first process that finds it out decides for all.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastmask.files import FileError, Record, partial_name, read_json
from fastmask.processor import cpu_fields

__all__ = ["GAIN", "answer_file", "faster"]

GAIN = 1.15  # how much faster it must be, for each of the sizes: less does not pay for what it needs around it
SIZES = ((144, 384, 768), (512, 768, 768), (1024, 768, 1536))  # tokens x in x out, of encoders at half density
ROUNDS = 9

Product = Callable[[Tensor, Tensor], Tensor]


class Answer(Record):
    """What was measured: how much faster oneDNN is than MKL, for each of `SIZES`."""

    gains: list[float]


def answer_file() -> Path:
    """Where the answer for this processor and this PyTorch is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastmask")
    described = "".join(c if c.isalnum() else "-" for c in f"{_processor()}-{torch.__version__}")
    return folder / f"products-{described}.json"


def faster(mkl: Product, onednn: Product) -> bool:
    """Whether `onednn` is to multiply in place of `mkl`: a [M, K] by the transpose of w [N, K]."""
    path = answer_file()
    gains: list[float] | None = _remembered(path)
    if gains is None:
        # One thread: several wait for one another, and on a busy machine that is all that would be measured.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            gains = [_gain(mkl, onednn, *size) for size in SIZES]
        finally:
            torch.set_num_threads(threads)
        _remember(path, gains)
        gains = _remembered(path) or gains  # another process may have been first
    return min(gains) >= GAIN


def _gain(mkl: Product, onednn: Product, M: int, K: int, N: int) -> float:
    """The time of `mkl` over that of `onednn`, each the least of some: what else runs only ever adds to it."""
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(rows, K, generator=generator) for rows in (M, N))
    least = [math.inf, math.inf]
    for number in range(ROUNDS + 1):
        for i, product in enumerate((mkl, onednn)):
            began = time.perf_counter()
            product(a, w)
            if number:  # the first one compiles
                least[i] = min(least[i], time.perf_counter() - began)
    return least[0] / least[1]


def _remembered(path: Path) -> list[float] | None:
    try:
        answer: Answer = read_json(path, Answer)
    except (OSError, FileError):
        return None
    return answer.gains if len(answer.gains) == len(SIZES) and min(answer.gains) > 0 else None


def _remember(path: Path, gains: list[float]) -> None:
    """Keep the answer, unless there is one; where nothing can be written, each process finds out for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        partial.write_text(Answer(gains=gains).model_dump_json(), encoding="utf-8")
        try:
            if _remembered(path) is None:
                path.unlink(missing_ok=True)  # damaged
            os.link(partial, path)  # fails where there is one, and the file is whole as soon as it is there
        finally:
            partial.unlink(missing_ok=True)
    except OSError:
        return


def _processor() -> str:
    """The processor's name."""
    wanted, known = ("vendor_id", "cpu family", "model", "model name", "stepping"), cpu_fields()
    return "-".join(known[name] for name in wanted if name in known) or platform.processor() or platform.machine()
