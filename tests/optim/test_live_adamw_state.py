"""States that torch's AdamW and ours exchange, and training resumed from them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from literal_adamw import Net, random_gradients, state_of

import fastmask as fm

KINDS = pytest.mark.parametrize("net", ["rows", "columns", "weights"], indirect=True)


def trained(net, make, steps, first=0):
    optimizer = make(net)
    take(net, optimizer, steps, first)
    return optimizer


def take(net, optimizer, steps, first=0):
    for step in range(first, first + steps):
        random_gradients(net, step)
        optimizer.step(**({"languages": step % 4} if isinstance(optimizer, fm.LiveAdamW) else {}))


def ours(net):
    return fm.LiveAdamW(net.parameters(), lr=1e-2, model=net)


def theirs(net, **options):
    return torch.optim.AdamW(net.parameters(), lr=1e-2, **options)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def net(request):
    torch.manual_seed(0)
    return Net(getattr(request, "param", "rows"))


@KINDS
def test_resuming_is_exact(net):
    """A resumed run equals an unbroken one."""
    optimizer = trained(net, ours, 5)
    twin = copy.deepcopy(net)
    resumed = trained(twin, ours, 1, first=9)  # what it has learnt is given up
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for module, which in ((net, optimizer), (twin, resumed)):
        take(module, which, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state_of(resumed), strict=True))


@KINDS
@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_states_go_both_ways(net, form):
    """A run begun with torch's optimizer can be continued with ours, and the other way round."""
    plain = copy.deepcopy(net)
    before = trained(plain, lambda n: theirs(n, **form), 3)
    optimizer = ours(net)
    net.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(through_a_file(before.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state_of(before), strict=True))
    random_gradients(net, 3)
    optimizer.step(languages=-1)
    back = theirs(plain, **form)
    plain.load_state_dict(net.state_dict())
    back.load_state_dict(through_a_file(optimizer.state_dict()))
    for module, which, options in ((net, optimizer, {"languages": -1}), (plain, back, {})):
        random_gradients(module, 4)
        which.step(**options)
    torch.testing.assert_close(state_of(optimizer), state_of(back))


@KINDS
def test_keys_and_shapes_are_those_of_torch(net):
    """Tools that read optimizer states can read ours."""
    plain = copy.deepcopy(net)
    one, other = (trained(n, make, 2).state_dict() for n, make in ((net, ours), (plain, theirs)))
    assert one["param_groups"] == other["param_groups"]
    shapes = [
        {number: {key: (tensor.shape, tensor.dtype, tensor.stride()) for key, tensor in state.items()}
         for number, state in found["state"].items()} for found in (one, other)
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_a_state_with_amsgrad_is_refused(net):
    """A run begun with amsgrad is not silently continued without it."""
    plain = copy.deepcopy(net)
    state = trained(plain, lambda n: theirs(n, amsgrad=True), 2).state_dict()
    optimizer = trained(net, ours, 2)
    before = state_of(optimizer)
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), before, strict=True))


def test_a_copy_is_refused(net):
    """An optimizer cannot be copied or pickled: the copy would have lost its model."""
    optimizer = trained(net, ours, 1)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
