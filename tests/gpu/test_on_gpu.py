"""Every operator and gradient on real hardware, in all dtypes, against float64.

The rule: at most twice as far from float64 as plain PyTorch in the same dtype. Deep float32 sums are tried on small
integers instead, which are exact in any order: there both sides' errors are a matter of how a sum is cut, and results
must be equal.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("no GPU here: these tests are for real hardware", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from oracle import assert_close, gathered, random_mask, spread

import fastmask as fm
from benchmarks.baselines import Task, loop
from benchmarks.gpu.sections import (
    ACTIVATIONS,
    CASES,
    DTYPES,
    KINDS,
    PACKED,
    PROJECTIONS,
    SHALLOW,
    cases,
    sides,
    tiny_models,
)
from fastmask.operators import run
from fastmask.torch_path.layers import Layers, activate
from fastmask.torch_path.naive import masked_linear_naive

DEVICE = "cuda"
ROOT = Path(__file__).parents[2]


class Problem:
    """A layer, its masks and a batch, with upstream gradient; integers on request."""

    def __init__(self, kind: str, case: str, dtypes: str, integers: bool = False) -> None:
        L, ids, T, N, K = CASES[case]
        N, K = sides(kind, N, K)
        kind, unit = KINDS[kind]
        generator = torch.Generator().manual_seed(0)
        self.mask = random_mask(kind, L, N, K, unit=unit).to(DEVICE)
        self.ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
        act, own = DTYPES[dtypes]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtypes == "tf32" else "ieee"

        def draw(dtype: torch.dtype, *shape: int) -> Tensor:
            if integers:  # -2, -1, 1, 2: no product is zero
                values = torch.randint(0, 4, shape, generator=generator)
                return torch.tensor([-2.0, -1.0, 1.0, 2.0])[values].to(DEVICE, dtype)
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        B = len(ids)
        self.x, self.dy = draw(act, B, T, K), draw(act, B, T, N)
        self.weight, self.bias = draw(own, N, K), draw(own, N)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x, weight and bias as fresh leaves, in one dtype or as they are."""
        tensors = (self.x, self.weight, self.bias)
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]

    def results(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
        """y, dX, dW, db of `function(x, weight, bias)`."""
        leaves = self.leaves(dtype)
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def ours(self) -> list[Tensor]:
        """What is tested, in memory full of NaN."""
        poison()
        return self.results(lambda x, w, b: fm.masked_linear(x, w, self.mask, self.ids, b))

    def truth(self) -> list[Tensor]:
        """float64."""
        return self.results(lambda x, w, b: masked_linear_naive(x, w, self.mask, self.ids, b), torch.float64)

    def plain(self) -> list[Tensor]:
        """Plain PyTorch in the activations' dtype; a wider weight is cast first, as autocast does."""
        task = Task(self.mask, self.ids)
        return self.results(lambda x, w, b: loop(x, w.to(x.dtype), task, b.to(x.dtype)))


@pytest.fixture(autouse=True)
def _exact_products():
    """TF32 is for the problems that ask for it."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def poison() -> None:
    """Fill memory that the allocator will hand out next with NaN: what a kernel does not write shows."""
    held = [torch.full((2**power,), torch.nan, device=DEVICE) for power in range(7, 24) for _ in range(2)]
    del held


def assert_all(names: tuple[str, ...], ours: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    for name, found, exact, reference in zip(names, ours, truth, plain, strict=True):
        assert_close(name, found, exact, reference)


NAMES = ("y", "dX", "dW", "db")


@pytest.mark.parametrize(("kind", "case"), cases())
@pytest.mark.parametrize("dtypes", DTYPES)
def test_layer(kind, dtypes, case):
    """A layer or one of its gradients is less accurate on a GPU than plain PyTorch, or plainly wrong."""
    if dtypes == "tf32" or (dtypes == "fp32" and (case not in SHALLOW or kind == "blocks64")):
        pytest.skip("TF32, and deep float32 sums: see test_sums_are_exact")
    problem = Problem(kind, case, dtypes)
    assert_all(NAMES, problem.ours(), problem.truth(), problem.plain())


@pytest.mark.parametrize(("kind", "case"), cases())
@pytest.mark.parametrize("dtypes", ["fp32", "tf32", "bf16"])
def test_sums_are_exact(kind, dtypes, case):
    """Every product is counted once, at its place: integers leave no room for rounding."""
    problem = Problem(kind, case, dtypes, integers=True)
    for name, ours, truth in zip(NAMES, problem.ours(), problem.truth(), strict=True):
        assert torch.equal(ours, truth.to(ours.dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    """A batch without examples fails, or leaves gradients that nobody wrote."""
    problem = Problem(kind, "tiny", "bf16")
    problem.x, problem.dy, problem.ids = problem.x[:0], problem.dy[:0], problem.ids[:0]
    y, dx, dw, db = problem.ours()
    assert (y.shape, dx.shape) == (problem.dy.shape, problem.x.shape)
    assert not dw.any()
    assert not db.any()


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    """Results do not depend on the order in which programs finish."""
    for case in ("wide", "aligned"):
        problem = Problem(kind, case, "bf16")
        first, *others = (problem.ours() for _ in range(3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "master"])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("kind", ["rows", "columns", "heads", "columns of heads"])
def test_packed(kind, case, dtypes):
    """Layers of an attached model, whose live units lie in front, read and write the right places."""
    p = Problem(kind, case, dtypes)
    rows = p.mask.kind == "rows"
    width = p.mask.out_features if rows else p.mask.in_features
    if -1 not in p.ids.tolist():
        width = max(p.mask.live_counts()[language] for language in p.ids.tolist())
    width += 16  # wider than any language: zeros behind
    if rows:
        dy = gathered(p.dy, p.mask, p.ids, width)
        p.dy = spread(dy, p.mask, p.ids, p.mask.out_features)
        dy = torch.where(gathered(torch.ones_like(p.dy), p.mask, p.ids, width) > 0, dy, 7)  # must not be read
    else:
        x = gathered(p.x, p.mask, p.ids, width)
        p.x, dy = spread(x, p.mask, p.ids, p.mask.in_features), p.dy
    truth, plain = p.truth(), p.plain()
    packed = 0 if rows else 1
    for results in (truth, plain):
        results[packed] = gathered(results[packed], p.mask, p.ids, width)
    leaves = p.leaves()
    if not rows:
        leaves[0] = x.requires_grad_()
    poison()
    y = run(Layers([p.mask], [width]), leaves[0], [leaves[1]], [leaves[2]], p.ids)[0]
    assert_all(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, dy)], truth, plain)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "fp32", "master"])
def test_activation(dtypes, case, activation):
    """A packed layer applies its input's activation, and the derivative, to the right units, accurately."""
    p = Problem("columns", case, dtypes)
    width = max(p.mask.live_counts()) + 16
    x = gathered(p.x, p.mask, p.ids, width)
    p.x = spread(x, p.mask, p.ids, p.mask.in_features)
    task = Task(p.mask, p.ids)

    def plainly(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return loop(activate(x, activation), w.to(x.dtype), task, b.to(x.dtype))

    truth = p.results(lambda x, w, b: masked_linear_naive(activate(x, activation), w, p.mask, p.ids, b), torch.float64)
    plain = p.results(plainly)
    for results in (truth, plain):
        results[1] = gathered(results[1], p.mask, p.ids, width)
    leaves = p.leaves()
    leaves[0] = x.requires_grad_()
    poison()
    y = run(Layers([p.mask], [width], activation), leaves[0], [leaves[1]], [leaves[2]], p.ids)[0]
    assert_all(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, p.dy)], truth, plain)


@pytest.mark.parametrize("n_weights", [2, 3])
@pytest.mark.parametrize("unit", PROJECTIONS[1])
@pytest.mark.parametrize("dtypes", ["bf16", "fp16", "master"])
def test_projections(dtypes, unit, n_weights):
    """Q, K and V (gate and up) in one launch get each other's weights, masks or gradients."""
    case, sizes, K = PROJECTIONS
    p, sizes = Problem("rows", case, dtypes), sizes[unit][:n_weights]
    generator = torch.Generator().manual_seed(1)
    masks = [random_mask("rows", 8, n, K, unit=unit, seed=seed).to(DEVICE) for seed, n in enumerate(sizes)]
    own, act = p.weight.dtype, p.x.dtype
    weights = [torch.randn(n, K, generator=generator).to(DEVICE, own) for n in sizes]
    biases = [torch.randn(n, generator=generator).to(DEVICE, own) for n in sizes]
    widths = [max(mask.live_counts()) for mask in masks]
    dys = [torch.randn(*p.x.shape[:2], n, generator=generator).to(DEVICE, act) for n in sizes]
    packed_dys = [gathered(dy, mask, p.ids, w) for dy, mask, w in zip(dys, masks, widths, strict=True)]

    def results(function, dtype=None):  # type: ignore[no-untyped-def]
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (p.x, *weights, *biases)]
        ys = function(leaves[0], leaves[1 : 1 + n_weights], leaves[1 + n_weights :])
        upstream = [dy.to(y.dtype) for dy, y in zip(packed_dys, ys, strict=True)]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, upstream)]

    def separately(function):  # type: ignore[no-untyped-def]
        return lambda x, ws, bs: [
            gathered_with_grad(function(x, w, mask, b), mask, p.ids, width)
            for w, mask, b, width in zip(ws, masks, bs, widths, strict=True)
        ]

    poison()
    ours = results(lambda x, ws, bs: run(Layers(masks, widths), x, ws, bs, p.ids))
    truth = results(separately(lambda x, w, mask, b: masked_linear_naive(x, w, mask, p.ids, b)), torch.float64)
    plain = results(separately(lambda x, w, mask, b: loop(x, w.to(x.dtype), Task(mask, p.ids), b.to(x.dtype))))
    names = [f"y{g}" for g in range(n_weights)] + ["dX"] + [f"d{v}{g}" for v in "Wb" for g in range(n_weights)]
    assert_all(tuple(names), ours, truth, plain)


def gathered_with_grad(y: Tensor, mask: fm.Mask, ids: Tensor, width: int) -> Tensor:
    """`gathered`, differentiable."""
    counts, parts = mask.live_counts(), []
    for b, language in enumerate(ids.tolist()):
        live = y[b].index_select(-1, mask.index[language, : counts[language]])
        parts.append(torch.nn.functional.pad(live, (0, width - live.shape[-1])))
    return torch.stack(parts)


def layer_of(problem: Problem) -> fm.MaskedLinear:
    """`MaskedLinear` with a problem's weight."""
    N, K = problem.weight.shape
    layer = fm.MaskedLinear(K, N, problem.mask, device=DEVICE, dtype=problem.weight.dtype)
    layer.weight, layer.bias = nn.Parameter(problem.weight), nn.Parameter(problem.bias)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(kind):
    """A training step can be captured, and a replay uses the languages of its own batch."""
    p = Problem(kind, "wide", "bf16")
    layer, x, ids, dy = layer_of(p), p.x.clone().requires_grad_(), p.ids.clone(), p.dy.clone()
    leaves = [x, layer.weight, layer.bias]

    def step() -> list[Tensor]:
        y = layer(x, ids)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for new_ids in ([0, 0, 0, 0, 0, 0, 0], [-1, 7, 6, 5, 1, 2, 3]):
        with torch.no_grad():
            ids.copy_(torch.tensor(new_ids))
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        replayed = [result.clone() for result in results]
        torch.cuda.synchronize()
        p.x, p.ids, p.dy = x.detach(), ids, dy
        assert_all(NAMES, replayed, p.truth(), p.plain())
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind):
    """No forward or backward pass makes the host wait for the device."""
    p = Problem(kind, "wide", "bf16")
    layer, x = layer_of(p), p.x.clone().requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    torch.autograd.grad(layer(x, p.ids), leaves, p.dy)  # what is made once for each mask and each shape may wait
    new_ids = p.ids.flip(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(layer(x, new_ids), leaves, p.dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


OUT_OF_RANGE = """
import torch
import fastmask as fm
from pathlib import Path
torch.manual_seed(0)
mask = {mask}.to("cuda")
x = torch.randn(2, 4, 64, device="cuda", requires_grad=True)
weight = torch.randn(64, 64, device="cuda", requires_grad=True)
try:
    y = fm.masked_linear(x, weight, mask, torch.tensor([0, {language}], device="cuda"))
    y.sum().backward()
    torch.cuda.synchronize()
    print("went through")
except RuntimeError as error:
    print("RuntimeError:", error)
"""


@pytest.mark.parametrize("language", [3, 10**9, -2])
@pytest.mark.parametrize(
    "mask",
    [
        "fm.Mask.rows(torch.rand(3, 64) < 0.5, 64)",
        "fm.Mask.columns(torch.rand(3, 64) < 0.5, 64)",
        "fm.Mask.weights(torch.rand(3, 64, 64) < 0.5)",
    ],
    ids=["rows", "columns", "weights"],
)
def test_ids_out_of_range(mask, language):
    """A wrong language id is reported, and reads no foreign memory."""
    code = OUT_OF_RANGE.format(mask=mask, language=language)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    said = done.stdout + done.stderr
    assert "device-side assert" in said, said[-2000:]
    assert "illegal memory access" not in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_attached_model(name, dtype, monkeypatch):
    """A whole model with packed heads and neurons computes the same on a GPU as on a CPU."""
    from transformers import AutoModel

    config = tiny_models()[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(config).to(dtype)
    subnets = fm.Subnetworks.random(config, ["a", "b", "c"], 0.5, seed=0, units="both")
    tokens, ids = torch.randint(0, 50, (5, 6)), torch.tensor([2, 0, 0, -1, 1])
    upstream = torch.randn(5, 6, config.hidden_size).to(dtype)

    def run(backend: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        monkeypatch.setattr("fastmask.operators.FORCED", backend)
        own = fm.attach(copy.deepcopy(model), subnets).to(device, dtype)
        y = own(input_ids=tokens.to(device), language_ids=ids)[0]
        y.backward(upstream.to(device, dtype))
        grads = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
        return {"output": y.detach(), **grads}

    truth = run("torch", "cpu", torch.float64)
    plain, ours = run("torch", DEVICE, dtype), run("triton", DEVICE, dtype)
    assert ours.keys() == truth.keys()
    for key, exact in truth.items():
        # A key's bias adds the same to all scores of a query: its gradient is 0, and all that is left is rounding.
        if not key.endswith("key.bias"):
            assert_close(key, ours[key].cpu(), exact, plain[key].cpu())


@pytest.mark.parametrize("how", ["moved", "loaded", "emptied", "there and back"])
def test_masks_follow_their_weights(how):
    """However weights get to the GPU, their masks are there, with the values they had."""
    from transformers import AutoModel

    config, ids = tiny_models()["llama"], torch.tensor([2, 0, 0, -1, 1])
    torch.manual_seed(0)
    plain = AutoModel.from_config(config).double()
    subnets = fm.Subnetworks.random(config, ["a", "b", "c"], 0.5, seed=0, units="both")
    tokens = torch.randint(0, 50, (5, 6))
    expected = fm.attach(copy.deepcopy(plain), subnets)(input_ids=tokens, language_ids=ids)[0]
    model = fm.attach(copy.deepcopy(plain), subnets)
    before = [layer.mask.to_dense() for layer in model.modules() if isinstance(layer, fm.MaskedLinear)]
    if how == "moved":
        model.to(DEVICE)
    elif how == "there and back":
        model.to(DEVICE).to("cpu").to(DEVICE)
    elif how == "loaded":
        on_gpu = {name: value.to(DEVICE) for name, value in plain.state_dict().items()}
        model.load_state_dict(on_gpu, assign=True)
        model.rotary_emb.to(DEVICE)
    else:
        buffers = dict(plain.named_buffers())
        model.to("meta").to_empty(device=DEVICE).load_state_dict(plain.state_dict())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    after = [layer.mask for layer in model.modules() if isinstance(layer, fm.MaskedLinear)]
    assert {mask.device.type for mask in after} == {DEVICE}
    assert all(torch.equal(mask.to_dense().cpu(), dense) for mask, dense in zip(after, before, strict=True))
    found = model(input_ids=tokens.to(DEVICE), language_ids=ids)[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
