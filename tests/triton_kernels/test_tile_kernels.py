"""`tile_matmul` and `tile_weight_grad` against float64: every result, dtype, kind of tile, odd shape and refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covering import covering
from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import interpreting
from fastmask_kernels.naive import naive_tile_matmul
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import tile_weight_grad
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, assert_close, launches_kernels
from tile_samples import GRAD, MATMUL, Problem, results_start_as_nan  # noqa: F401 (a fixture)

pytestmark = launches_kernels

PIECES = Config((("BN", 16), ("BK", 32), ("BM", 16)), 4, 2)  # four programs a tile


IDS = [0, -1, 2, 0, 1, 2]  # language 1 owns nothing, language 2 everything
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-master": (torch.float16, torch.float32),
}
BLOCKS = {"tiles": (32, 64), "bits": (1, 1), "coarse": (16, 16)}


@pytest.mark.parametrize(("block", "dtypes"), covering(BLOCKS, DTYPES, whole=ON_GPU))
def test_results(block: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The kernels compute the masked model, and its gradients."""
    problem = Problem(IDS, 9, 3, 96, 128, block, dtype=dtypes[0], weight_dtype=dtypes[1])
    assert (problem.layout.bits is None) == (block == (32, 64))
    problem.check_all()
    problem.check_matmul(False, bias=False)


@pytest.mark.parametrize(
    ("ids", "T", "L", "N", "K"),
    [
        ([0], 1, 1, 1, 1),
        ([0, -1], 3, 1, 7, 33),
        ([2, 2, 0], 5, 3, 33, 65),
        ([-1], 17, 2, 40, 7),
        ([7, 0, 4], 16, 8, 65, 31),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_odd_shapes(ids: list[int], T: int, L: int, N: int, K: int) -> None:
    """Every element at an edge is written, and nothing beyond the edge is read."""
    Problem(ids, T, L, N, K, dtype=torch.float16).check_all()


def test_more_tiles_than_a_group() -> None:
    """No tile is skipped where there is more than one group of them."""
    problem = Problem([0, 1, 0, -1, 2, 0, 0, 1, 0], 16, 3, 150, 33, density=0.1, tile=(16, 32))
    tiny = Config((("BN", 16), ("BK", 32), ("BM", 16)), 4, 2)
    problem.check_matmul(False, bias=True, config=Config((("BM", 16), ("BK", 32)), 4, 2))
    problem.check_matmul(True, bias=False, config=Config((("BM", 16), ("BK", 16)), 4, 2))
    problem.check_grad(config=tiny)
    problem.check_whole_grad(tiny)


def test_shipped_block_sizes() -> None:
    """The block sizes that a launch picks itself fit the layout's own tiles."""
    for dtype in (torch.float32, torch.float16):
        problem = Problem([0, 2], 20, 3, 100, 200, dtype=dtype, tile=(128, 128))
        problem.check_matmul(False, bias=True, config=None)
        problem.check_matmul(True, bias=False, config=None)
        problem.check_grad(config=None)
        problem.check_whole_grad(None)


def test_pieces_of_a_tile() -> None:
    """A tile that several programs share is written whole."""
    problem = Problem(IDS, 5, 3, 60, 100)
    blocks = Problem(IDS, 5, 3, 64, 128, (32, 64))
    for each in (problem, blocks):
        each.check_grad(config=PIECES)
        each.check_whole_grad(PIECES)


def test_pieces_of_the_last_tile_read_nothing_behind_the_edge() -> None:
    """A piece of a tile that lies wholly past the edge reads nothing there."""
    problem = Problem(IDS, 9, 3, 48, 96)  # one piece and a half of PIECES' tiles in both directions
    for name, width in (("dy", 48), ("x", 96)):
        room = torch.full((problem.plan.n_rows, width + 64), float("nan"), device=DEVICE)
        room[:, :width] = getattr(problem, name)
        setattr(problem, name, room[:, :width])
    problem.check_grad(config=PIECES)


def test_strided_inputs() -> None:
    """Slices and transposed tensors give the same results."""
    problem = Problem(IDS, 7, 3, 70, 100, dtype=torch.float16)
    M = problem.plan.n_rows
    problem.x = torch.randn(M, 300, device=DEVICE).half()[:, 11:111]  # rows apart
    problem.dy = torch.randn(70, M, device=DEVICE).half().t()  # columns apart
    problem.weight = torch.randn(100, 70, device=DEVICE).half().t()
    problem.check_all()
    problem.weight = torch.randn(70, 130, device=DEVICE).half()[:, 3:103]
    problem.check_all()


def test_reruns_are_bit_identical() -> None:
    """Two runs give the same bits, whatever order programs finish in."""
    problem = Problem(IDS, 9, 3, 96, 128, dtype=torch.float16)
    first, second = problem.check_matmul(False, bias=True), problem.check_matmul(False, bias=True)
    assert torch.equal(first, second)
    assert torch.equal(problem.check_grad(), problem.check_grad())


def test_dead_weights_are_not_read() -> None:
    """What a language does not own never reaches its results, even if it is infinite or not a number."""
    problem = Problem([0, 3], 9, 4, 96, 128)
    owned = problem.keep[0] | problem.keep[3]
    problem.weight[~owned] = float("nan")
    problem.keep[1], problem.keep[2] = owned, owned
    clean = problem.weight.nan_to_num(0)
    for transposed, x in ((False, problem.x), (True, problem.dy)):
        y = tile_matmul(x, problem.weight, problem.layout, problem.plan, transposed=transposed, config=MATMUL)
        truth = naive_tile_matmul(x.double(), clean.double(), problem.keep, problem.language_of, None, transposed)
        plain = naive_tile_matmul(x, clean, problem.keep, problem.language_of, None, transposed)
        assert_close("y", y, truth, plain)


def test_empty_batch() -> None:
    """A batch without examples gives empty outputs and zero gradients."""
    problem = Problem([], 4, 3, 40, 70)
    assert problem.check_matmul(False, bias=True).shape == (0, 40)
    assert problem.check_matmul(True, bias=False).shape == (0, 70)
    assert not problem.check_grad().any()
    problem.check_whole_grad()


def test_refusals() -> None:
    """Operands that do not belong together are an error."""
    p = Problem([0, 1], 4, 3, 40, 70)
    other = Problem([0, 1], 4, 2, 40, 70)
    grad: dict[str, Any] = {"weight_dtype": torch.float32}
    for error, call in (
        (TypeError, lambda: tile_matmul(p.x.double(), p.weight, p.layout, p.plan)),
        (TypeError, lambda: tile_matmul(p.x, p.weight.half(), p.layout, p.plan)),
        (ValueError, lambda: tile_matmul(p.x, p.weight.t(), p.layout, p.plan)),
        (ValueError, lambda: tile_matmul(p.x[1:], p.weight, p.layout, p.plan)),
        (ValueError, lambda: tile_matmul(p.x, p.weight, p.layout, p.plan, transposed=True)),
        (ValueError, lambda: tile_matmul(p.x, p.weight, p.layout, other.plan)),
        (ValueError, lambda: tile_matmul(p.x, p.weight, p.layout, p.plan, p.bias[1:])),
        (ValueError, lambda: tile_matmul(p.dy, p.weight, p.layout, p.plan, p.bias, transposed=True)),
        (
            ValueError,
            lambda: tile_matmul(p.x, p.weight, p.layout, p.plan, config=Config((("BM", 16), ("BK", 48)), 4, 2)),
        ),
        (ValueError, lambda: tile_weight_grad(p.dy, p.x[1:], p.layout, p.plan, **grad)),
        (TypeError, lambda: tile_weight_grad(p.dy.half(), p.x, p.layout, p.plan, **grad)),
        (TypeError, lambda: tile_weight_grad(p.dy, p.x, p.layout, p.plan, weight_dtype=torch.float16)),
        (ValueError, lambda: tile_weight_grad(p.dy, p.x, p.layout, other.plan, **grad)),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.skipif(not interpreting(), reason="bfloat16 is only wrong in the interpreter")
def test_interpreter_refuses_bf16() -> None:
    """The interpreter's bfloat16 products are wrong, so it refuses them."""
    p = Problem([0, 1], 4, 3, 40, 70)
    x, dy, weight = p.x.bfloat16(), p.dy.bfloat16(), p.weight.bfloat16()
    with pytest.raises(RuntimeError, match="bfloat16"):
        tile_matmul(x, weight, p.layout, p.plan)
    with pytest.raises(RuntimeError, match="bfloat16"):
        tile_weight_grad(dy, x, p.layout, p.plan, weight_dtype=torch.float32)


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking: minutes
@given(
    ids=st.lists(st.integers(-1, 3), min_size=1, max_size=4),
    T=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 100),
    block=st.sampled_from([(1, 1), (32, 64), (3, 5)]),
    density=st.floats(0, 1),
    half=st.booleans(),
)
def test_any_problem(
    ids: list[int], T: int, N: int, K: int, block: tuple[int, int], density: float, half: bool
) -> None:
    """The kernels are right for any batch, shape and mask; of whole numbers, as the norm of a few errors is luck."""
    dtype = torch.float16 if half else torch.float32
    Problem(ids, T, 4, N, K, block, density, dtype, torch.float32, seed=N + K, whole=True).check_all()
