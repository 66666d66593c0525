"""Products with live rows and their weight gradient, against float64 and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from fastmask_kernels import row_turn_grad
from fastmask_kernels.configs import Config
from fastmask_kernels.interpreter import interpreting
from fastmask_kernels.naive import naive_row_matmul, naive_row_matmul_t, naive_row_weight_grad
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_oracle import DEVICE, ON_GPU, assert_close, launches_kernels
from row_samples import Sample, check_row_weight_grad, nan_from_empty, row_mask, sample  # noqa: F401 (a fixture)
from torch.utils._pytree import tree_map

pytestmark = launches_kernels

# Small enough that small shapes have several tiles and several steps of every loop.
SMALL = Config((("BM", 16), ("BN", 16), ("BK", 16), ("GROUP", 2)), num_warps=4, num_stages=2)
SMALL_GRAD = Config((("BM", 16), ("BN", 16), ("BK", 16)), num_warps=4, num_stages=2)

# (languages of the examples, tokens of each, L, rows of each weight, columns)
SHAPES = {
    "one language": ([0, 0], 19, 1, [33], 40),
    "three, mixed with the full network": ([2, -1, 0, 2, 0, -1], 7, 3, [40], 33),
    "eight, some absent": ([7, 3, 3, 5, 1], 5, 8, [21], 17),
    "only a dead language": ([1, 1], 5, 3, [20], 16),
    "only the full network": ([-1], 21, 1, [35], 18),
    "q, k and v": ([2, 0, -1, 0, 1], 7, 3, [20, 17, 9], 18),
    "two weights": ([0, 2, 1], 18, 3, [16, 48], 32),
    "one of everything": ([0], 1, 1, [1], 1),
}
DTYPES = [torch.float32, torch.float16]


def check_row_matmul(s: Sample, config: Config | None, bias: bool = True) -> None:
    """`row_matmul` against the oracle."""
    biases = s.biases if bias else None
    results = row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, biases, config=config)
    for g, result in enumerate(results):
        mask = s.indices[g], s.counts[g], s.languages, s.widths[g]
        own = s.biases[g] if bias else None
        truth = naive_row_matmul(s.x.double(), s.weights[g].double(), *mask, own)
        assert_close(f"y{g}", result, truth, naive_row_matmul(s.x, s.weights[g], *mask, own))
        for row, language in enumerate(s.languages):
            live = s.weights[g].shape[0] if language < 0 else int(s.counts[g][language])
            assert not result[row, live:].any(), f"y{g}: row {row} is not exactly zero behind its {live} live units"


def check_row_matmul_t(s: Sample, config: Config | None, bias: bool = True) -> None:
    """`row_matmul_t` against the oracle."""
    result = row_matmul_t(s.packed, s.weights, *s.masks, s.plan, s.bias if bias else None, config=config)
    truth, plain = s.x.new_zeros(s.x.shape, dtype=torch.float64), torch.zeros_like(s.x)
    for x, weight, index, counts in zip(s.packed, s.weights, s.indices, s.counts, strict=True):
        truth += naive_row_matmul_t(x.double(), weight.double(), index, counts, s.languages)
        plain += naive_row_matmul_t(x, weight, index, counts, s.languages)
    if bias:
        truth, plain = truth + s.bias.double(), plain + s.bias.to(plain.dtype)
    assert_close("x gradient", result, truth, plain)


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, DTYPES, whole=ON_GPU))
def test_forward(shape: tuple, dtype: torch.dtype) -> None:
    """Outputs of a row mask's layer are right, and zero in dead units."""
    check_row_matmul(sample(*shape, dtype=dtype), SMALL)


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, DTYPES, whole=ON_GPU))
def test_input_gradient(shape: tuple, dtype: torch.dtype) -> None:
    """Gradients below a row mask's layer are right, and nothing of units that a language does not own reaches them."""
    check_row_matmul_t(sample(*shape, dtype=dtype), SMALL)


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, DTYPES, whole=ON_GPU))
def test_weight_gradient(shape: tuple, dtype: torch.dtype) -> None:
    """The gradient of a shared weight or bias has each language's part once, in its own rows."""
    check_row_weight_grad(sample(*shape, dtype=dtype), SMALL_GRAD, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_blocks(dtype: torch.dtype) -> None:
    """The block sizes that are shipped, whose edges are far larger than small shapes, give the same."""
    s = sample([0, -1, 2], 40, 3, [80, 30], 24, dtype=dtype)
    check_row_matmul(s, None)
    check_row_matmul_t(s, None)
    check_row_weight_grad(s, None, dtype)


def test_aligned_blocks() -> None:
    """Sizes that are multiples of the blocks take loops without masks: another path through each kernel."""
    s = sample([2, 0, -1], 5, 3, [16, 32], 32, dtype=torch.float16, spare=0)  # segments stay uneven
    assert s.widths == [16, 32]
    for bias in (True, False):
        check_row_matmul(s, SMALL, bias)
        check_row_matmul_t(s, SMALL, bias)
        check_row_weight_grad(s, SMALL_GRAD, torch.float16, bias)


def test_float32_weight_with_float16_activations() -> None:
    """Master weights under autocast: cast in the kernel, and their gradient is not rounded to float16 on the way."""
    s = sample([2, -1, 0, 2], 5, 3, [20, 17], 18, dtype=torch.float16, weight_dtype=torch.float32)
    check_row_matmul(s, SMALL)
    check_row_matmul_t(s, SMALL)
    check_row_weight_grad(s, SMALL_GRAD, torch.float32)


def test_column_masks_are_row_masks_of_the_transposed_weight() -> None:
    """Column masks have no kernels of their own: if this equality fails, they are wrong in all three products."""
    s = sample([2, -1, 0, 2, 1], 7, 3, [40], 34)
    index, counts, width, N = s.indices[0], s.counts[0], s.widths[0], 34
    weight = s.weights[0].t().contiguous()  # [N, K = 40], masked along K
    packed = s.packed[0].nan_to_num()
    full = torch.zeros(len(s.languages), 40, device=DEVICE)  # the same activations, not packed
    for row, language in enumerate(s.languages):
        live = torch.arange(40, device=DEVICE) if language < 0 else index[language, : int(counts[language])]
        full[row, live] = packed[row, : len(live)]
    dy = s.x  # [M, N]

    y = row_matmul_t(s.packed, s.weights, [index], [counts], s.plan, config=SMALL)
    assert_close("y", y, full.double() @ weight.double().t(), full @ weight.t())
    dx = row_matmul(dy, s.weights, [index], [counts], s.plan, [width], config=SMALL)[0]
    truth = naive_row_matmul(dy.double(), s.weights[0].double(), index, counts, s.languages, width)
    assert_close("dx", dx, truth, naive_row_matmul(dy, s.weights[0], index, counts, s.languages, width))
    dW = row_weight_grad(s.packed, dy, [index], [counts], s.plan, [40], weight_dtype=torch.float32, config=SMALL_GRAD)[
        0
    ][0].t()
    assert dW.shape == (N, 40)
    assert_close("dW", dW, dy.double().t() @ full.double(), dy.t() @ full)


def test_activations_may_be_slices() -> None:
    """Gradients may arrive as slices of a wider buffer, as those of attention do."""
    s = sample([2, -1, 0], 7, 3, [20, 17], 18)
    n_rows = [20, 17]
    joined = torch.cat([*s.packed, s.x], 1)
    *packed, x = joined.split([*s.widths, 18], 1)
    for one, other in zip(
        row_matmul(x, s.weights, *s.masks, s.plan, s.widths, config=SMALL),
        row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, config=SMALL),
        strict=True,
    ):
        assert torch.equal(one, other)
    one = row_matmul_t(packed, s.weights, *s.masks, s.plan, config=SMALL)
    assert torch.equal(one, row_matmul_t(s.packed, s.weights, *s.masks, s.plan, config=SMALL))
    results = [
        row_weight_grad(dys, inputs, *s.masks, s.plan, n_rows, weight_dtype=torch.float32, config=SMALL_GRAD)[0]
        for dys, inputs in ((packed, x), (s.packed, s.x))
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is reproducible, and the order in which strips are walked does not show in the sums."""
    sizes = ([40, 17, 33], 50) if ON_GPU else ([20, 17], 34)
    s = sample([2, -1, 0, 2], 7 if ON_GPU else 3, 3, *sizes, dtype=torch.float16)

    def run() -> list[torch.Tensor]:
        y = row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, config=SMALL)
        dx = row_matmul_t(s.packed, s.weights, *s.masks, s.plan, config=SMALL)
        dW, db = row_weight_grad(
            s.packed, s.x, *s.masks, s.plan, sizes[0], weight_dtype=torch.float32, with_bias=True, config=SMALL_GRAD
        )
        return [*y, dx, *dW, *(db or [])]

    first = run()
    monkeypatch.setattr(row_turn_grad, "multiprocessors", lambda device: 1)  # one strip after the other
    for one, other in zip(first, run(), strict=True):
        assert torch.equal(one, other)


def test_strips_are_walked_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """No strip of a wide weight is left out or summed twice, the last, smaller group included."""
    # Two chunks, five strips with the bias: 2 + 2 + 1.
    monkeypatch.setattr(row_turn_grad, "multiprocessors", lambda device: 2)
    check_row_weight_grad(sample([2, -1, 0, 1], 5, 3, [20], 64, spare=0), SMALL_GRAD, torch.float32)


def test_every_chunk_takes_its_turn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run one by one here and never have to wait; on a GPU a wrong count hangs, or lets two add at once."""
    s = sample([2, -1, 0, 1], 5, 3, [40, 17], 34)
    zeros, made = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: made.append(zeros(*shape, **options)) or made[-1])
    options = {"weight_dtype": torch.float32, "config": SMALL_GRAD}
    row_weight_grad(s.packed, s.x, *s.masks, s.plan, [40, 17], with_bias=True, **options)
    row_weight_grad(s.packed, s.x, *s.masks, s.plan, [40, 17], column_sums=True, **options)
    chunks = []
    for counts, N in zip(s.counts, [40, 17], strict=True):
        live = [N, *(int(counts[language]) for language in (0, 1, 2))]
        chunks.append(sum(-(-own // 16) for own in live))
    # Three strips of 34 columns, and that of the bias; sums of columns meet no others.
    counters = [arena.view(torch.int32) for arena in made]
    assert counters[0][-8:].tolist() == [chunks[0]] * 4 + [chunks[1]] * 4
    assert counters[1][-6:].tolist() == [chunks[0]] * 3 + [chunks[1]] * 3


@pytest.mark.parametrize(
    ("ids", "turns", "weight_dtype", "dtype"),
    covering(
        {str(ids): ids for ids in ([2, -1, 0, 2, 1], [1, 1], [0], [3, 0, 3])},
        {"turns": True, "launches": False},
        {"same": None, "master": torch.float32},
        DTYPES,
        whole=ON_GPU,
    ),
)
def test_sums_of_columns(ids: list[int], dtype: torch.dtype, weight_dtype, turns, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The bias's gradient of a column mask counts each token of each language once."""
    if not turns:
        monkeypatch.setattr(row_turn_grad, "TURN_CHIPS", ())
    s = sample(ids, 7, 4, [20], 34, dtype=dtype)
    own = weight_dtype or dtype
    (dW,), (sums,) = row_weight_grad(
        s.packed, s.x, *s.masks, s.plan, [20], weight_dtype=own, column_sums=True, transposed=True, config=SMALL_GRAD
    )
    assert sums.dtype == own
    assert_close("sums", sums, s.x.double().sum(0), s.x.to(own).sum(0))
    assert dW.is_contiguous()
    plain, _ = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [20], weight_dtype=own, config=SMALL_GRAD)
    assert torch.equal(dW, plain[0].t())


def test_results_are_aligned_parts_of_one_tensor() -> None:
    """Results are zeroed and rounded at once; one that does not begin at 16 bytes is copied element by element."""
    s = sample([2, -1, 0], 5, 3, [20, 17, 9], 18, dtype=torch.float16)
    dW, db = row_weight_grad(
        s.packed, s.x, *s.masks, s.plan, [20, 17, 9], weight_dtype=torch.float16, with_bias=True, config=SMALL_GRAD
    )
    every = [*dW, *(db or [])]
    assert len({part.untyped_storage().data_ptr() for part in every}) == 1
    assert all(part.storage_offset() % 64 == 0 and part.is_contiguous() for part in every)


def test_one_launch_for_each_language_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips whose barrier does not order stores take no turns: their sums must be the others'."""
    s = sample([2, -1, 0, 2], 3, 3, [20, 17], 18)
    results = []
    for chips in (row_turn_grad.TURN_CHIPS, ()):
        monkeypatch.setattr(row_turn_grad, "TURN_CHIPS", chips)
        dW, db = row_weight_grad(
            s.packed, s.x, *s.masks, s.plan, [20, 17], weight_dtype=torch.float32, with_bias=True, config=SMALL_GRAD
        )
        results.append([*dW, *(db or [])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_empty_batch() -> None:
    """A batch of no examples (the last shard of a data set) must give empty outputs and zero gradients."""
    s = sample([], 7, 3, [40, 17], 34)
    assert [y.shape for y in row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths)] == [(0, 4), (0, 4)]
    assert row_matmul_t(s.packed, s.weights, *s.masks, s.plan).shape == (0, 34)
    dW, db = row_weight_grad(s.packed, s.x, *s.masks, s.plan, [40, 17], weight_dtype=torch.float32, with_bias=True)
    assert [part.shape for part in dW] == [(40, 34), (17, 34)]
    assert not any(part.any() for part in [*dW, *(db or [])])


def test_a_dead_rows_nan_stays_there() -> None:
    """A row that a language does not own may be NaN without reaching its results."""
    s = sample([0, 0], 5, 2, [40], 34)
    live = s.indices[0][0, : int(s.counts[0][0])]
    dead = [row for row in range(40) if row not in live.tolist()]
    s.weights[0][dead], s.biases[0][dead] = torch.nan, torch.nan
    check_row_matmul(s, SMALL)
    check_row_matmul_t(s, SMALL)


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_mask(data: st.DataObject) -> None:
    """Any combination of sizes, languages and masks is right."""
    L = data.draw(st.integers(1, 4), "L")
    ids = data.draw(st.lists(st.integers(-1, L - 1), min_size=1, max_size=4), "ids")
    tokens, K = data.draw(st.integers(1, 20), "tokens"), data.draw(st.integers(1, 20), "K")
    Ns = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=2), "Ns")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    # Sums of whole numbers are exact, so nothing has to be allowed for: the norm of a few errors is a matter of luck.
    s = sample(ids, tokens, L, Ns, K, dtype=dtype, seed=data.draw(st.integers(0, 99), "seed"), whole=True)
    y = row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths, s.biases, config=SMALL)
    dx = row_matmul_t(s.packed, s.weights, *s.masks, s.plan, s.bias, config=SMALL)
    dW, db = row_weight_grad(s.packed, s.x, *s.masks, s.plan, Ns, weight_dtype=dtype, with_bias=True, config=SMALL_GRAD)
    expected = s.bias.expand(len(s.languages), K)
    for g, N in enumerate(Ns):
        mask = s.indices[g], s.counts[g], s.languages
        assert torch.equal(y[g], naive_row_matmul(s.x, s.weights[g], *mask, s.widths[g], s.biases[g]))
        assert db is not None
        for result, truth in zip((dW[g], db[g]), naive_row_weight_grad(s.packed[g], s.x, *mask, N), strict=True):
            assert torch.equal(result, truth)
        expected = expected + naive_row_matmul_t(s.packed[g], s.weights[g], *mask)
    assert torch.equal(dx, expected)


@pytest.mark.skipif(not interpreting(), reason="bfloat16 is right on a GPU")
def test_bfloat16_is_refused_in_the_interpreter() -> None:
    """The interpreter's bfloat16 products are off by 1e10 and nothing says so."""
    s = sample([0], 5, 1, [16], 16, dtype=torch.bfloat16)
    for call in (
        lambda: row_matmul(s.x, s.weights, *s.masks, s.plan, s.widths),
        lambda: row_matmul_t(s.packed, s.weights, *s.masks, s.plan),
        lambda: row_weight_grad(s.packed, s.x, *s.masks, s.plan, [16], weight_dtype=torch.bfloat16),
    ):
        with pytest.raises(RuntimeError, match="bfloat16"):
            call()


WRONG = {
    "dtype of x": ({"x": torch.zeros(5, 34, dtype=torch.float64)}, TypeError, r"x: expected float16.*float64"),
    "rows of x": ({"x": torch.zeros(4, 34)}, ValueError, r"x: expected shape \[5, width\], given \(4, 34\)"),
    "transposed x": ({"x": torch.zeros(34, 5).t()}, ValueError, "side by side"),
    "columns of x": (
        {"x": torch.zeros(5, 33)},
        ValueError,
        r"weights\[0\]: expected shape \(16, 33\), given \(16, 34\)",
    ),
    "transposed weight": ({"weights": [torch.zeros(34, 16).t()]}, ValueError, "contiguous rows"),
    "dtype of weight": ({"weights": [torch.zeros(16, 34, dtype=torch.float16)]}, TypeError, "float16"),
    "four weights": ({"weights": [torch.zeros(16, 34)] * 4}, ValueError, "1 to 3 weights.*given 4"),
    "index of other languages": ({"indices": [torch.zeros(3, 9, dtype=torch.int64)]}, ValueError, r"int64 \[2, most\]"),
    "dtype of index": ({"indices": [torch.zeros(2, 9, dtype=torch.int32)]}, ValueError, "given torch.int32"),
    "shape of counts": (
        {"counts": [torch.zeros(3, dtype=torch.int64)]},
        ValueError,
        r"counts\[0\]: expected int64 \[2\]",
    ),
    "number of indices": ({"indices": []}, ValueError, "expected 1 indices and counts, given 0 and 1"),
    "width": ({"widths": [0]}, ValueError, "widths: expected 1 positive integers"),
    "bias": ({"biases": [torch.zeros(15)]}, ValueError, r"biases\[0\]: expected shape \(16,\), given \(15,\)"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_is_named(changes: dict, error: type, message: str) -> None:
    """A wrong argument is refused by a message that names it."""
    index, counts = row_mask(torch.ones(2, 16, dtype=torch.bool))
    arguments = {
        "x": torch.zeros(5, 34),
        "weights": [torch.zeros(16, 34)],
        "indices": [index],
        "counts": [counts],
        "plan": Plan(torch.tensor([0], device=DEVICE), 5, 2),
        "widths": [16],
    }
    there = {
        name: tree_map(lambda of: of.to(DEVICE) if isinstance(of, torch.Tensor) else of, value)
        for name, value in (arguments | changes).items()
    }
    with pytest.raises(error, match=message):
        row_matmul(**there)


def test_wrong_use_of_the_gradients_is_named() -> None:
    """As above, for what only the other two launchers take."""
    s = sample([0], 5, 2, [16], 34)
    grad = {"weight_dtype": torch.float32}
    with pytest.raises(ValueError, match="as many activations as weights, given 2 and 1"):
        row_matmul_t(s.packed * 2, s.weights, *s.masks, s.plan)
    with pytest.raises(
        TypeError, match=r"weight_dtype: expected torch\.float32 or torch\.float32, given torch\.float16"
    ):
        row_weight_grad(s.packed, s.x, *s.masks, s.plan, [16], weight_dtype=torch.float16)
    with pytest.raises(ValueError, match="n_rows: expected 1 positive integers"):
        row_weight_grad(s.packed, s.x, *s.masks, s.plan, [16, 3], **grad)
