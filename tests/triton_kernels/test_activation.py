"""The activation in `row_matmul`'s epilogue: the gradient of its input, and its output computed again."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from fastmask_kernels.configs import Config
from fastmask_kernels.naive import naive_row_matmul
from fastmask_kernels.row_matmul import row_matmul
from kernel_oracle import DEVICE, ON_GPU, assert_close, launches_kernels
from row_samples import Sample, nan_from_empty, sample  # noqa: F401 (a fixture)

from fastmask.torch_path.layers import activate, activation_grad

pytestmark = launches_kernels

SMALL = Config((("BM", 32), ("BN", 16), ("BK", 16), ("GROUP", 2)), num_warps=4, num_stages=2)
SHAPES = {
    "one language": ([0, 0], 19, 1, [33], 40),
    "three, mixed with the full network": ([2, -1, 0, 2, 0, -1], 7, 3, [40], 33),
    "only a dead language": ([1, 1], 5, 3, [20], 16),
    "many tokens": ([0, 2], 70, 3, [48], 32),
    "one of everything": ([0], 1, 1, [1], 1),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16 with float32 weights": (torch.float16, torch.float32),
}


def run(s: Sample, activation: str, config: Config | None, wanted: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient, activated) where fresh memory holds NaN; s.packed[0] is NaN behind the live units."""
    active = torch.full(s.packed[0].shape, torch.nan, device=DEVICE, dtype=s.x.dtype)
    (out,) = row_matmul(
        s.x, s.weights, *s.masks, s.plan, s.widths, activation=activation, before=s.packed[0],
        active=active if wanted else None, config=config,
    )  # fmt: skip
    return out, active


@pytest.mark.parametrize(("shape", "dtypes", "activation"), covering(SHAPES, DTYPES, ["gelu", "relu"], whole=ON_GPU))
def test_against_float64(shape: tuple, dtypes: tuple, activation: str) -> None:
    """The derivative is right for each unit and token, and zero behind the live units."""
    s = sample(*shape, dtype=dtypes[0], weight_dtype=dtypes[1])
    before = s.packed[0].nan_to_num()  # zeros behind the live units, as a packed layer leaves them
    for config in (SMALL, None):
        out, active = run(s, activation, config)
        mask = s.indices[0], s.counts[0], s.languages, s.widths[0]
        exact = naive_row_matmul(s.x.double(), s.weights[0].double(), *mask)
        truth = activation_grad(exact, before.double(), activation)
        plain = activation_grad(naive_row_matmul(s.x, s.weights[0], *mask), before, activation)
        assert_close("gradient", out, truth, plain)
        assert_close("activated", active, activate(before.double(), activation), activate(before, activation))
        dead = s.packed[0].isnan()
        assert not out[dead].any()
        assert not active[dead].any()


def test_only_the_gradient() -> None:
    """Where only the gradient is asked for, the activation is not written."""
    s = sample([2, -1, 0], 7, 3, [40], 33)
    out, active = run(s, "gelu", SMALL, wanted=False)
    assert torch.equal(out, run(s, "gelu", SMALL)[0])
    assert active.isnan().all()


def test_slices_of_one_buffer() -> None:
    """The activation's input may be a slice of a wider buffer."""
    s = sample([2, -1, 0, 1], 7, 3, [40], 34)
    expected, _ = run(s, "gelu", SMALL)
    wide = torch.cat([s.x, s.packed[0], s.x], 1)
    before = wide[:, 34 : 34 + s.widths[0]]
    (out,) = row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, activation="gelu", before=before, config=SMALL)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("activation", "largest"), [("gelu", 1e30), ("relu", torch.inf)]
)  # of infinity PyTorch's own GELU makes NaN on some processors
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply:RuntimeWarning")
def test_extreme_inputs(activation: str, largest: float) -> None:
    """Infinite and huge inputs give NaN where PyTorch's do, and nowhere else."""
    s = sample([0] * 7, 1, 1, [1], 1, spare=0, whole=True)
    s.counts[0].fill_(1)
    s.weights[0].fill_(1)
    s.x.fill_(3)
    before = s.packed[0] = torch.tensor([-largest, largest, torch.nan, 1e4, 0.0, -0.0, 1e-30], device=DEVICE)[:, None]
    out, active = run(s, activation, SMALL)
    expected = activation_grad(torch.full_like(out, 3), before, activation)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(active, activate(before, activation), equal_nan=True)


WRONG = {
    "unknown": ({"activation": "tanh"}, "activation: expected one of '', 'gelu', 'relu', given 'tanh'"),
    "no activation": ({"activation": ""}, "before and active are an activation's input and output"),
    "no input": ({"before": None}, "activation 'gelu': expected one weight and `before`, given 1 and None"),
    "width": ({"before": torch.zeros(5, 15)}, r"before: expected shape \[5, 16\], given \(5, 15\)"),
    "dtype": ({"before": torch.zeros(5, 16).half()}, r"before: expected torch.float32 on .*, given torch.float16"),
    "active": ({"active": torch.zeros(5, 20)[:, :16]}, r"active: expected contiguous rows, given strides \(20, 1\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_named(case: str) -> None:
    """A buffer of the wrong shape is refused."""
    changes, message = WRONG[case]
    s = sample([0], 5, 2, [16], 34)
    changes = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in changes.items()}
    arguments = {"activation": "gelu", "before": torch.zeros(5, 16, device=DEVICE), "active": None} | changes
    with pytest.raises(TypeError if case == "dtype" else ValueError, match=message):
        row_matmul(s.x, s.weights, *s.masks, s.plan, [16], **arguments)
