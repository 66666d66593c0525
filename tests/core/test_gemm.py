"""Products with some rows of a weight, by PyTorch's own library and by oneDNN: right, and as exact as PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertModel

import fastmask as fm
from fastmask.torch_path import gemm
from fastmask.torch_path import onednn as onednn_file
from fastmask.torch_path import scratch as scratch_file
from fastmask.torch_path.measured import answer_file, gains

pytestmark = pytest.mark.skipif(not onednn_file._works(), reason="this PyTorch has no oneDNN")

SHAPES = [(300, 768, 256), (96, 1500, 100), (1024, 257, 23), (64, 255, 130), (2200, 300, 40)]  # M, K, N


@pytest.fixture
def ask_for(monkeypatch):
    """Sets the environment variable, which is otherwise read once."""

    def ask(library: str) -> None:
        monkeypatch.setenv("FASTMASK_PRODUCTS", library)
        onednn_file._chosen.cache_clear()

    yield ask
    onednn_file._chosen.cache_clear()


@pytest.fixture
def onednn(ask_for):
    """Every product that is large enough goes to oneDNN, whatever the processor."""
    ask_for("onednn")
    assert gemm.by_onednn(torch.ones(1))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest deviation from the product in float64."""
    return (found - exact).abs().max().item()


def plain_error(a: torch.Tensor, w: torch.Tensor, exact: torch.Tensor, add: bool = False) -> float:
    """That of the product a [M, K] @ w [K, N] by PyTorch, or by oneDNN itself where that is worse and does the work."""
    plain = [a @ w]
    if gemm.by_onednn(a):
        plain.append(onednn_file.linear(a.contiguous(), w.t().contiguous()))
    return max(error(product + add, exact) for product in plain)


def of_languages(size: int, S: int, stored: str, indexed: bool) -> tuple[torch.Tensor, gemm.Live | None, list]:
    """A weight [size, S], its rows or its columns in one piece each, and the rows of two languages, or all."""
    w = torch.randn(size, S) if stored == "rows" else torch.randn(S, size).t()
    if not indexed:
        return w, None, [torch.arange(size)]
    indices = [torch.randperm(size)[:n].sort().values for n in (size // 2, size // 2 - 7)]
    return w, gemm.Live(torch.cat(indices), [len(index) for index in indices]), indices


@pytest.fixture(params=["onednn", "torch"])
def library(request, ask_for):
    """Both libraries; scratch memory is full of NaN before."""
    ask_for(request.param)
    for scratch in (scratch_file.ROWS, scratch_file.LEFT, scratch_file.PRODUCT):
        scratch.memory, scratch.views = torch.full((2**24,), 255, dtype=torch.uint8), {}
    return request.param


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("indexed", [True, False], ids=["some", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_with_rows(library, shape, stored, indexed):
    """Long sums are as accurate as the library's own, in every layout, and nothing beside `out` is written."""
    torch.manual_seed(0)
    M, S, n = shape
    w, live, indices = of_languages(2 * n, S, stored, indexed)
    assert (gemm.by_onednn(w) and onednn_file.suits(M, n - 7, S)) == (library == "onednn")
    activations = [torch.randn(M + 9 * place, S) for place in range(len(indices))]
    wide = [torch.full((len(a), 2 * n + 9), torch.nan) for a in activations]
    parts = [out[:, : len(index)] for out, index in zip(wide, indices, strict=True)]
    gemm.products(activations, w, live, parts, transposed=True)
    for a, index, out in zip(activations, indices, wide, strict=True):
        exact = a.double() @ w[index].double().t()
        assert error(out[:, : len(index)], exact) <= 2 * plain_error(a, w[index].t(), exact)
        assert out[:, len(index) :].isnan().all()


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("indexed", [True, False], ids=["some", "all"])
@pytest.mark.parametrize("add", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("shape", SHAPES)
def test_combinations_of_rows(library, shape, stored, indexed, add):
    """So are sums over live units; what was there is added to."""
    torch.manual_seed(0)
    M, n, S = shape
    w, live, indices = of_languages(2 * n, S, stored, indexed)
    activations = [torch.randn(M + 9, len(index) + 3)[:, : len(index)] for index in indices]
    outs = [torch.full((len(a), S), 1.0 if add else torch.nan) for a in activations]
    gemm.products(activations, w, live, outs, add=add)
    for a, index, out in zip(activations, indices, outs, strict=True):
        exact = a.double() @ w[index].double() + add
        assert error(out, exact) <= 2 * plain_error(a, w[index], exact, add)


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("indexed", [True, False], ids=["some", "all"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "added"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outer_products(library, shape, stored, indexed, fresh):
    """A weight gradient sums its own tokens and no others, and no dead row of it is written."""
    torch.manual_seed(0)
    S, M, n = shape
    grad, live, indices = of_languages(2 * n, S, stored, indexed)
    exact, plain = (torch.zeros_like(w) if fresh else w.clone() for w in (grad.double(), grad))
    activations = [torch.randn(M + place, len(index) + 3)[:, :-3] for place, index in enumerate(indices)]
    others = [torch.randn(len(a), S) for a in activations]
    if fresh:
        grad.fill_(torch.nan)
    gemm.add_outer(grad, live, activations, others, fresh)
    for a, c, index in zip(activations, others, indices, strict=True):
        exact[index] += a.double().t() @ c.double()
        plain[index] += a.t() @ c
    assert error(grad, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_training_after_inference_mode(library, kind):
    """What products keep between calls can be used in training, even if inference mode made it."""
    mask = {
        "rows": lambda: fm.Mask.rows(torch.rand(3, 64) < 0.5, 40),
        "columns": lambda: fm.Mask.columns(torch.rand(3, 40) < 0.5, 64),
        "blocks": lambda: fm.Mask.blocks(torch.rand(3, 4, 5) < 0.5, (16, 8)),
        "weights": lambda: fm.Mask.weights(torch.rand(3, 64, 40) < 0.5),
    }[kind]()
    for scratch in (scratch_file.ROWS, scratch_file.LEFT, scratch_file.PRODUCT):
        scratch.memory, scratch.views = torch.empty(0, dtype=torch.uint8), {}
    x, weight, ids = torch.randn(4, 301, 40), torch.randn(64, 40, requires_grad=True), torch.tensor([0, 1, 2, -1])
    with torch.inference_mode():
        expected = fm.masked_linear(x, weight, mask, ids)
    y = fm.masked_linear(x, weight, mask, ids)
    y.sum().backward()
    assert torch.equal(y.detach(), expected.clone())
    assert weight.grad.any()


def test_sizes_are_rounded_up_to_few():
    """Sizes are rounded up, to so few values that oneDNN need not compile code for every batch."""
    sizes = range(1, 4097)
    rounded = [onednn_file.padded(size) for size in sizes]
    assert all(size <= found <= size + max(31, size / 8) for size, found in zip(sizes, rounded, strict=True))
    assert all(onednn_file.padded(found) == found for found in rounded)
    assert len(set(rounded)) <= 50


def test_batches_of_many_lengths_share_shapes(onednn, monkeypatch):
    """Batches of many lengths share a few shapes, for which oneDNN compiles code once."""
    shapes, linear = set(), onednn_file.linear

    def recording(a, w):
        shapes.add((*a.shape, *w.shape, w.stride(0) == 1))
        return linear(a, w)

    monkeypatch.setattr(onednn_file, "linear", recording)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    counts, heads = torch.tensor([250, 201, 237]), torch.ones(3, 2, 4, dtype=torch.bool)
    neurons = torch.stack([(torch.rand(2, 512).argsort(1).argsort(1) < count) for count in counts])
    model = fm.attach(BertModel(config), fm.Subnetworks(["a", "b", "c"], heads, neurons))
    ids, lengths = torch.tensor([0] * 4 + [1] * 4 + [2] * 4), range(65, 97, 2)
    for length in lengths:
        model(torch.randint(50, (12, length)), language_ids=ids)[0].sum().backward()
    assert len(shapes) <= 90  # hundreds if nothing is rounded


@pytest.mark.parametrize(("shape", "dtype"), [((4, 8, 8), torch.float32), ((128, 768, 80), torch.float64)])
def test_what_does_not_suit_stays_with_pytorch(onednn, shape, dtype):
    """float64 and small products, for which a call costs too much, stay with PyTorch."""
    M, K, N = shape
    a, w, out = (torch.randn(size, dtype=dtype) for size in ((M, K), (N, K), (M, N)))
    gemm.products([a], w, None, [out], transposed=True)
    assert torch.equal(out, a @ w.t())


def test_the_choice_can_be_made_by_hand(ask_for, monkeypatch):
    """The environment variable decides, and a misspelt value is refused."""
    ask_for("torch")
    assert not gemm.by_onednn(torch.ones(1))
    ask_for("mkl")
    with pytest.raises(ValueError, match="'mkl'; expected torch or onednn"):
        gemm.by_onednn(torch.ones(1))
    ask_for("onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not gemm.by_onednn(torch.ones(1))


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_wider_weights(onednn, kind):
    """float64 master weights under float32 activations are cast before oneDNN gets them."""
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
    """Each mask kind hands oneDNN its own part of a weight, forward and backward; 320 tokens a language."""
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
    """The library that was measured to be faster is taken, whatever the processor is called."""
    assert min(gains("any", slow, quick)) > 1
    answer_file("any").unlink()
    assert max(gains("any", quick, slow)) < 1


def test_the_first_answer_stands(cache):
    """A resumed run multiplies by the library it began with, and so ends with the same bits."""
    first = gains("any", slow, quick)
    assert gains("any", quick, slow) == first
    assert [path.name for path in cache.iterdir()] == [answer_file("any").name]


CONTENTS = ["", "{", "[1.5, 2.5]", "[1, 2, 3]", '["a", 1.5, 2.5]', '{"a": 1.5, "b": 2.5, "c": 2.5}', "3"]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_answer_is_found_anew(cache, content):
    """A damaged file in the user's cache is measured again."""
    cache.mkdir()
    answer_file("any").write_text(content)
    found = gains("any", quick, slow)
    assert max(found) < 1
    assert json.loads(answer_file("any").read_text()) == found


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """Training works where the home folder is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert min(gains("any", slow, quick)) > 1


def test_it_is_measured_as_asked(cache):
    """Whoever asks first may be under autocast, which would multiply in another dtype than is asked about."""
    seen = set()

    def product(a, w):
        seen.add((a @ w.t()).dtype)

    with torch.autocast("cpu", torch.bfloat16):
        gains("any", product, product, (torch.float32, torch.float16))
    assert seen == {torch.float32, torch.float16}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_languages_that_are_alike(ask_for, stored, threads):
    """Rows that fill a language up count as zeros, whatever the activations hold there, and get no gradient."""
    ask_for("torch")
    torch.manual_seed(0)
    before, size, S, M, own = torch.get_num_threads(), 64, 40, 30, [32, 29, 0, 31, 30]
    w = torch.randn(size, S).double() if stored == "rows" else torch.randn(S, size).double().t()
    indices = [torch.randperm(size)[:32] for _ in own]
    live = gemm.Live(torch.cat(indices), [32] * len(own), own)
    xs, masked = torch.randn(len(own), M, S).double(), torch.randn(len(own), M, 35).double()
    ys, dxs, grad = torch.full_like(masked, torch.nan), torch.ones_like(xs), torch.full_like(w, torch.nan)
    torch.set_num_threads(threads)
    try:
        gemm.products([*xs], w, live, [y[:, :32] for y in ys], transposed=True)
        gemm.products([a[:, :32] for a in masked], w, live, [*dxs], add=True)
        gemm.add_outer(grad, live, [a[:, :32] for a in masked], [*xs], fresh=True)
    finally:
        torch.set_num_threads(before)
    dw = torch.zeros_like(w)
    for x, a, y, dx, index, n in zip(xs, masked, ys, dxs, indices, own, strict=True):
        rows = w[index[:n]]
        torch.testing.assert_close(y[:, :32], torch.nn.functional.pad(x @ rows.t(), (0, 32 - n)))
        assert y[:, 32:].isnan().all()
        torch.testing.assert_close(dx, 1 + a[:, :n] @ rows)
        dw[index[:n]] += a[:, :n].t() @ x
    torch.testing.assert_close(grad, dw)
