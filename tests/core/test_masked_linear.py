"""`masked_linear` on the torch path equals multiplying by masks, forward and every gradient."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import KINDS, assert_close, check, gradients, random_mask
from torch._subclasses import FakeTensorMode
from transformers.activations import GELUActivation

from fastmask import Mask, decompositions, masked_linear
from fastmask.masks import UNPACKED
from fastmask.operators import run
from fastmask.torch_path.layers import NONE, Layers, name_of, prepare
from fastmask.torch_path.naive import masked_linear_naive
from fastmask.traced import Settings

MIXED = [2, 0, 0, 1, -1, 2, 0]  # scattered, an empty language (1), a full one (2) and the full network (-1)


def shape_of(unit: int) -> tuple[int, int]:
    # Large enough for the error of plain PyTorch, the yardstick, to be more than luck.
    return (24 // unit * unit, 40 // unit * unit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [MIXED, [0, 0, 0], [1, 1], [-1, -1]], ids=["mixed", "one", "dead", "full"])
@pytest.mark.parametrize("unit", [1, 3, 8])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_multiplying_by_masks(kind, ids, unit, has_bias, dtype, every_way):
    """The masked layer computes what multiplying the weight by the mask computes, gradients included."""
    torch.manual_seed(0)
    N, K = shape_of(unit)
    mask = random_mask(kind, 4, N, K, unit=unit)
    x, weight = torch.randn(len(ids), 5, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    check(x, weight, torch.randn(N, dtype=dtype) if has_bias else None, mask, torch.tensor(ids))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    L=st.integers(1, 5),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ids=st.lists(st.integers(-1, 4), max_size=9),
    middle=st.lists(st.integers(0, 3), max_size=2),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_mix(kind, L, N, K, density, ids, middle, seed):
    """An odd shape, an empty batch, an absent or dead language breaks the result.

    In float64, to rounding: on shapes this small the error of plain PyTorch in float32 is no yardstick.
    """
    torch.manual_seed(seed)
    ids = torch.tensor([min(i, L - 1) for i in ids], dtype=torch.int64)
    mask = random_mask(kind, L, N, K, density, seed=seed)
    x, weight, bias = torch.randn(len(ids), *middle, K), torch.randn(N, K), torch.randn(N)
    arguments = (x.double(), weight.double(), bias.double(), torch.randn(len(ids), *middle, N).double(), mask, ids)
    for ours, exact in zip(
        gradients(masked_linear, *arguments), gradients(masked_linear_naive, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind):
    """The analytic gradient is the derivative of the forward pass."""
    torch.manual_seed(0)
    mask = random_mask(kind, 3, 4, 6, unit=2)
    x, weight = torch.randn(4, 2, 6).double().requires_grad_(), torch.randn(4, 6).double().requires_grad_()
    bias, ids = torch.randn(4).double().requires_grad_(), torch.tensor([0, -1, 2, 0])
    assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, w, mask, ids, b), (x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_dead_weights_get_exactly_zero_gradient(kind):
    """What no language of the batch owns has a gradient of exactly zero."""
    mask = random_mask(kind, 2, 8, 8, unit=2)
    x, weight, bias = torch.randn(3, 4, 8), torch.randn(8, 8), torch.randn(8)
    _, _, dw, _ = gradients(masked_linear, x, weight, bias, torch.randn(3, 4, 8), mask, torch.tensor([0, 0, 0]))
    assert not dw[~mask.to_dense()[0]].any()
    assert dw[mask.to_dense()[0]].all()


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input_and_weight(kind):
    """Inputs and weights may have any strides."""
    torch.manual_seed(0)
    mask = random_mask(kind, 3, 6, 4, unit=2)
    x = torch.randn(4, 5, 3).transpose(0, 2)  # [3, 5, 4]
    check(x, torch.randn(4, 6).t(), torch.randn(6), mask, torch.tensor([0, 2, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_float32_master_weights(kind):
    """Under autocast inputs are cast, and a float32 weight gets a float32 gradient."""
    torch.manual_seed(0)
    mask = random_mask(kind, 3, 8, 6, unit=2)
    x, weight, bias, ids = torch.randn(4, 3, 6), torch.randn(8, 6), torch.randn(8), torch.tensor([0, 1, 2, -1])
    dy = torch.randn(4, 3, 8)

    def under_autocast(function):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(function, x, weight, bias, dy, mask, ids)

    ours, plain = under_autocast(masked_linear), under_autocast(masked_linear_naive)
    assert ours[0].dtype == torch.bfloat16
    assert ours[2].dtype == torch.float32
    truth = gradients(masked_linear_naive, x.double(), weight.double(), bias.double(), dy.double(), mask, ids)
    for name, result, exact, reference in zip(("y", "dx", "dW", "db"), ours, truth, plain, strict=True):
        assert_close(name, result.float(), exact, reference.bfloat16().float().to(result.float().dtype))


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("unit", [1, 4])
def test_half_precision_gradients_of_many_languages(kind, unit):
    """Every language's part of dW is at its own units, and the sum is rounded once, at the end."""
    torch.manual_seed(0)
    order, mask = [3, 0, 5, 1, -1, 2, 4, 0, 3], random_mask(kind, 6, 24, 40, unit=unit)
    for ids in (order, order[::-1], order[:4]):  # what is remembered of one batch must not serve the next
        x, weight = torch.randn(len(ids), 5, 40).bfloat16(), torch.randn(24, 40).bfloat16()
        check(x, weight, torch.randn(24).bfloat16(), mask, torch.tensor(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_non_leaf_weight(kind):
    """Fast weights of an inner loop (functions of other tensors) get gradients."""
    mask = random_mask(kind, 2, 4, 4, unit=2)
    base = torch.randn(4, 4, requires_grad=True)
    masked_linear(torch.randn(2, 4), base * 2, mask, torch.tensor([0, 1])).sum().backward()
    assert base.grad is not None


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize(
    "order", [[0, 0, 1, 1, 2, 2], [1, 0, 2, 3, 1], [2, 0, 0, 3]], ids=["equal", "scattered", "unequal"]
)
@pytest.mark.parametrize("extremes", [True, False], ids=["extremes", "spare"])
def test_packed_equals_unpacked(kind, unit, order, extremes, every_way):
    """Packing puts every unit in its place, and zeros behind the live ones."""
    torch.manual_seed(0)
    N, K = (8 * unit, 12) if kind == "rows" else (12, 8 * unit)
    mask, ids = random_mask(kind, 4, N, K, unit=unit, extremes=extremes), torch.tensor(order)
    width = 8 * unit if extremes else max(mask.live_counts()) + unit
    assert width <= 8 * unit
    weight, bias = torch.randn(N, K), torch.randn(N)
    dense = mask.to_dense()[:, :, 0] if kind == "rows" else mask.to_dense()[:, 0]
    live = [torch.where(row)[0].tolist() for row in dense]

    def pack(full, behind=0.0):
        out = torch.full((*full.shape[:-1], width), behind)
        for b, language in enumerate(ids.tolist()):
            out[b, ..., : len(live[language])] = full[b, ..., live[language]]
        return out

    def packed(x, w, mask, ids, bias):
        return run(Layers([mask], [width]), x, [w], [bias], ids)[0]

    x, dy = torch.randn(len(ids), 5, K), torch.randn(len(ids), 5, N)
    y, dx, dw, db = gradients(masked_linear, x, weight, bias, dy, mask, ids)
    # What lies behind the live units of the packed side must never show, neither in x nor in an upstream gradient.
    if kind == "rows":
        ours = gradients(packed, x, weight, bias, pack(dy, behind=7.0), mask, ids)
        expected = pack(y), dx, dw, db
    else:
        ours = gradients(packed, pack(x, behind=7.0), weight, bias, dy, mask, ids)
        expected = y, pack(dx), dw, db
    for name, result, wanted in zip(("y", "dx", "dW", "db"), ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("relu", F.relu)])
def test_activation_inside(name, function, every_way):
    """An activation that is computed again in the backward pass equals one that stands before the layer."""
    torch.manual_seed(0)
    mask, ids = random_mask("columns", 2, 6, 8), torch.tensor([1, 0, 0])
    width = max(mask.live_counts()) + 1
    x, dy = torch.randn(3, 5, width).double(), torch.randn(3, 5, 6).double()
    weight, bias = torch.randn(6, 8).double(), torch.randn(6).double()

    def inside(x, w, mask, ids, bias):
        return run(Layers([mask], [width], name), x, [w], [bias], ids)[0]

    def before(x, w, mask, ids, bias):
        return run(Layers([mask], [width]), function(x), [w], [bias], ids)[0]

    ours, expected = (gradients(f, x, weight, bias, dy, mask, ids) for f in (inside, before))
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_packed_width_too_narrow_names_the_language():
    """A buffer too narrow for a language of the batch is refused, and the error names the language."""
    mask = Mask.rows(torch.tensor([[True, False, False, False]]), 4)
    with pytest.raises(ValueError, match=r"full network \(-1\) has 4 live rows, more than the packed width 1"):
        run(Layers([mask], [1]), torch.randn(1, 4), [torch.randn(4, 4)], [], torch.tensor([-1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed_width", [-1, 6], ids=["unpacked", "packed"])
@pytest.mark.parametrize("activation", ["", "gelu"], ids=["plain", "gelu"])
def test_opcheck(kind, packed_width, activation):
    """The operators' schema, fake kernels and autograd registration fit what they compute."""
    if packed_width != -1 and kind not in ("rows", "columns"):
        pytest.skip("only rows and columns are packed")
    mask = random_mask(kind, 2, 6, 6, unit=2)
    x, weight = torch.randn(3, 2, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    bias, ids = torch.randn(6, requires_grad=True), torch.tensor([0, 1, 0])
    settings = Settings(kind, list((*mask.geometry, 0)[:2]), 2, [packed_width], activation)
    stored = (ids, [mask.index], [mask.extents], *settings)
    torch.library.opcheck(torch.ops.fastmask.masked_linear, (x, [weight], [bias], *stored))
    torch.library.opcheck(
        torch.ops.fastmask.masked_linear_backward,
        ([torch.randn(3, 2, 6)], x.detach(), [weight.detach()], *stored, True, [True], [True]),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed_width", [-1, 6], ids=["unpacked", "packed"])
def test_in_plain_operators(kind, packed_width):
    """What exported graphs hold in the operator's place computes the same."""
    if packed_width != -1 and kind not in ("rows", "columns"):
        pytest.skip("only rows and columns are packed")
    mask, ids = random_mask(kind, 3, 6, 6, unit=2), torch.tensor([2, 0, -1, 1])
    x, weight, bias = torch.randn(4, 2, 3, 6).double(), torch.randn(6, 6).double(), torch.randn(6).double()
    settings = Settings(kind, list((*mask.geometry, 0)[:2]), 3, [packed_width], "gelu")
    arguments = (x, [weight], [bias], ids, [mask.index], [mask.extents], *settings)
    operator = torch.ops.fastmask.masked_linear.default
    (found,), (expected,) = decompositions()[operator](*arguments), operator(*arguments)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 5)}, "last size 4"),
        ({"weight": torch.randn(6, 5)}, r"weight of shape \(6, 4\)"),
        ({"bias": torch.randn(5)}, "bias of shape"),
        ({"ids": torch.tensor([0, 1])}, "each of the 3 examples"),
        ({"ids": torch.tensor([0, 1, 0], dtype=torch.int32)}, "torch.int64"),
        ({"ids": torch.tensor([0, 2, 0])}, r"language_ids\[1\] is 2; expected 0 to 1"),
        ({"ids": torch.tensor([0, -2, 0])}, r"language_ids\[1\] is -2"),
        ({"x": torch.randn(3, 4).double()}, "does not fit a weight of dtype"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, "floating-point"),
    ],
)
def test_bad_input_names_what_was_given(change, message):
    """Bad input is refused by a message that names what was given."""
    arguments = {"x": torch.randn(3, 4), "weight": torch.randn(6, 4), "bias": None, "ids": torch.tensor([0, 1, 0])}
    arguments.update(change)
    mask = random_mask("rows", 2, 6, 4)
    with pytest.raises(ValueError, match=message):
        masked_linear(arguments["x"], arguments["weight"], mask, arguments["ids"], arguments["bias"])


def test_full_network_is_the_plain_linear():
    """Language -1 is the unmasked layer."""
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(6)
    mask = random_mask("weights", 2, 6, 4)
    torch.testing.assert_close(masked_linear(x, weight, mask, torch.tensor([-1, -1]), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_lie_in_memory_as_a_tracer_was_told(kind):
    """A weight that is a transposed view (GPT-2's), or an input that is, gives gradients with the promised strides."""
    mask, ids = random_mask(kind, 2, 6, 8, unit=2), torch.tensor([0, 1])
    settings = Settings(kind, list((*mask.geometry, 0)[:2]), 2, [-1], "")
    x, weight = torch.randn(2, 8, 1).transpose(1, 2), torch.randn(8, 6).t()
    arguments = ([torch.randn(2, 1, 6)], x, [weight], ids, [mask.index], [mask.extents], *settings)
    wanted = True, [True], [False]
    found = torch.ops.fastmask.masked_linear_backward(*arguments, *wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        promised = torch.ops.fastmask.masked_linear_backward(*arguments, *wanted)
    for real, fake in zip((found[0], found[1][0]), (promised[0], promised[1][0]), strict=True):
        assert (real.shape, real.stride()) == (fake.shape, fake.stride())


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_keeps_nothing_of_its_input(kind):
    """As of `nn.Linear`: what went through a frozen layer may be written to afterwards, and is not held."""
    mask, ids, held = random_mask(kind, 2, 6, 8, unit=2), torch.tensor([0, 1]), []
    weight = torch.randn(6, 8).double()
    x = torch.randn(2, 50, 8).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        inside = x * 1
        y = masked_linear(inside, weight, mask, ids)
    assert x.numel() not in held
    inside.add_(1)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = torch.stack([dy[i] @ (weight * mask.to_dense()[i]) for i in range(2)])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_are_summed_in_float32(dtype):
    """The gradient of a bias over many examples does not stop growing where low precision would."""
    mask = Mask.rows((torch.arange(96) % 2 == 0)[None], 96)
    weight, bias = torch.randn(96, 96, dtype=dtype), torch.zeros(96, dtype=dtype, requires_grad=True)
    ids = torch.zeros(4096, dtype=torch.int64)
    masked_linear(torch.randn(4096, 96, dtype=dtype), weight, mask, ids, bias).sum().backward()
    assert torch.equal(bias.grad, 4096 * mask.to_dense()[0, :, 0].to(dtype))


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_what_a_dead_unit_holds_does_not_count(kind, every_way):
    """NaN in units that are dead for everybody reaches nothing, whoever else is in the batch."""
    keep = torch.zeros(4, 16, dtype=torch.bool)
    for language, count in enumerate((8, 6, 8, 7)):  # filled up to 8
        keep[language, 1 + language : 1 + language + count] = True
    mask = Mask.rows(keep, 8) if kind == "rows" else Mask.columns(keep, 8)
    shapes = (4, 3, mask.in_features), (mask.out_features, mask.in_features), (4, 3, mask.out_features)
    x, weight, dy = (torch.randn(shape).double() for shape in shapes)  # not float32: oneDNN multiplies one by one
    (dy if kind == "rows" else x)[..., 0] = torch.nan
    for result in gradients(masked_linear, x, weight, None, dy, mask, torch.arange(4))[:3]:
        assert result.isfinite().all()


def test_ids_that_numpy_changes_are_read_again():
    """A batch is that of its language ids as they are now, whoever wrote them."""
    numbers = np.zeros(4, dtype=np.int64)
    ids = torch.from_numpy(numbers)
    mask = Mask.rows(torch.tensor([[True, True, False], [False, True, True]]), 3)
    weight, x = torch.randn(3, 3), torch.randn(4, 3)
    for languages in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]):
        numbers[:] = languages
        expected = masked_linear(x, weight, mask, torch.tensor(languages))
        assert torch.equal(masked_linear(x, weight, mask, ids), expected)


def test_ids_that_change_before_the_backward_pass():
    """A gradient goes to the languages of the forward pass, whoever writes to the ids meanwhile."""
    numbers = np.zeros(4, dtype=np.int64)
    ids, mask = torch.from_numpy(numbers), Mask.rows(torch.tensor([[True, True, False], [False, True, True]]), 3)
    weight, x = torch.randn(3, 3, requires_grad=True), torch.randn(4, 3)
    for write in (lambda: numbers.fill(1), lambda: ids.fill_(1)):
        numbers[:], weight.grad = 0, None
        y = masked_linear(x, weight, mask, ids)
        write()
        y.sum().backward()
        assert weight.grad[:2].all()
        assert not weight.grad[2].any()
    weight.grad = None
    masked_linear(x, weight, mask, ids).sum().backward()
    assert not weight.grad[0].any()
    assert weight.grad[1:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_another_default_device(kind):
    """What a layer makes for itself lies where its weight does, whatever device is the default."""
    mask, ids = random_mask(kind, 2, 32, 32), torch.tensor([1, 0, 1, -1])  # scattered: examples are sorted
    weight, x = torch.randn(32, 32, requires_grad=True), torch.randn(4, 5, 32, requires_grad=True)
    wanted = masked_linear(x, weight, mask, ids)
    gradients = torch.autograd.grad(wanted.sum(), (x, weight))
    with torch.device("meta"):
        y = masked_linear(x, weight, mask, ids.clone())
        found = torch.autograd.grad(y.sum(), (x, weight))
    assert all(torch.equal(*pair) for pair in zip((y, *found), (wanted, *gradients), strict=True))


def test_an_activation_is_not_taken_for_that_of_its_parent():
    """Only the very modules of PyTorch and transformers are computed inside of a layer."""

    class Squared(torch.nn.ReLU):
        def forward(self, x):
            return super().forward(x).square()

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.functional.gelu

        def forward(self, x):
            return 1.702 * self.act(x)

    known = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU()}
    others = (Squared(), Scaled(), torch.nn.GELU("tanh"), torch.nn.SiLU())
    assert {name: name_of(module) for name, module in known.items()} == {name: name for name in known}
    assert name_of(GELUActivation()) == "gelu"
    assert {name_of(module) for module in others} == {NONE}


def test_batches_do_not_keep_masks_nor_masks_batches():
    """What is kept of a batch outlives no mask, and a mask keeps plans of the latest batches, not of all."""
    made = []
    for _ in range(2):
        mask = Mask.rows(torch.rand(2, 8) < 0.5, 8)
        for tokens in range(1, 100):
            batch = prepare(Layers([mask], [UNPACKED]), torch.randn(2, tokens, 8), torch.tensor([0, 1]))
        assert len(batch.tables[0].plans) == 64
        made.append(weakref.ref(batch.tables[0]))
    del mask, batch
    assert [of() is not None for of in made] == [False, False]
