"""Moments are kept of what languages own, where that is little; steps are those of whole moments."""

from __future__ import annotations

import copy

import pytest
import torch
from literal_adamw import Literal, Net, live_flags, random_gradients, state_of
from test_live_adamw import PATHS, check_against_literal, optimizer_of
from test_live_adamw_state import through_a_file

import fastmask as fm
from fastmask.files import read_tensors, write_tensors
from fastmask.live import Live, live_of
from fastmask.optim import adamw as adamw_file
from fastmask.optim import step as step_file
from fastmask.training.run_folder import load_optimizer, optimizer_tensors
from tests.core.oracle import KINDS, random_mask

SPARSE = {"density": 0.12, "extremes": False}


def sparse_net(kind, **sizes):
    torch.manual_seed(0)
    net = Net(kind, **{"N": 64, "K": 80, **SPARSE, **sizes})
    assert 0 < live_of(net.masked.mask, range(4)).share <= 0.5
    return net


@pytest.fixture(autouse=True)
def _single_weights_too(monkeypatch):
    monkeypatch.setattr(adamw_file, "LITTLE_OF_WEIGHTS", 0.5)


def moments(optimizer):
    """Numbers that the optimizer keeps of masked weights, and of everything."""
    state = optimizer.state
    return {p: state[p]["exp_avg"].numel() for p in state}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each way to step the live part of a parameter."""
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(step_file, name, value)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_whole_moments(kind, dtype, path):
    """One language, several, and in the end the full network, after which all moments are there."""
    check_against_literal(sparse_net(kind), [[0], [3], [0, 3], [0, 1, 2, 3], [1], [-1], [0], [2, 1]], dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_languages_own_is_kept(kind):
    """Moments take the room of the union of all languages' parts; biases below row masks likewise."""
    net = sparse_net(kind)
    optimizer = optimizer_of(net)
    random_gradients(net, 0)
    optimizer.step(languages=0)
    union, kept = net.masked.mask.to_dense().any(0), moments(optimizer)
    assert kept[net.masked.weight] == union.sum()
    assert kept[net.masked.bias] == (union[:, 0].sum() if kind == "rows" else 64)
    assert kept[net.after.weight] == net.after.weight.numel()
    assert optimizer.state[net.masked.weight]["exp_avg_sq"].numel() == union.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_change(kind):
    """What another mask brings alive is kept as well from then on, what it leaves is not forgotten."""
    net = sparse_net(kind).double()
    other = copy.deepcopy(net)
    ours, literal = optimizer_of(net), Literal(other.parameters())
    masks = [net.masked.mask, random_mask(kind, 4, 64, 80, unit=4, seed=5, **SPARSE)]
    masks += [masks[0], random_mask("rows" if kind == "weights" else "weights", 4, 64, 80, **SPARSE), masks[1]]
    for step, mask in enumerate(masks):
        net.masked.mask = mask
        random_gradients(net, step)
        ours.step(languages=[step % 4])
        literal.step([p.grad for p in net.parameters()], live_flags(net, [step % 4]))
    torch.testing.assert_close(list(net.parameters()), literal.parameters)
    for found, (expected, _) in zip(state_of(ours)[1::4], literal.moments, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(kind, tmp_path):
    """A run resumed through a pickle or a checkpoint ends with the bits of one that was not interrupted."""
    net = sparse_net(kind)
    optimizer = optimizer_of(net)
    for step in range(3):
        random_gradients(net, step)
        optimizer.step(languages=[0, step])
    write_tensors(tmp_path / "optimizer.safetensors", optimizer_tensors(optimizer))
    pairs = [(net, optimizer)]
    for through in ("pickle", "checkpoint"):
        twin = copy.deepcopy(net)
        resumed = optimizer_of(twin)
        if through == "pickle":
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        else:
            load_optimizer(resumed, read_tensors(tmp_path / "optimizer.safetensors")[0])
        pairs.append((twin, resumed))
    for module, which in pairs:
        for step in range(3, 6):
            random_gradients(module, step)
            which.step(languages=[step % 4])
    found = [state_of(which) for _, which in pairs]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert moments(pairs[1][1])[pairs[1][0].masked.weight] == moments(optimizer)[net.masked.weight]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_torch_is_kept_whole(kind):
    """Moments of AdamW outside of what languages own are kept, for the full network."""
    net = sparse_net(kind)
    plain = copy.deepcopy(net)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    random_gradients(plain, 0)
    theirs.step()
    ours = optimizer_of(net)
    random_gradients(net, 7)
    ours.step(languages=0)  # what it has learnt, and kept of a part, is given up
    net.load_state_dict(plain.state_dict())
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for module, optimizer, options in ((net, ours, {"languages": -1}), (plain, theirs, {})):
        random_gradients(module, 1)
        optimizer.step(**options)
    torch.testing.assert_close(state_of(ours), state_of(theirs))


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    """Moments of another part, a damaged one, or one for another shape are refused by name."""
    net = sparse_net("rows")
    optimizer = optimizer_of(net)
    random_gradients(net, 0)
    optimizer.step(languages=0)
    before = state_of(optimizer)
    for damage, message in (
        (lambda s: s["exp_avg"].resize_(3, 80), "exp_avg of parameter 2 has the shape"),
        (lambda s: s.update(held=s["held"][:-4]), "words of flags"),
        (lambda s: s["held"][0].fill_(9), "no part of a weight"),
        (lambda s: s.update(held=s["held"].float()), "uint8"),
    ):
        state = copy.deepcopy(optimizer.state_dict())
        damage(state["state"][2])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), before, strict=True))


def test_parts_are_read_back():
    """A part that was written as bytes is the same part, of weights of every kind and of biases."""
    for kind in KINDS:
        mask = random_mask(kind, 4, 24, 40, unit=4)
        live = live_of(mask, [0, 3])
        again = Live.decoded(live.encoded(), (24, 40))
        assert (again.kind, again.shape, again.cell) == (live.kind, live.shape, live.cell)
        assert torch.equal(again.words, live.words)
        with pytest.raises(ValueError, match="weight of shape"):
            Live.decoded(live.encoded(), (36, 44))
    rows = live_of(random_mask("rows", 4, 24, 40, unit=4), [0])
    bias = torch.randn(24)
    assert torch.equal(Live.decoded(rows.encoded(), (24,)).read(bias), rows.read(bias))


@pytest.mark.parametrize(("units", "weights"), [(0.1, None), (None, 0.05)], ids=["units", "weights"])
def test_memory_of_an_encoder(units, weights):
    """One language with a tenth of the units, or 5% of the weights: at most 0.15 of AdamW's memory, index and all."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=10, hidden_size=120, num_hidden_layers=2, num_attention_heads=10, intermediate_size=480
    )
    model = BertModel(config, add_pooling_layer=False)
    if units is not None:
        subnets = fm.Subnetworks.random(config, ["de"], units, 0, units="both")
    else:
        names = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        keep = {n: torch.rand(1, *model.get_submodule(n).weight.shape) < weights for n in names}
        subnets = fm.Subnetworks(["de"], weights=keep)
    fm.freeze_unmasked(fm.attach(model, subnets, forward="full"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = fm.LiveAdamW(trained, model=model)
    with fm.language(model, "de"):
        model(torch.randint(9, (2, 5)))[0].sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    held = optimizer._held.values()
    kept += [t for live in held for t in (live.words, live._kept) if t is not None]
    assert sum(t.numel() * t.element_size() for t in kept) <= 0.15 * sum(2 * 4 * p.numel() for p in trained)
