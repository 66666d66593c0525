"""What is measured once on a machine and kept on disk: how fast its products are, of one kind over another.

A run that is resumed must multiply as it did before, to end with the same bits. So the first process that finds an
answer decides for all; where nothing can be written, each finds out for itself.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmask.processor import cpu_fields

SIZES = ((144, 384, 768), (512, 768, 768), (1024, 768, 1536))  # tokens x in x out, of encoders at half density
ROUNDS, MOST_SECONDS = 20, 1.0  # of one size; where a product is slow, few rounds tell

Product = Callable[[Tensor, Tensor], Tensor]  # of a [M, K] and the transpose of w [N, K]


def answer_file(name: str) -> Path:
    """Where an answer is kept, for this processor and this PyTorch."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastmask")
    wanted, known = ("vendor_id", "cpu family", "model", "model name", "stepping"), cpu_fields()
    machine = "-".join(known[name] for name in wanted if name in known) or platform.processor() or platform.machine()
    described = "".join(c if c.isalnum() else "-" for c in f"{machine}-{torch.__version__}")
    return folder / f"{name}-{described}.json"


def gains(
    name: str, product: Product, other: Product, dtypes: Sequence[torch.dtype] = (torch.float32,) * 2
) -> list[float]:
    """The time of `product` over that of `other`, for each of `SIZES`, with operands of two dtypes: as first measured.

    name: of the answer.
    """
    path = answer_file(name)
    found = _remembered(path)
    if found is None:
        found = [_gain((product, other), dtypes, *size) for size in SIZES]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder, path.name)
                whole.write_text(json.dumps(found), encoding="utf-8")
                if _remembered(path) is None:
                    path.unlink(missing_ok=True)  # damaged
                os.link(whole, path)  # fails where there is one, and the file is whole as soon as it is there
        except OSError:
            found = _remembered(path) or found  # another process may have been first
    return found


def _remembered(path: Path) -> list[float] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, list) and len(found) == len(SIZES) and all(isinstance(gain, float) for gain in found)
    return found if whole else None


def _gain(products: Sequence[Product], dtypes: Sequence[torch.dtype], M: int, K: int, N: int) -> float:
    """The time of one product over that of another, each the least of some: what else runs only ever adds to it."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, K, generator=generator, device="cpu") for rows in (M, N)]
    operands = [[matrix.to(dtype) for matrix in drawn] for dtype in dtypes]
    started = time.perf_counter()
    least, threads = [math.inf, math.inf], torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another, and on a busy machine that is all that would be measured
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # which whoever asks first may be in
            for number in range(ROUNDS + 1):
                for i, product in enumerate(products):
                    began = time.perf_counter()
                    product(*operands[i])
                    if number:  # the first one compiles
                        least[i] = min(least[i], time.perf_counter() - began)
                if number and time.perf_counter() - started > MOST_SECONDS:
                    break
    finally:
        torch.set_num_threads(threads)
    return least[0] / least[1]
