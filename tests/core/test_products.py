"""Products by oneDNN are those of PyTorch, as exact, in every layout that the masked layers use."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import fastmask as fm
from fastmask.torch_path import faster, products

pytestmark = pytest.mark.skipif(not products._works(), reason="this PyTorch has no oneDNN")

SHAPES = [(300, 768, 256), (96, 1500, 100), (1024, 257, 16), (64, 255, 130), (200, 3072, 40)]


@pytest.fixture
def ask_for(monkeypatch):
    """Sets the environment variable, which is otherwise read once."""

    def ask(library: str) -> None:
        monkeypatch.setenv("FASTMASK_PRODUCTS", library)
        products._chosen.cache_clear()

    yield ask
    products._chosen.cache_clear()


@pytest.fixture
def onednn(ask_for):
    """Every product that is large enough goes to oneDNN, whatever the processor."""
    ask_for("onednn")
    assert products.by_onednn(torch.ones(1))


@pytest.fixture(params=["whole", "in pieces"])
def results(request, monkeypatch):
    """How results are made: in pieces, as large ones are, or not."""
    if request.param == "in pieces":
        monkeypatch.setattr(products, "LARGE_RESULT", 1)
        monkeypatch.setattr(products, "PIECE_OF_RESULT", 2**14)
        assert products._rows_of_results(300, 100, 2) == 160


def matrices(M: int, K: int, N: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random a [M, K] and b [K, N], stored as the forward pass, dX and dW find theirs, or with gaps between rows."""
    torch.manual_seed(0)
    if layout == "forward":
        return torch.randn(M, K), torch.randn(N, K).t()
    if layout == "dx":
        return torch.randn(M, K), torch.randn(K, N)
    if layout == "dw":
        return torch.randn(K, M).t(), torch.randn(K, N)
    return torch.randn(M, K + 7)[:, 3:-4], torch.randn(K, N + 5)[:, :N]


def error(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest deviation from the product in float64."""
    return (found - a.double() @ b.double()).abs().max().item()


@pytest.mark.parametrize("layout", ["forward", "dx", "dw", "gaps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_as_exact_as_pytorch(onednn, results, shape, layout):
    """Long sums are rounded worse than by MKL, or a layout is misread."""
    a, b = matrices(*shape, layout)
    assert products._suits(*shape, a)
    assert error(products.multiply(a, b), a, b) <= 2 * error(a @ b, a, b)


@pytest.mark.parametrize("K", [200, 700])
def test_bias_out_and_sum(onednn, results, K):
    """A bias is added once for each part of the sum, `out` is left alone, or a strided one is overrun."""
    a, b = matrices(328, K, 80, "forward")
    bias, expected = torch.randn(80), a.double() @ b.double()
    torch.testing.assert_close(products.multiply(a, b, bias).double(), expected + bias, rtol=1e-5, atol=1e-4)
    wide = torch.full((328, 100), torch.nan)
    assert products.multiply(a, b, bias, wide[:, :80]).data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[:, :80].double(), expected + bias, rtol=1e-5, atol=1e-4)
    assert wide[:, 80:].isnan().all()
    total = torch.ones(328, 80)
    products.add_multiply(total, a, b)
    torch.testing.assert_close(total.double(), expected + 1, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("M", "N", "K"), [(300, 130, 96), (256, 128, 64), (100, 257, 80), (1000, 40, 200), (600, 420, 70)]
)
@pytest.mark.parametrize("given", ["nothing", "a matrix", "columns of a matrix"])
def test_products_over_tokens(onednn, results, M, N, K, given):
    """Tokens beyond the last are added to a weight gradient, or live units beyond the last are written."""
    torch.manual_seed(0)
    dy, x = torch.randn(M, N + 3)[:, :N], torch.randn(M, K)
    assert products._suits(M, N, K, dy)
    for scratch in (products._LEFT, products._RIGHT):
        scratch.memory.fill_(255)  # all NaN
    wide = torch.full((N, K + 10), torch.nan)
    out = {"nothing": None, "a matrix": torch.empty(N, K), "columns of a matrix": wide[:, :K]}[given]
    found = products.over_tokens(dy, x, out)
    assert found.shape == (N, K)
    assert error(found, dy.t(), x) <= 2 * error(dy.t() @ x, dy.t(), x)
    assert wide[:, K:].isnan().all()


def test_sizes_are_rounded_up_to_few():
    """A size is rounded down, or to so many values that oneDNN compiles code for every batch."""
    sizes = range(1, 4097)
    rounded = [products.padded(size) for size in sizes]
    assert all(size <= found <= size + max(31, size / 8) for size, found in zip(sizes, rounded, strict=True))
    assert all(products.padded(found) == found for found in rounded)
    assert len(set(rounded)) <= 50


def test_batches_of_many_lengths_share_shapes(onednn, monkeypatch):
    """Every length of a batch has shapes of its own, and oneDNN compiles code for each of them."""
    shapes, linear = set(), products._linear

    def recording(a, w, bias):
        shapes.add((*a.shape, *w.shape, bias is None))
        return linear(a, w, bias)

    monkeypatch.setattr(products, "_linear", recording)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    counts, heads = torch.tensor([250, 201, 237]), torch.ones(3, 2, 4, dtype=torch.bool)
    neurons = torch.stack([(torch.rand(2, 512).argsort(1).argsort(1) < count) for count in counts])
    model = fm.attach(BertModel(config), fm.Subnetworks(["a", "b", "c"], heads, neurons))
    ids, lengths = torch.tensor([0] * 4 + [1] * 4 + [2] * 4), range(65, 97)
    for length in lengths:
        model(torch.randint(50, (12, length)), language_ids=ids)[0].sum().backward()
    assert len(shapes) <= 90  # hundreds if nothing is rounded


@pytest.mark.parametrize(("shape", "dtype"), [((4, 8, 8), torch.float32), ((128, 768, 80), torch.float64)])
def test_what_does_not_suit_stays_with_pytorch(onednn, shape, dtype):
    """float64 raises, or small products pay for a call that is longer than they are."""
    a, b = (t.to(dtype) for t in matrices(*shape, "forward"))
    assert torch.equal(products.multiply(a, b), a @ b)


def test_the_choice_can_be_made_by_hand(ask_for, monkeypatch):
    """The environment variable is ignored, a misspelt one accepted, or oneDNN used where it is switched off."""
    ask_for("torch")
    assert not products.by_onednn(torch.ones(1))
    ask_for("mkl")
    with pytest.raises(ValueError, match="'mkl'; expected torch or onednn"):
        products.by_onednn(torch.ones(1))
    ask_for("onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products.by_onednn(torch.ones(1))


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_wider_weights(onednn, kind):
    """float64 master weights under float32 activations reach oneDNN without being cast."""
    torch.manual_seed(2)
    N, K = 192, 512
    mask = {
        "rows": lambda: fm.Mask.rows(torch.rand(1, N) < 0.5, K),
        "columns": lambda: fm.Mask.columns(torch.rand(1, K) < 0.5, N),
        "blocks": lambda: fm.Mask.blocks(torch.rand(1, N // 64, K // 64) < 0.3, (64, 64)),
        "weights": lambda: fm.Mask.weights(torch.rand(1, N, K) < 0.5),
    }[kind]()
    x, weight = torch.randn(4, 100, K, requires_grad=True), torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    y = fm.masked_linear(x, weight, mask, torch.zeros(4, dtype=torch.int64))
    expected = x.double() @ (weight * mask.to_dense()[0]).t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert weight.grad.dtype == torch.float64


@pytest.mark.parametrize("kind", ["rows", "head rows", "columns", "head columns", "blocks", "weights"])
def test_a_masked_layer_by_onednn(onednn, kind):
    """A mask kind hands oneDNN the wrong part of a weight, forward or backward; mixed batch, 320 tokens a language."""
    torch.manual_seed(1)
    L, N, K = 3, 192, 320
    keep = {
        "rows": lambda: fm.Mask.rows(torch.rand(L, N) < 0.5, K),
        "head rows": lambda: fm.Mask.rows((torch.rand(L, N // 32) < 0.5).repeat_interleave(32, 1), K),
        "columns": lambda: fm.Mask.columns(torch.rand(L, K) < 0.5, N),
        "head columns": lambda: fm.Mask.columns((torch.rand(L, K // 32) < 0.5).repeat_interleave(32, 1), N),
        "blocks": lambda: fm.Mask.blocks(torch.rand(L, N // 64, K // 64) < 0.5, (64, 64)),
        "weights": lambda: fm.Mask.weights(torch.rand(L, N, K) < 0.5),
    }
    mask = keep[kind]()
    ids = torch.tensor([0, 2, 2, 0, 1, -1, 1, -1])
    x, weight, bias, upstream = (torch.randn(s) for s in [(8, 160, K), (N, K), (N,), (8, 160, N)])

    def run(multiply, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = multiply(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, upstream.to(dtype))]

    def literal(x, weight, bias):
        every = torch.cat([mask.to_dense(), torch.ones(1, N, K, dtype=torch.bool)])[ids]
        y = torch.einsum("btk,bnk->btn", x, weight * every)
        return y + (bias * every[:, :, 0])[:, None] if "rows" in kind else y + bias

    exact, plain = run(literal, torch.float64), run(literal, torch.float32)
    ours = run(lambda x, w, b: fm.masked_linear(x, w, mask, ids, b), torch.float32)
    for name, reference, theirs, found in zip(("y", "dx", "dw", "db"), exact, plain, ours, strict=True):
        allowed = 2 * (theirs - reference).abs().max()
        assert (found - reference).abs().max() <= allowed, name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastmask"


def quick(a, w):
    return a @ w.t()


def slow(a, w):
    for _ in range(3):
        y = a @ w.t()
    return y


def test_the_faster_library_is_taken(cache):
    """A processor's name decides, or the slower of the two is taken."""
    assert faster.faster(slow, quick)
    faster.answer_file().unlink()
    assert not faster.faster(quick, slow)


def test_the_first_answer_stands(cache):
    """A resumed run multiplies by another library than before, and ends with other bits."""
    first = faster.faster(slow, quick)
    assert faster.faster(quick, slow) == first
    assert [path.name for path in cache.iterdir()] == [faster.answer_file().name]


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"gains": [9, 9]}', '{"gains": ["a", 1, 1]}'])
def test_a_damaged_answer_is_found_anew(cache, content):
    """A file of the user's cache ends training, or is believed."""
    cache.mkdir()
    faster.answer_file().write_text(content)
    assert not faster.faster(quick, slow)
    assert len(faster._remembered(faster.answer_file())) == len(faster.SIZES)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """A home folder that is read-only ends training."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert faster.faster(slow, quick)
