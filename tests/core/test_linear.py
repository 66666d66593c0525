"""`MaskedLinear` as a module: parameters, state dict, moving, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import KINDS, random_mask
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastmask import Mask, MaskedLinear, masked_linear


def test_shares_parameters_and_state_dict_with_the_linear():
    """Training the masked layer trains the linear layer it was made of."""
    linear = nn.Linear(6, 8)
    layer = MaskedLinear.from_linear(linear, random_mask("rows", 2, 8, 6))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.state_dict().keys() == linear.state_dict().keys()
    assert isinstance(layer, nn.Linear)


def test_forward_is_masked_linear():
    """The module computes what the function computes."""
    mask = random_mask("weights", 2, 8, 6)
    layer, x, ids = MaskedLinear(6, 8, mask=mask), torch.randn(3, 2, 6), torch.tensor([0, -1, 1])
    assert torch.equal(layer(x, ids), masked_linear(x, layer.weight, mask, ids, layer.bias))


def test_wrong_mask_shape():
    """A mask of another layer's shape is refused."""
    with pytest.raises(ValueError, match=r"mask is for 6 -> 8 features, the layer is 6 -> 9"):
        MaskedLinear(6, 9, mask=random_mask("rows", 2, 8, 6))


APPLIED = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta": lambda m: m.to("meta"),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float64),
    "share_memory": lambda m: m.share_memory(),
    "apply": lambda m: m._apply(torch.zeros_like),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", APPLIED)
def test_what_is_no_move_leaves_the_mask_alone(kind, how):
    """Only moves to another device move the indices: casts and `to_empty` leave them."""
    layer = MaskedLinear(6, 8, mask=random_mask(kind, 2, 8, 6, unit=2))
    before = layer.mask.to_dense()
    layer = APPLIED[how](layer)
    assert layer.mask.device.type == "cpu"
    assert torch.equal(layer.mask.to_dense(), before)
    assert layer.mask.index.dtype in (torch.int32, torch.int64)


KEEP = {
    "rows": (lambda keep: Mask.rows(keep, 6), (8,)),
    "columns": (lambda keep: Mask.columns(keep, 8), (6,)),
    "blocks": (lambda keep: Mask.blocks(keep, (2, 2)), (4, 3)),
    "weights": (Mask.weights, (8, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_built_while_the_default_device_is_meta(kind):
    """A mask is data: it is built where its flags are, whatever the default device is."""
    build, shape = KEEP[kind]
    keep = torch.rand(2, *shape) < 0.5
    expected = build(keep).to_dense()
    with torch.device("meta"):
        layer = MaskedLinear(6, 8, mask=build(keep).replaced(0, keep[0]), dtype=torch.float64)
        assert torch.equal(layer.mask.to_dense(), expected)
        with pytest.raises(ValueError, match="on the meta device, which has none"):
            build(torch.ones(2, *shape, dtype=torch.bool))
    assert layer.weight.is_meta
    weight, x = torch.randn(8, 6).double(), torch.randn(2, 6).double()
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(8).double()}, assign=True)
    torch.testing.assert_close(
        layer(x, torch.tensor([0, 1])), torch.stack([x[i] @ (weight * expected[i]).T for i in range(2)])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_built_in_inference_mode(kind):
    """A mask that was built in inference mode can be trained with."""
    build, shape = KEEP[kind]
    with torch.inference_mode():
        keep = torch.rand(2, *shape) < 0.5
        mask = build(keep).replaced(0, keep[1]).to("cpu")
        expected = build(keep[[1, 1]]).to_dense()
    layer = MaskedLinear(6, 8, mask=mask)
    layer(torch.randn(2, 6), torch.tensor([0, 1])).sum().backward()
    assert torch.equal(layer.weight.grad != 0, expected[0])


def test_deepcopy_is_independent():
    """A copied layer has parameters of its own."""
    layer = MaskedLinear(6, 8, mask=random_mask("rows", 2, 8, 6))
    clone = copy.deepcopy(layer)
    assert clone.weight is not layer.weight
    assert torch.equal(clone(torch.ones(1, 6), torch.tensor([0])), layer(torch.ones(1, 6), torch.tensor([0])))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind):
    """torch.compile makes one graph, for any languages of a batch."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = MaskedLinear(6, 8, mask=random_mask(kind, 3, 8, 6, unit=2))
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU())
    count = CompileCounterWithBackend("aot_eager")

    def step(x, ids):
        return layer(model(x), ids).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for ids in ([0, 1, 2, -1], [2, 2, 0, 0], [1, 1, 1, 1]):
        x, ids = torch.randn(4, 3, 6), torch.tensor(ids)
        layer.zero_grad()
        loss = compiled(x, ids)
        loss.backward()
        ours, grad = loss.detach(), layer.weight.grad.clone()
        layer.zero_grad()
        expected = step(x, ids)
        expected.backward()
        torch.testing.assert_close(ours, expected.detach())
        torch.testing.assert_close(grad, layer.weight.grad)
    assert count.frame_count == 1


def test_mask_kind_in_repr():
    """A printed model says which kind of mask each layer has."""
    text = repr(MaskedLinear(4, 2, mask=Mask.rows(torch.tensor([[True, False]]), 4)))
    assert "Mask.rows(1 languages, 2 x 4, unit (1,), density [0.50])" in text
