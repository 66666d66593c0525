"""Weight gradients of masks over whole heads, where one program owns a block of dW, against float64."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from fastmask_kernels import row_owned_grad
from fastmask_kernels.configs import Config
from fastmask_kernels.naive import naive_row_weight_grad
from fastmask_kernels.row_owned_grad import OwnedGrad, owned
from fastmask_kernels.row_turn_grad import TurnGrad
from fastmask_kernels.row_weight_grad import row_weight_grad
from kernel_oracle import ON_GPU, assert_close, launches_kernels
from row_samples import check_row_weight_grad, nan_from_empty, sample  # noqa: F401 (a fixture)

pytestmark = launches_kernels

UNIT = 64
# Blocks of a quarter of a head and of a whole one; several steps of every loop.
SMALL = Config((("BM", 16), ("BN", 16), ("BK", 16)), num_warps=4, num_stages=2)
WHOLE = Config((("BM", 16), ("BN", 64), ("BK", 32)), num_warps=4, num_stages=2)

# (languages of the examples, tokens of each, L, rows of each weight, columns)
SHAPES = {
    "one language": ([0, 0], 19, 1, [128], 40),
    "three, mixed with the full network": ([2, -1, 0, 2], 7, 3, [192], 17),
    "eight, some absent": ([7, 3, 3, 5, 1], 5, 8, [128], 17),
    "only a dead language": ([1, 1], 5, 3, [64], 16),
    "only the full network": ([-1], 21, 1, [128], 18),
    "q, k and v": ([2, 0, -1, 1], 7, 3, [128, 64, 64], 18),
    "two weights": ([0, 2, 1], 18, 3, [64, 128], 16),
    "one head, one token": ([0], 1, 1, [64], 1),
}
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, DTYPES, whole=ON_GPU))
def test_weight_gradient(shape: tuple, dtype: torch.dtype) -> None:
    """Every language's part is in its own rows, once, with and without the bias; rows that none owns are zero."""
    s = sample(*shape, dtype=dtype, unit=UNIT)
    check_row_weight_grad(s, SMALL, dtype, unit=UNIT)
    check_row_weight_grad(s, WHOLE, dtype, bias=False, unit=UNIT)


def test_block_sizes_that_are_shipped() -> None:
    """The tables' blocks divide a head, and their edges, far larger than these shapes, are cut."""
    for dtype in DTYPES:
        check_row_weight_grad(sample([1, -1, 0, 2], 40, 3, [128, 64], 24, dtype=dtype, unit=UNIT), None, dtype, unit=64)


def test_heads_of_several_sizes() -> None:
    """Under grouped-query attention a unit of Q is several heads, one of K and V a single one."""
    s = sample([2, 0, -1, 1], 7, 3, [256, 128], 18, unit=128)
    n_rows = [256, 128]
    several = row_weight_grad(
        s.packed, s.x, *s.masks, s.plan, n_rows, weight_dtype=torch.float32, config=WHOLE, units=[128, 64]
    )
    for g, dW in enumerate(several[0]):
        mask = s.indices[g], s.counts[g], s.languages, n_rows[g]
        truth, _ = naive_row_weight_grad(s.packed[g].double(), s.x.double(), *mask)
        assert_close(f"dW{g}", dW, truth, naive_row_weight_grad(s.packed[g], s.x, *mask)[0])


@pytest.mark.parametrize(
    ("dtype", "ids", "weight_dtype"),
    covering(
        DTYPES,
        {str(ids): ids for ids in ([2, -1, 0, 2, 1], [1, 1], [0], [3, 0, 3])},
        {"same": None, "master": torch.float32},
        whole=ON_GPU,
    ),
)
def test_transposed_with_sums_of_columns(ids: list[int], dtype: torch.dtype, weight_dtype) -> None:  # type: ignore[no-untyped-def]
    """A column mask's dW lies as its weight does, and its bias's gradient is the sum over all tokens."""
    s, own = sample(ids, 7, 4, [128], 18, dtype=dtype, unit=UNIT), weight_dtype or dtype
    options = {"weight_dtype": own, "units": [UNIT], "config": WHOLE}
    (dW,), (sums,) = row_weight_grad(
        s.packed, s.x, *s.masks, s.plan, [128], column_sums=True, transposed=True, **options
    )
    assert (sums.dtype, dW.dtype) == (own, own)
    assert_close("sums", sums, s.x.double().sum(0), s.x.to(own).sum(0))
    assert dW.is_contiguous()
    plain, _ = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128], **options)
    assert torch.equal(dW, plain[0].t())


def test_same_as_in_turns_and_in_every_run() -> None:
    """Which kernel runs does not show in sums of whole numbers; and two runs give the same bits in any."""
    for whole in (True, False):
        s = sample([2, -1, 0], 5, 3, [128, 64], 18, unit=UNIT, whole=whole)
        options = {"weight_dtype": torch.float32, "with_bias": True, "config": SMALL}

        def run(unit: int, s=s, options=options) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
            dW, db = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128, 64], units=[unit] * 2, **options)
            return [*dW, *(db or [])]

        for one, other in zip(run(UNIT), run(1 if whole else UNIT), strict=True):
            assert torch.equal(one, other)


def test_an_empty_batch() -> None:
    """A batch of no examples gives zero gradients."""
    s = sample([], 7, 3, [128, 64], 34, unit=UNIT)
    options = {"weight_dtype": torch.float32, "units": [UNIT] * 2}
    dW, db = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128, 64], with_bias=True, **options)
    assert [part.shape for part in dW] == [(128, 34), (64, 34)]
    assert not any(part.any() for part in [*dW, *(db or [])])


def test_sums_come_first_in_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that walk over all tokens start with the first, so that no other has to wait for them at the end."""
    s, grids = sample([0, -1, 2], 7, 3, [128], 70, unit=UNIT), []
    prepared = row_owned_grad.Prepared

    def first_alone(kernel, grid, *given, **options):  # type: ignore[no-untyped-def]
        grids.append(grid)
        return prepared(kernel, (3,), *given, **options)

    monkeypatch.setattr(row_owned_grad, "Prepared", first_alone)
    options = {"weight_dtype": torch.float32, "units": [UNIT], "config": WHOLE, "column_sums": True}
    (dW,), (sums,) = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128], **options)
    assert grids == [(3 + 2 * 3,)]  # three times 32 of 70 columns; then two heads, and as many strips of dW
    assert_close("sums", sums, s.x.double().sum(0), s.x.sum(0))
    assert dW.isnan().all()


def test_who_owns_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only blocks that a language owns whole or not at all are given to one program each."""
    assert owned([64])
    assert owned([128, 192])
    assert not owned([1])
    assert not owned([64, 1])
    assert not owned([96])
    called = []
    for form in (OwnedGrad, TurnGrad):
        monkeypatch.setattr(form, "__call__", lambda self, p, form=form: called.append(form) or ([], None))
    s = sample([0, 1], 5, 2, [192], 16, unit=UNIT)
    for units in ([64], [1], None, [192], [32]):
        row_weight_grad(s.packed, s.x, *s.masks, s.plan, [192], weight_dtype=torch.float32, units=units)
    assert called == [OwnedGrad, TurnGrad, TurnGrad, OwnedGrad, TurnGrad]


def test_wrong_units_are_named() -> None:
    """Units that do not divide a weight's rows, or that blocks do not divide, are refused."""
    s, grad = sample([0], 5, 2, [128], 34, unit=UNIT), {"weight_dtype": torch.float32}
    for units in ([48], [64, 64], [0]):
        with pytest.raises(ValueError, match=r"units: expected a divisor of each of \[128\], given"):
            row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128], units=units, **grad)
    wide = Config((("BM", 16), ("BN", 128), ("BK", 16)), num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="expected BN to divide units of 64 rows, given BN = 128"):
        row_weight_grad(s.packed, s.x, *s.masks, s.plan, [128], units=[64], config=wide, **grad)
