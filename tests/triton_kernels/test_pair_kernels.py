"""Tiles taken in pairs: against float64, against kernels that take a tile at a time, and where they are chosen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from covering import covering
from fastmask_kernels import tile_matmul as tile_matmul_module
from fastmask_kernels import tile_weight_grad as tile_weight_grad_module
from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import interpreting
from fastmask_kernels.plan import Plan
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import tile_matmul
from fastmask_kernels.tile_weight_grad import pair_weight_grad, tile_weight_grad, worth_pairing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, launches_kernels
from tile_samples import GRAD, Problem, results_start_as_nan  # noqa: F401 (a fixture)
from torch import Tensor

pytestmark = launches_kernels

MATMUL = Config((("BM", 16), ("BK", 16)), 4, 2)  # two steps a tile
CHUNKS = Config((("BN", 32), ("BM", 16)), 4, 2)  # two tiles of 16 rows a program
IDS = [0, -1, 2, 0, 1, 2]  # language 1 owns nothing, language 2 everything


def paired(ids: list[int], T: int, L: int, sides: tuple[int, int], tile: tuple[int, int] = (16, 32), **options: Any):
    """A problem of NT x KT tiles that are empty or full."""
    return Problem(ids, T, L, sides[0] * tile[0], sides[1] * tile[1], tile, tile=tile, **options)


def check_all(problem: Problem, matmul: Config | None = MATMUL, grad: Config | None = CHUNKS) -> None:
    """Y, dX and dW of the paired kernels."""
    problem.check_matmul(False, bias=True, config=matmul)
    problem.check_matmul(True, bias=False, config=matmul)
    problem.check_grad(differentiate=pair_weight_grad, config=grad)


def grad_of(problem: Problem, **options: Any) -> Tensor:
    arguments = {"weight_dtype": problem.weight.dtype, "config": CHUNKS} | options
    return pair_weight_grad(problem.dy, problem.x, problem.layout, problem.plan, **arguments)


CASES = {
    "1 language": ([0, 0], 19, 1, (4, 3)),
    "3 languages": (IDS, 19, 3, (5, 4)),
    "8 languages": ([7, 0, 4, -1, 3], 19, 8, (3, 5)),
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-master": (torch.float16, torch.float32),
}


@pytest.mark.parametrize(("case", "dtypes"), covering(CASES, DTYPES, whole=ON_GPU))
def test_results(case: tuple[Any, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The kernels compute the masked model, and its gradients."""
    check_all(paired(*case, dtype=dtypes[0], weight_dtype=dtypes[1], density=0.6))


@pytest.mark.parametrize(
    ("ids", "sides"),
    covering(
        {"one": [0], "same": [0, 0], "dead": [1, 1], "full": [2], "network": [-1], "two": [3, -1]},
        [(1, 1), (1, 4), (4, 1), (2, 2), (9, 3)],
        whole=ON_GPU,
    ),
)
def test_few_tiles_and_single_segments(ids: list[int], sides: tuple[int, int]) -> None:
    """A row or column without a neighbour is right, and so is a single segment, or one that owns nothing."""
    check_all(paired(ids, 7, 4, sides, dtype=torch.float16))


def test_shipped_block_sizes() -> None:
    """The block sizes that a launch picks itself fit tiles of 64, odd numbers of them, too."""
    for dtype in (torch.float32, torch.float16):
        check_all(paired([0, 2, 1], 70, 3, (3, 3), (64, 64), dtype=dtype, density=0.7), None, None)
    check_all(paired([0, 0], 300, 1, (1, 2), (64, 64), dtype=torch.float16, density=0.7), None, None)


def test_more_strips_than_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """No strip is skipped where there is more than one group of them."""
    monkeypatch.setattr(tile_weight_grad_module, "multiprocessors", lambda device: 4)
    check_all(paired([0, -1, 2], 5, 3, (5, 9)))


def whole(problem: Problem) -> Problem:
    """Small whole numbers in place of all operands: every sum is exact, whatever its order."""
    for name in ("x", "dy", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).clamp(-2, 2).round())
    return problem


def test_same_as_one_tile_at_a_time() -> None:
    """Which kernel runs does not show in the results."""
    problem = whole(paired([0, -1, 2, 0, 3], 5, 4, (3, 3), (32, 32), dtype=torch.float16))
    alone = copy.copy(problem.layout)
    alone.row_pairs = alone.column_pairs = None
    p, grads = problem, {"weight_dtype": torch.float32}
    y = tile_matmul(p.x, p.weight, p.layout, p.plan, p.bias, config=MATMUL)
    assert torch.equal(y, tile_matmul(p.x, p.weight, alone, p.plan, p.bias, config=MATMUL))
    dx = tile_matmul(p.dy, p.weight, p.layout, p.plan, transposed=True, config=MATMUL)
    assert torch.equal(dx, tile_matmul(p.dy, p.weight, alone, p.plan, transposed=True, config=MATMUL))
    pieces = Config((("BN", 32), ("BK", 32), ("BM", 16)), 4, 2)
    one = tile_weight_grad(p.dy, p.x, alone, p.plan, config=pieces, **grads)
    assert torch.equal(pair_weight_grad(p.dy, p.x, p.layout, p.plan, config=CHUNKS, **grads), one)


def test_one_launch_for_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are the same on chips where programs cannot take turns."""
    problem = paired(IDS, 19, 3, (5, 4), dtype=torch.float16, weight_dtype=torch.float32)
    in_turns = grad_of(problem)
    monkeypatch.setattr(tile_weight_grad_module, "TURN_CHIPS", ())
    assert torch.equal(problem.check_grad(differentiate=pair_weight_grad, config=CHUNKS), in_turns)


@pytest.mark.parametrize(
    ("ids", "weight_dtype"),
    covering(
        {"one segment": [0], "perhaps several": [0, 0], "several": [0, 2, 0]},
        {"half": torch.float16, "float": torch.float32},
        whole=ON_GPU,
    ),
)
def test_sums_of_several_segments(ids: list[int], weight_dtype: torch.dtype) -> None:
    """Sums are written where they belong, or meet in a buffer if there may be several, in either dtype."""
    problem = paired(ids, 9, 3, (3, 2), dtype=torch.float16, weight_dtype=weight_dtype)
    problem.check_grad(differentiate=pair_weight_grad, config=CHUNKS)


def test_strided_inputs() -> None:
    """Slices and transposed tensors give the same results."""
    problem = paired(IDS, 7, 3, (3, 3), dtype=torch.float16)
    (N, K), M = problem.layout.shape, problem.plan.n_rows
    problem.x = torch.randn(M, K + 20, device=DEVICE).half()[:, 11 : K + 11]  # rows apart
    problem.dy = torch.randn(N, M, device=DEVICE).half().t()  # columns apart
    problem.weight = torch.randn(K, N, device=DEVICE).half().t()
    check_all(problem)


def test_reruns_are_bit_identical() -> None:
    """Two runs give the same bits, whatever order programs finish in."""
    problem = paired(IDS, *((40, 3, (9, 6)) if ON_GPU else (9, 3, (3, 4))), dtype=torch.float16)
    assert torch.equal(grad_of(problem), grad_of(problem))
    ys = [tile_matmul(problem.x, problem.weight, problem.layout, problem.plan) for _ in range(2)]
    assert torch.equal(*ys)


def test_dead_weights_and_foreign_rows_are_not_read() -> None:
    """What a language does not own never reaches its results, even if it is not a number."""
    problem = paired([0, 3], 9, 4, (5, 4))
    owned = problem.keep[0] | problem.keep[3]
    problem.keep[1], problem.keep[2] = owned, owned
    poisoned = torch.where(owned, problem.weight, float("nan"))
    for transposed, x in ((False, problem.x), (True, problem.dy)):
        clean, dirty = (
            tile_matmul(x, weight, problem.layout, problem.plan, transposed=transposed, config=MATMUL)
            for weight in (problem.weight, poisoned)
        )
        assert torch.equal(clean, dirty)
    dead = ~owned.any(1)
    problem.dy[:, dead] = float("nan")
    assert not grad_of(problem).isnan().any()


def test_empty_batch() -> None:
    """A batch without examples gives empty outputs and zero gradients."""
    problem = paired([], 4, 3, (2, 3))
    assert problem.check_matmul(False, bias=True).shape == (0, 32)
    assert problem.check_matmul(True, bias=False).shape == (0, 96)
    assert not problem.check_grad(differentiate=pair_weight_grad, config=CHUNKS).any()


# ---- which kernel runs


def test_who_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 are worked on in pairs; those with bits are not."""
    called: list[str] = []
    launch = lambda kernel, *given, **options: called.append(kernel.__name__)  # noqa: E731
    monkeypatch.setattr(tile_matmul_module, "launch", launch)
    monkeypatch.setattr(tile_weight_grad_module, "launch", launch)
    monkeypatch.setattr(tile_weight_grad_module, "worth_pairing", lambda *args: True)
    p, grads = paired([0, 0], 5, 1, (2, 2)), {"weight_dtype": torch.float32}
    tile_matmul(p.x, p.weight, p.layout, p.plan)
    tile_matmul(p.dy, p.weight, p.layout, p.plan, transposed=True)
    tile_weight_grad(p.dy, p.x, p.layout, p.plan, **grads)
    assert called == ["pair_matmul_kernel", "pair_matmul_kernel", "pair_weight_grad_kernel"] + [
        "pair_weight_grad_kernel"
    ] * (len(called) - 3)
    called.clear()
    pieces = Config((("BN", 16), ("BK", 32), ("BM", 16)), 4, 2)
    tile_weight_grad(p.dy, p.x, p.layout, p.plan, config=pieces, **grads)
    bits = Problem([0, 0], 5, 1, 64, 64)
    tile_matmul(bits.x, bits.weight, bits.layout, bits.plan)
    assert called == ["tile_weight_grad_kernel", "tile_matmul_kernel"]


def test_where_pairs_pay() -> None:
    """A gradient goes to the paired kernel only where that keeps a GPU busy, and mostly multiplies."""

    def worth(ids: list[int], T: int, sides: int, dtype: torch.dtype = torch.float16, block: int = 64) -> bool:
        L, size = 8, sides * 64
        flags = torch.ones(L, size // block, size // block, dtype=torch.bool, device=DEVICE)
        layout = TileLayout.from_blocks(flags, (block, block))
        x = torch.empty(len(ids) * T, size, dtype=dtype, device=DEVICE)
        return worth_pairing(x, layout, Plan(torch.tensor(ids, dtype=torch.int64, device=DEVICE), T, L))

    assert worth([0], 128, 64)
    assert worth([0, 1], 512, 64)
    assert not worth([0, 1], 128, 64), "few tokens"
    assert not worth([0], 128, 12), "a small weight"
    assert not worth([0], 128, 64, torch.float32), "bound by arithmetic"
    assert not worth([0], 128, 64, block=128), "no pairs"
    assert not worth([], 128, 64)


def test_refusals() -> None:
    """Operands that do not belong together are an error."""
    p = paired([0, 1], 4, 3, (2, 2))
    bits = Problem([0, 1], 4, 3, 32, 64).layout
    grads: dict[str, Any] = {"weight_dtype": torch.float32}
    for error, call in (
        (ValueError, lambda: tile_matmul(p.x[1:], p.weight, p.layout, p.plan)),
        (ValueError, lambda: tile_matmul(p.x, p.weight, p.layout, p.plan, config=GRAD)),
        (ValueError, lambda: pair_weight_grad(p.dy, p.x, bits, p.plan, **grads)),
        (ValueError, lambda: pair_weight_grad(p.dy, p.x[1:], p.layout, p.plan, **grads)),
        (
            ValueError,
            lambda: pair_weight_grad(
                p.dy, p.x, p.layout, p.plan, config=Config((("BN", 8), ("BM", 16)), 4, 2), **grads
            ),
        ),
    ):
        with pytest.raises(error):
            call()
    if interpreting():
        with pytest.raises(RuntimeError, match="bfloat16"):
            tile_matmul(p.x.bfloat16(), p.weight.bfloat16(), p.layout, p.plan)
        with pytest.raises(RuntimeError, match="bfloat16"):
            pair_weight_grad(p.dy.bfloat16(), p.x.bfloat16(), p.layout, p.plan, **grads)


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking: minutes
@given(
    ids=st.lists(st.integers(-1, 3), min_size=1, max_size=4),
    T=st.integers(1, 20),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.floats(0, 1),
    half=st.booleans(),
)
def test_any_problem(ids: list[int], T: int, sides: tuple[int, int], density: float, half: bool) -> None:
    """The kernels are right for any batch, shape and mask."""
    dtype = torch.float16 if half else torch.float32
    check_all(paired(ids, T, 4, sides, density=density, dtype=dtype, weight_dtype=torch.float32, seed=T, whole=True))
