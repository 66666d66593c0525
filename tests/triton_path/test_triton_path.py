"""The Triton path equals the torch path: through the public function, and through attached models."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
import warnings
import weakref

import pytest
import torch
from covering import covering
from fastmask_kernels import chips
from fastmask_kernels.interpreter import interpreter_problem
from transformers import AutoModel, BertConfig, LlamaConfig

import fastmask as fm
from fastmask import operators, triton_path
from fastmask.masks import UNPACKED
from fastmask.torch_path import layers as torch_layers
from fastmask.torch_path.layers import Layers
from fastmask.triton_path import layers as triton_layers
from fastmask.triton_path import tables

pytestmark = pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ALL_KINDS = ["rows", "columns", "blocks", "weights"]
PATHS = ("triton", "torch")
L, N, K = 4, 32, 48
MIXED = [2, 0, 0, 1, -1, 2, 0]  # scattered, an empty language (1), a full one (2), an absent one (3), the full network
IDS = {"mixed": MIXED, "one": [0, 0], "dead": [1, 1], "full": [-1], "empty": []}


def mask_of(kind):
    torch.manual_seed(0)
    keep = {"rows": (N // 8,), "columns": (K // 8,), "blocks": (N // 16, K // 16), "weights": (N, K)}[kind]
    keep = torch.rand(L, *keep) < 0.5
    keep[1], keep[2] = False, True
    if kind == "rows":
        return fm.Mask.rows(keep.repeat_interleave(8, 1), K).to(DEVICE)
    if kind == "columns":
        return fm.Mask.columns(keep.repeat_interleave(8, 1), N).to(DEVICE)
    return (fm.Mask.blocks(keep, (16, 16)) if kind == "blocks" else fm.Mask.weights(keep)).to(DEVICE)


def on(backend, monkeypatch, function):
    monkeypatch.setattr(operators, "FORCED", backend)
    return function()


def gradients_of(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    torch.manual_seed(1)
    upstream = torch.randn(y.shape, device=y.device).half().to(y.dtype)  # the same in every dtype
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "ids", "shape"),
    covering(ALL_KINDS, IDS, {"tokens": (5,), "no_tokens": (), "two_axes": (2, 3)}, strength=2, whole=ON_GPU),
)
def test_masked_linear(kind, ids, shape, monkeypatch):
    """A layer computes the same on a GPU as on a CPU."""
    mask, ids = mask_of(kind), torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((len(ids), *shape, K), (N, K), (N,)))

    def run():
        return gradients_of(lambda x, w, b: fm.masked_linear(x, w, mask, ids, b), x, weight, bias)

    assert_equal(on("triton", monkeypatch, run), on("torch", monkeypatch, run))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("bias", [torch.arange(2.0 * N)[::2], torch.full((1,), 2.0).expand(N)], ids=["strided", "one"])
def test_a_bias_with_gaps(kind, bias, monkeypatch):
    """A bias is read as it lies in memory, whatever its strides."""
    mask, ids, bias = mask_of(kind), torch.tensor(MIXED, device=DEVICE), bias.to(DEVICE)
    x, weight = torch.randn(len(ids), 5, K, device=DEVICE), torch.randn(N, K, device=DEVICE)
    ours, theirs = (on(path, monkeypatch, lambda: fm.masked_linear(x, weight, mask, ids, bias)) for path in PATHS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ids_on_the_host_are_looked_at(monkeypatch):
    """Ids on the host are those of the call, whoever wrote them, and an unknown one is an error."""
    numbers = torch.tensor(MIXED).numpy()
    ids, mask = torch.from_numpy(numbers), mask_of("rows")
    x, weight = torch.randn(len(ids), 5, K, device=DEVICE), torch.randn(N, K, device=DEVICE, requires_grad=True)
    for _ in range(2):
        ours, theirs = (on(path, monkeypatch, lambda: fm.masked_linear(x, weight, mask, ids)) for path in PATHS)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        numbers[:] = numbers[::-1].copy()
    y = on("triton", monkeypatch, lambda: fm.masked_linear(x, weight, mask, ids))
    expected = on("triton", monkeypatch, lambda: fm.masked_linear(x, weight, mask, torch.tensor(numbers)))
    numbers[:] = 0
    ours, theirs = (torch.autograd.grad(result.sum(), weight) for result in (y, expected))
    assert torch.equal(*ours, *theirs)
    numbers[3] = L
    with pytest.raises(ValueError, match=rf"language_ids\[3\] is {L}; expected 0 to {L - 1}"):
        on("triton", monkeypatch, lambda: fm.masked_linear(x, weight, mask, ids))


def test_gradients_of_several_layers_count_as_written_one_by_one(monkeypatch):
    """Adding to the gradient of the query projection does not mark that of the key as changed."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    masks = [mask_of("rows") for _ in range(3)]
    weights = [torch.randn(N, K, device=DEVICE, requires_grad=True) for _ in masks]
    x = torch.randn(len(MIXED), 5, K, device=DEVICE)
    ids = torch.tensor(MIXED, device=DEVICE)
    ys = operators.run(Layers(masks, [UNPACKED] * 3), x, weights, [], ids)
    grads = torch.autograd.grad(sum(y.sum() for y in ys), weights)
    before = [grad._version for grad in grads]
    grads[0].add_(1)
    assert [grad._version for grad in grads][1:] == before[1:]


@pytest.mark.parametrize(
    ("kind", "ids", "shape"), covering(ALL_KINDS, IDS, {"tokens": (5,), "two_axes": (2, 3)}, whole=ON_GPU)
)
def test_sparse_update_linear(kind, ids, shape, monkeypatch):
    """A layer that runs whole, and learns under masks, is the same on a GPU as on a CPU."""
    mask, ids = mask_of(kind), torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((len(ids), *shape, K), (N, K), (N,)))

    def run():
        return gradients_of(lambda x, w, b: fm.sparse_update_linear(x, w, mask, ids, b), x, weight, bias)

    assert_equal(on("triton", monkeypatch, run), on("torch", monkeypatch, run))


@pytest.mark.parametrize(("kind", "trained"), covering(ALL_KINDS, ["x", "weight", "bias"], whole=ON_GPU))
def test_sparse_updates_in_half_precision(kind, trained, monkeypatch):
    """With float32 weights, half-precision y, dX, dW and db are as close to float64 as those of plain PyTorch."""
    mask, ids = mask_of(kind), torch.tensor(MIXED, device=DEVICE)
    leaves = [torch.randn(*size, device=DEVICE) for size in ((len(MIXED), 5, K), (N, K), (N,))]
    leaves[0] = leaves[0].half()
    leaves = [leaf.requires_grad_(name == trained) for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True)]
    place = ("x", "weight", "bias").index(trained)

    def run(leaves):
        x, w, b = leaves
        y = fm.sparse_update_linear(x, w, mask, ids, b)
        torch.manual_seed(1)
        upstream = torch.randn(y.shape, device=y.device).half().to(y.dtype)
        return y.detach(), torch.autograd.grad(y, leaves[place], upstream)[0]

    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    ours, plain = (on(path, monkeypatch, lambda: run(leaves)) for path in ("triton", "torch"))
    truth = on("torch", monkeypatch, lambda: run(exact))
    for name, a, wanted, b in zip(("y", trained), ours, truth, plain, strict=True):
        assert a.dtype == b.dtype
        error, allowed = (a.double() - wanted).norm(), 2 * (b.double() - wanted).norm()
        assert error <= allowed + torch.finfo(a.dtype).eps * wanted.norm(), name


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_of_a_compiled_model(kind, dtype, monkeypatch):
    """A compiled model gets the gradients of an eager one; none shares memory with another, which torch refuses."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    mask, ids, G = mask_of(kind), torch.tensor(MIXED, device=DEVICE), 3 if kind == "rows" else 1
    x = torch.randn(len(MIXED), 5, K, device=DEVICE, dtype=dtype)
    leaves = [torch.randn(*size, device=DEVICE, dtype=dtype) for size in [(N, K)] * G + [(N,)] * G]
    about = [mask.index] * G, [mask.extents] * G, kind, [*mask.geometry, 0][:2] * G, L, [UNPACKED] * G, "", False

    def eager(x, *leaves):
        return torch.cat([fm.masked_linear(x, leaves[g], mask, ids, leaves[G + g]) for g in range(G)], 2)

    def traced(x, *leaves):
        leaves = list(leaves)
        return torch.cat(torch.ops.fastmask.masked_linear(x, leaves[:G], leaves[G:], ids, *about), 2)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(gradients_of(traced, x, *leaves), gradients_of(eager, x, *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "ids", "packed"),
    covering(["rows", "columns"], IDS, {"unpacked": False, "packed": True}, whole=ON_GPU),
)
def test_heads(kind, ids, packed, monkeypatch):
    """Masks over whole heads, whose dW has a kernel of its own, give the same on both paths."""
    torch.manual_seed(0)
    keep = torch.rand(L, 3) < 0.5
    keep[1], keep[2] = False, True
    keep, ids = keep.repeat_interleave(64, 1), torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    mask = (fm.Mask.rows(keep, K) if kind == "rows" else fm.Mask.columns(keep, N)).to(DEVICE)
    assert mask.geometry == (64,)
    shape = (192, K) if kind == "rows" else (N, 192)
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((len(ids), 5, shape[1]), shape, shape[:1]))
    width = 192 if packed else UNPACKED  # as the full network needs
    if packed and kind == "columns":
        for b, language in enumerate(ids.tolist()):
            x[b, :, 192 if language < 0 else mask.live_counts()[language] :] = 0

    def run():
        return gradients_of(
            lambda x, w, b: operators.run(Layers([mask], [width]), x, [w], [b], ids)[0], x, weight, bias
        )

    assert_equal(on("triton", monkeypatch, run), on("torch", monkeypatch, run))


def packed_problem(kind, dtype=torch.float32, weight_dtype=torch.float32):
    """(mask, ids, packed width, x, weight, bias) as a packed projection gets them."""
    mask, ids = mask_of(kind), torch.tensor([2, 0, 0, 1, 2], device=DEVICE)
    width = max(mask.live_counts())
    x = torch.randn(5, 3, K if kind == "rows" else width, device=DEVICE)
    if kind == "columns":  # as the packed projection before it leaves it
        for b, language in enumerate(ids.tolist()):
            x[b, :, mask.live_counts()[language] :] = 0
    weight, bias = torch.randn(N, K, device=DEVICE), torch.randn(N, device=DEVICE)
    return mask, ids, width, x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_packed_with_an_activation(kind, activation, monkeypatch):
    """A packed projection, and the activation that it recomputes, are the same on both paths."""
    mask, ids, width, *leaves = packed_problem(kind)

    def run():
        return gradients_of(
            lambda x, w, b: operators.run(Layers([mask], [width], activation), x, [w], [b], ids)[0], *leaves
        )

    assert_equal(on("triton", monkeypatch, run), on("torch", monkeypatch, run))


@pytest.mark.parametrize(
    ("kind", "activation", "weight_dtype"),
    covering(
        ["rows", "columns"], ["gelu", "relu"], {"same": torch.float16, "master": torch.float32},
        strength=2, whole=ON_GPU,
    ),
)  # fmt: skip
def test_an_activation_in_half_precision(kind, activation, weight_dtype, monkeypatch):
    """Y, dX, dW and db of a layer that applies its input's activation are as close to float64 as plain PyTorch's."""
    mask, ids, width, *leaves = packed_problem(kind, torch.float16, weight_dtype)

    def run(*leaves):
        return gradients_of(
            lambda x, w, b: operators.run(Layers([mask], [width], activation), x, [w], [b], ids)[0], *leaves
        )

    ours, plain = (on(path, monkeypatch, lambda: run(*leaves)) for path in ("triton", "torch"))
    truth = on("torch", monkeypatch, lambda: run(*[leaf.double() for leaf in leaves]))
    for name, a, exact, b in zip(("y", "dX", "dW", "db"), ours, truth, plain, strict=True):
        assert a.dtype == b.dtype
        error, allowed = (a.double() - exact).norm(), 2 * (b.double() - exact).norm()
        assert error <= allowed + torch.finfo(a.dtype).eps * exact.norm(), name


@pytest.mark.parametrize(
    ("trained", "activation"),
    covering(
        {" and ".join(names): names for names in (("x",), ("weight",), ("bias",), ("x", "bias"))},
        ["gelu", "relu"],
        whole=ON_GPU,
    ),
)
def test_an_activation_before_a_frozen_layer(trained, activation, monkeypatch):
    """Whichever gradients are asked for, they are the same on both paths."""
    mask, ids, width, *leaves = packed_problem("columns")
    tensors, layers = dict(zip(("x", "weight", "bias"), leaves, strict=True)), Layers([mask], [width], activation)
    for name in trained:
        tensors[name].requires_grad_()

    def run():
        y = operators.run(layers, tensors["x"], [tensors["weight"]], [tensors["bias"]], ids)[0]
        return torch.autograd.grad(y.square().sum(), [tensors[name] for name in trained])

    for ours, theirs in zip(on("triton", monkeypatch, run), on("torch", monkeypatch, run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "trained"), covering(ALL_KINDS, ["x", "weight", "bias"], whole=ON_GPU))
def test_only_what_is_asked_for(kind, trained, monkeypatch):
    """With a frozen weight or input, the other gradients are the same."""
    mask, ids = mask_of(kind), torch.tensor(MIXED, device=DEVICE)
    tensors = {"x": torch.randn(7, 3, K), "weight": torch.randn(N, K), "bias": torch.randn(N)}
    tensors = {name: t.to(DEVICE).requires_grad_(name == trained) for name, t in tensors.items()}

    def run():
        y = fm.masked_linear(tensors["x"], tensors["weight"], mask, ids, tensors["bias"])
        return torch.autograd.grad(y.square().sum(), tensors[trained])

    torch.testing.assert_close(on("triton", monkeypatch, run), on("torch", monkeypatch, run), rtol=1e-4, atol=1e-4)


def half_precision_master(kind, monkeypatch):
    mask, ids = mask_of(kind), torch.tensor(MIXED, device=DEVICE)
    x, weight, bias = torch.randn(7, 3, K).half(), torch.randn(N, K), torch.randn(N)
    x, weight, bias = x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)

    def run():
        return gradients_of(lambda x, w, b: fm.masked_linear(x, w, mask, ids, b), x, weight, bias)

    return on("triton", monkeypatch, run), on("torch", monkeypatch, run)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_float32_master_weights_under_half_precision(kind, monkeypatch):
    """Under half precision the gradient of a float32 weight is float32."""
    for a, b in zip(*half_precision_master(kind, monkeypatch), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=5e-2)


MODELS = {
    "bert": BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "llama": LlamaConfig(  # grouped-query attention: three query heads for each key and value
        vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        intermediate_size=40,
    ),
}  # fmt: skip


OF_EXAMPLES = torch.tensor([2, 0, 0, -1, 1])
OF_TOKENS = torch.tensor([[2, 2, 0, 1, -1, 0], [0] * 6, [1, 0, 1, 0, 1, 0], [-1] * 6, [1, 1, 1, 2, 2, 2]])


@pytest.mark.parametrize(
    ("name", "ids"),
    covering(list(MODELS), {"of examples": OF_EXAMPLES, "of tokens": OF_TOKENS}, whole=ON_GPU),
)
def test_attached_model(name, ids, monkeypatch):
    """Both paths give the same through a whole model, with packed heads and neurons."""
    torch.manual_seed(0)
    model = AutoModel.from_config(MODELS[name]).to(DEVICE)
    subnets = fm.Subnetworks.random(model.config, ["a", "b", "c"], 0.5, seed=0, units="both")
    fm.attach(model, subnets)
    batch = {"input_ids": torch.randint(0, 50, (5, 6), device=DEVICE)}
    upstream = torch.randn(5, 6, model.config.hidden_size, device=DEVICE)

    def run():
        model.zero_grad()
        y = model(**batch, language_ids=ids)[0]
        y.backward(upstream)
        return [y, *[p.grad for p in model.parameters() if p.grad is not None]]

    ours, theirs = on("triton", monkeypatch, run), on("torch", monkeypatch, run)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_plan_is_made_once_and_again_for_other_ids(monkeypatch):
    """A batch is sorted once for all layers, and again if its ids were written in place."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    ids = torch.tensor([0, 1, 0], device=DEVICE)
    device = torch.device(ids.device)
    plan = tables.plan_of(ids, 4, L, device)
    assert tables.plan_of(ids, 4, L, device) is plan
    assert tables.plan_of(ids, 5, L, device) is not plan
    ids[0] = 2
    assert tables.plan_of(ids, 4, L, device) is not plan


def test_nothing_is_kept_of_masks_and_ids_that_are_gone(monkeypatch):
    """What was made of a mask or of ids goes with it, so memory does not grow with batches."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    made = []
    for name in ("Plan", "TileLayout"):
        found = getattr(tables, name)
        monkeypatch.setattr(found, "__init__", watched(found.__init__, made))
    mask, ids = mask_of("weights"), torch.tensor([0, 1], device=DEVICE)
    for _ in range(2):
        fm.masked_linear(torch.randn(2, K, device=DEVICE), torch.randn(N, K, device=DEVICE), mask, ids)
    gc.collect()
    assert [made_of() is not None for made_of in made] == [True, True]
    del mask, ids
    gc.collect()
    assert [made_of() is not None for made_of in made] == [False, False]


def watched(init, made):
    """An `__init__` that leaves a weak reference to what it makes."""

    def watching(self, *args, **kwargs):
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    return watching


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
def test_ids_of_inference_mode_may_be_written_to(kind, monkeypatch):
    """Tensors of inference mode do not count what is written to them: a batch gets its own languages all the same."""
    mask, x, weight = mask_of(kind), torch.randn(2, 3, K, device=DEVICE), torch.randn(N, K, device=DEVICE)

    def run():
        results = []
        with torch.inference_mode():
            ids = torch.tensor([0, 2], device=DEVICE)
            for new in ([0, 2], [2, 0], [-1, 1]):
                ids.copy_(torch.tensor(new))
                results.append(fm.masked_linear(x, weight, mask, ids))
        return results

    assert_equal(on("triton", monkeypatch, run), on("torch", monkeypatch, run))


def test_a_model_in_inference_mode_makes_one_plan_for_each_pass(monkeypatch):
    """A model hands its layers ids of the pass's own: they share one plan, and the next pass makes another."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    model = AutoModel.from_config(MODELS["bert"]).to(DEVICE)
    fm.attach(model, fm.Subnetworks.random(model.config, ["a", "b", "c"], 0.5, seed=0, units="both"))
    made, plan = [], tables.Plan
    monkeypatch.setattr(tables, "Plan", lambda *arguments: made.append(1) or plan(*arguments))
    tokens = torch.randint(0, 50, (2, 6), device=DEVICE)
    with torch.inference_mode():
        ids = torch.tensor([0, 1], device=DEVICE)
        first = model(input_ids=tokens, language_ids=ids)[0]
        ids.copy_(torch.tensor([1, 0]))
        second = model(input_ids=tokens, language_ids=ids)[0]
        again = model(input_ids=tokens, language_ids=torch.tensor([1, 0], device=DEVICE))[0]
    assert len(made) == 3
    assert torch.equal(second, again)
    assert not torch.equal(first, second)


SWITCHES = """
import json, torch
from fastmask.triton_path.layers import _tf32
x = torch.zeros(1)
cuda, found = torch.backends.cuda.matmul, [_tf32(x)]
for owner, name, values in (
    (torch.backends, "fp32_precision", ["tf32", "ieee"]),
    (cuda, "fp32_precision", ["tf32", "ieee"]),
    (cuda, "allow_tf32", [True, False]),
):
    for value in values:
        setattr(owner, name, value)
        found.append(_tf32(x))
for value in ("high", "highest", "medium"):
    torch.set_float32_matmul_precision(value)
    found.append(_tf32(x))
cuda.fp32_precision = "tf32"
print(json.dumps([*found, _tf32(x), _tf32(x.half())]))
"""


def test_every_switch_for_tf32_is_heard():
    """PyTorch's old and new switches for TF32 are both obeyed, in any order of use."""
    done = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, True, False, True, False, True, False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("chip", "taken"), [("gfx942:sramecc+:xnack-", True), ("gfx950:sramecc+:xnack-", False), ("gfx90a", False)]
)
def test_tf32_on_amd(chip, taken, monkeypatch):
    """TF32 is taken where AMD's chips have it; elsewhere Triton would not compile it, and products are exact."""

    class OnGPU:
        dtype, device = torch.float32, torch.device("cuda:0")

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision="tf32"))
    chips._architecture.cache_clear()
    assert triton_layers._tf32(OnGPU()) == taken
    chips._architecture.cache_clear()


@pytest.mark.parametrize("ids", [[0, L], [-2, 0]])
def test_ids_out_of_range(ids, monkeypatch):
    """An id that nobody owns is an error, and reads no one else's memory."""
    monkeypatch.setattr(operators, "FORCED", "triton")
    x, weight = torch.randn(2, K, device=DEVICE), torch.randn(N, K, device=DEVICE)
    ids = torch.tensor(ids, device=DEVICE)
    with pytest.raises(ValueError, match=r"expected 0 to 3, or -1"):
        fm.masked_linear(x, weight, mask_of("rows"), ids, validate=True)
    if DEVICE == "cpu":  # on a GPU an assertion there ends the process
        with pytest.raises(ValueError, match=r"expected 0 to 3, or -1"):
            fm.masked_linear(x, weight, mask_of("rows"), ids)


class TestChoice:
    def test_forced(self, monkeypatch):
        x = torch.randn(2, K, device=DEVICE)
        monkeypatch.setattr(operators, "FORCED", "triton")
        assert operators.path_for(x, [x]) is triton_layers
        monkeypatch.setattr(operators, "FORCED", "torch")
        assert operators.path_for(x, [x]) is torch_layers

    def test_a_cpu_runs_plain_pytorch(self, monkeypatch):
        monkeypatch.setattr(operators, "FORCED", "")
        x = torch.randn(2, K)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert operators.path_for(x, [x]) is torch_layers

    def test_forced_on_what_it_cannot_run_says_why(self, monkeypatch):
        monkeypatch.setattr(operators, "FORCED", "triton")
        double = torch.randn(2, K, dtype=torch.float64, device=DEVICE)
        with pytest.raises(RuntimeError, match=r"not torch\.float64"):
            operators.path_for(double, [double])
        with pytest.raises(RuntimeError, match="activations' dtype"):
            operators.path_for(double.float(), [double.half()])

    def test_unknown_name(self, monkeypatch):
        monkeypatch.setattr(operators, "FORCED", "cuda")
        with pytest.raises(ValueError, match="'torch' or 'triton', given 'cuda'"):
            operators.path_for(torch.randn(2, K), [])

    def test_falls_back_with_one_warning(self, monkeypatch):
        """A dtype that the kernels cannot take falls back to PyTorch, with one warning."""
        monkeypatch.setattr(operators, "FORCED", "")
        operators._warn.cache_clear()
        gpu_like = torch.randn(2, K, dtype=torch.float64, device="meta")  # any device that is not a CPU
        monkeypatch.setattr(triton_path, "_why_not_here", lambda device: None)
        monkeypatch.setattr(operators, "_has_kernels", lambda device: True)
        with pytest.warns(UserWarning, match=r"plain PyTorch: .* not torch\.float64"):
            assert operators.path_for(gpu_like, [gpu_like]) is torch_layers
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert operators.path_for(gpu_like, [gpu_like]) is torch_layers
