"""Every block size that is shipped for the row kernels, launched on this machine's chip, whether or not it is chosen.

Sums of whole numbers are exact, so results are float64's, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastmask_kernels.chips import chip_of
from fastmask_kernels.configs import ROW_MATMUL, ROW_MATMUL_T, ROW_OWNED_GRAD, ROW_TURN_GRAD, Config
from fastmask_kernels.interpreter import interpreting
from fastmask_kernels.naive import naive_row_matmul, naive_row_matmul_t, naive_row_weight_grad
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from kernel_oracle import DEVICE, launches_kernels
from row_samples import Sample, nan_from_empty, sample  # noqa: F401 (a fixture)
from torch import Tensor

pytestmark = launches_kernels

HALF = torch.float16 if interpreting() else torch.bfloat16
DTYPES = {  # of activations, of the weight, by the kind of a table
    "half": (HALF, HALF),
    "master": (HALF, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "ieee": (torch.float32, torch.float32),
}
TABLES = {"matmul": ROW_MATMUL, "matmul_t": ROW_MATMUL_T, "owned_grad": ROW_OWNED_GRAD, "turn_grad": ROW_TURN_GRAD}


def shipped() -> Iterator[object]:
    """(kernel, kind, config, columns) of this machine's chip; edges in half precision only, as they are shared."""
    chip = chip_of(torch.device(DEVICE))
    for name, table in TABLES.items():
        for (own, kind), configs in table.items():
            for config in configs if own == chip else ():
                sizes = "x".join(str(size) for block, size in config.blocks if block != "GROUP")
                for what, columns in (("even", 256), ("edges", 48)):
                    if kind == "half" or what == "even":
                        case = f"{name}-{kind}-{sizes}-{config.num_stages}-{what}"
                        yield pytest.param(name, kind, config, columns, id=case)


def exact(name: str, result: Tensor, truth: Tensor) -> None:
    assert torch.equal(result, truth.to(result.dtype)), name


@pytest.mark.parametrize(("name", "kind", "config", "columns"), shipped())
def test_every_shipped_config(name: str, kind: str, config: Config, columns: int) -> None:
    """Every config that is shipped is right, at edges and without them."""
    act, own = DTYPES[kind]
    rows, unit = ([128, 256], 128) if columns == 48 else ([256], 128)
    ids = [1, -1, 0, 2] if columns == 48 else [2, 0]
    s = sample(ids, 37, 3, rows, columns, dtype=act, weight_dtype=own, whole=True, unit=unit, spare=0)
    CHECKS[name](s, config, kind == "tf32")


def check_matmul(s: Sample, config: Config, tf32: bool) -> None:
    ys = row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, s.biases, config=config, allow_tf32=tf32)
    for y, weight, bias, index, counts, width in zip(ys, s.weights, s.biases, *s.masks, s.widths, strict=True):
        mask = index, counts, s.languages, width
        exact("y", y, naive_row_matmul(s.x.double(), weight.double(), *mask, bias.double()))


def check_matmul_t(s: Sample, config: Config, tf32: bool) -> None:
    dx = row_matmul_t(s.packed, s.weights, *s.masks, s.plan, s.bias, config=config, allow_tf32=tf32)
    truth = s.bias.double().expand(dx.shape)
    for x, weight, index, counts in zip(s.packed, s.weights, *s.masks, strict=True):
        truth = truth + naive_row_matmul_t(x.double(), weight.double(), index, counts, s.languages)
    exact("dx", dx, truth)


def check_grad(s: Sample, config: Config, tf32: bool, unit: int) -> None:
    n_rows = [weight.shape[0] for weight in s.weights]
    options = {"weight_dtype": s.weights[0].dtype, "units": [unit] * len(n_rows), "config": config}
    dWs, dbs = row_weight_grad(s.packed, s.x, *s.masks, s.plan, n_rows, with_bias=True, allow_tf32=tf32, **options)
    assert dbs is not None
    for dW, db, dy, index, counts, n in zip(dWs, dbs, s.packed, *s.masks, n_rows, strict=True):
        truth_w, truth_b = naive_row_weight_grad(dy.double(), s.x.double(), index, counts, s.languages, n)
        exact("dW", dW, truth_w)
        exact("db", db, truth_b)


CHECKS = {
    "matmul": check_matmul,
    "matmul_t": check_matmul_t,
    "owned_grad": lambda *given: check_grad(*given, 128),
    "turn_grad": lambda *given: check_grad(*given, 1),
}
