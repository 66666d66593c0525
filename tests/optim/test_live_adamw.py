"""`LiveAdamW` against torch's AdamW where all is live, and against AdamW written out with flags where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from fastmask_kernels.interpreter import interpreting
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_adamw import Literal, Net, live_flags, random_gradients, state_of

import fastmask as fm
from fastmask.optim import adamw as adamw_file
from fastmask.optim import step as step_file
from tests.core.oracle import KINDS, assert_close, random_mask

NEVER = 1 << 60
PATHS = {
    "as it comes": {},
    "stretches": {"STRETCH": 0},
    "pieces": {"STRETCH": NEVER, "FEW": 0, "PIECE": 64},
    "put aside": {"STRETCH": NEVER, "FEW": 1},
    "kernel": {"_has_kernel": lambda p: p.dtype != torch.float64},
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each way to step the live part of a parameter, wherever it is possible; the kernel in Triton's interpreter."""
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(step_file, name, value)
    return request.param


def optimizer_of(net, **options):
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    return fm.LiveAdamW(net.parameters(), model=net, **options)


# ---- where all is live


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3}])
def test_it_is_adamw_where_all_is_live(dtype, options):
    """Training the full network equals training it with torch's optimizer, to rounding."""
    torch.manual_seed(0)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    net = Net("rows").to(dtype)
    plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    ours = optimizer_of(net, **options)
    theirs = torch.optim.AdamW(plain.parameters(), foreach=False, **options)
    truth = torch.optim.AdamW(exact.parameters(), foreach=False, **options)
    for step in range(20):
        random_gradients(net, step)
        for other in (plain, exact):
            for p, q in zip(other.parameters(), net.parameters(), strict=True):
                p.grad = q.grad.to(p.dtype)
        ours.step(languages=-1)
        theirs.step()
        truth.step()
    # All parameters together: of the three numbers of a small one, the luck of rounding is the larger part.
    for i, name in enumerate(["parameter", "exp_avg", "exp_avg_sq", "step"]):
        found, expected, plain_found = (
            torch.cat([t.flatten() for t in state_of(o)[i::4]]) for o in (ours, truth, theirs)
        )
        assert_close(name, found, expected.double(), plain_found)


def test_parameters_of_any_size():
    """What has no element, or no axis, is stepped as torch steps it."""
    torch.manual_seed(0)
    net = torch.nn.ParameterList([torch.randn(999), torch.randn(7, 50), torch.randn(0), torch.randn(())])
    other = copy.deepcopy(net)
    ours, theirs = optimizer_of(net), torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for module, optimizer in ((net, ours), (other, theirs)):
            random_gradients(module, step)
            optimizer.step()
    torch.testing.assert_close(list(net), list(other))


def test_complex_parameters():
    """Parameters that the fused step does not take are stepped all the same."""
    torch.manual_seed(0)
    net = torch.nn.ParameterList([torch.randn(5, dtype=torch.complex64)])
    other = copy.deepcopy(net)
    ours, theirs = optimizer_of(net), torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    for module, optimizer in ((net, ours), (other, theirs)):
        module[0].grad = torch.ones_like(module[0]) * (1 + 2j)
        optimizer.step()
        optimizer.step()
    torch.testing.assert_close(list(net), list(other))


@pytest.mark.parametrize("options", [{}, {"betas": (torch.tensor(0.8), torch.tensor(0.9))}], ids=["lr", "betas"])
def test_settings_that_are_tensors(options):
    """A learning rate or betas in tensors, which a scheduler may fill, count as their numbers."""
    torch.manual_seed(0)
    net = Net("rows")
    other = copy.deepcopy(net)
    betas = tuple(map(float, options.get("betas", (0.9, 0.999))))
    ours, theirs = (
        optimizer_of(net, lr=torch.tensor(0.5), **options),
        torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.1, betas=betas),
    )
    ours.param_groups[0]["lr"].fill_(0.1)
    for module, optimizer, languages in ((net, ours, {"languages": -1}), (other, theirs, {})):
        random_gradients(module, 0)
        optimizer.step(**languages)
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads(kind, threads):
    """The number of threads decides how a step is cut into pieces, and never its result."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    net = Net(kind, N=512, K=600)
    other = copy.deepcopy(net)
    try:
        for module, number in ((net, threads), (other, 1)):
            torch.set_num_threads(number)
            optimizer = optimizer_of(module)
            for step in range(3):
                random_gradients(module, step)
                optimizer.step(languages=0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()))


# ---- where it is not


def check_against_literal(net, sequence, dtype=torch.float64, **options):
    """Steps for each set of languages in turn; equal to the literal one within rounding, dead bits untouched."""
    net = net.to(dtype)
    other = copy.deepcopy(net).double()
    ours, literal = optimizer_of(net, **options), Literal(other.parameters(), **options)
    for step, languages in enumerate(sequence):
        random_gradients(net, step)
        flags = live_flags(net, languages)
        gradients = [p.grad.double() for p in net.parameters()]
        for p, keep in zip(net.parameters(), flags, strict=True):
            p.grad[~keep] = float("nan")
        before = None if step == 0 else state_of(ours)
        parameters = [p.detach().clone() for p in net.parameters()]
        ours.step(languages=languages)
        literal.step(gradients, flags)
        after = state_of(ours)
        for i, (p, keep) in enumerate(zip(net.parameters(), flags, strict=True)):
            _, exp_avg, exp_avg_sq, count = after[4 * i : 4 * i + 4]
            torch.testing.assert_close(p, literal.parameters[i].to(dtype))
            torch.testing.assert_close(exp_avg, literal.moments[i][0].to(dtype))
            torch.testing.assert_close(exp_avg_sq, literal.moments[i][1].to(dtype))
            assert count == step + 1
            assert torch.equal(p[~keep], parameters[i][~keep])
            if before is not None:
                assert torch.equal(exp_avg[~keep], before[4 * i + 1][~keep])
                assert torch.equal(exp_avg_sq[~keep], before[4 * i + 2][~keep])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_live_part_moves(kind, dtype, path):
    """No momentum or decay of one language moves what another owns alone, and no NaN in a dead gradient spreads."""
    torch.manual_seed(0)
    check_against_literal(Net(kind), [[0], [3], [0, 3], [1], [-1], [0], [3, 1], [2], [0]], dtype)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from([1, 2, 4, 16]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 24),
    sequence=st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    name=st.sampled_from(list(PATHS)),
)
def test_any_shape_and_order_of_languages(kind, unit, rows, columns, sequence, decay, maximize, dtype, name):
    """Any shape, with rests behind whole vectors, is updated as AdamW says."""
    torch.manual_seed(0)
    net = Net(kind, N=rows * unit, K=columns * unit, unit=unit)
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in PATHS[name].items():
            patch.setattr(step_file, constant, value)
        check_against_literal(net, sequence, dtype, lr=0.02, weight_decay=decay, maximize=maximize)


@pytest.mark.parametrize("little", [-1.0, 0.5], ids=["in_place", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_gaps_and_rests_of_wide_rows(kind, little, path, monkeypatch):
    """What lies next to a wide gap, or in a rest behind whole vectors, is updated as AdamW says."""
    for name in ("LITTLE", "LITTLE_OF_WEIGHTS"):
        monkeypatch.setattr(adamw_file, name, little)
    torch.manual_seed(0)
    net = Net(kind, N=8, K=1000, unit=1)
    keep = torch.zeros(4, 8, 1000, dtype=torch.bool)
    keep[0, :, 990:] = keep[0, :, 300:301] = keep[3, 2] = True
    masks = {
        "rows": lambda: fm.Mask.rows(keep[:, :, 0], 1000),
        "columns": lambda: fm.Mask.columns(keep[:, 0], 8),
        "blocks": lambda: fm.Mask.blocks(keep[:, ::4, ::10], (4, 10)),
        "weights": lambda: fm.Mask.weights(keep),
    }
    net.masked.mask = masks[kind]()
    check_against_literal(net, [[0], [3], [0, 3]], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_torch_on_the_live_part(dtype, path):
    """The live part of a float32 or bfloat16 parameter is what torch's AdamW makes of it, to rounding."""
    if path == "kernel" and dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    torch.manual_seed(0)
    net = Net("columns").to(dtype)
    plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    ours = optimizer_of(net)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    truth = torch.optim.AdamW(exact.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    keep = net.masked.mask.to_dense()[0]
    start = net.masked.weight.detach().clone()
    for step in range(10):
        random_gradients(net, step)
        for other in (plain, exact):
            for p, q in zip(other.parameters(), net.parameters(), strict=True):
                p.grad = q.grad.to(p.dtype)
        ours.step(languages=0)
        theirs.step()
        truth.step()
    found, expected, plain_found = (m.masked.weight.detach() for m in (net, exact, plain))
    assert_close("live weights", found[keep], expected[keep], plain_found[keep])
    assert torch.equal(found[~keep], start[~keep])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_another_memory_order(kind):
    """A weight may lie transposed in memory."""
    torch.manual_seed(0)
    net = Net(kind)
    net.masked.weight.data = net.masked.weight.data.t().contiguous().t()
    check_against_literal(net, [[0], [3], [-1]])


def test_masks_may_change(path):
    """After an update of dynamic subnetworks what the old mask left alive moves no more."""
    torch.manual_seed(0)
    net = Net("rows").double()
    other = copy.deepcopy(net)
    ours, literal = optimizer_of(net), Literal(other.parameters())
    for step in range(4):
        if step == 2:
            net.masked.mask = net.masked.mask.replaced(0, ~net.masked.mask.to_dense()[0, :, 0])
        random_gradients(net, step)
        ours.step(languages=0)
        literal.step([p.grad for p in net.parameters()], live_flags(net, [0]))
    torch.testing.assert_close(list(net.parameters()), literal.parameters)


def test_masks_may_become_another_kind():
    """A row mask in place of a column mask also holds back biases that no language of the batch owns."""
    torch.manual_seed(0)
    net = Net("columns").double()
    other = copy.deepcopy(net)
    ours, literal = optimizer_of(net), Literal(other.parameters())
    for step, kind in enumerate(["columns", "rows", "weights", "rows"]):
        net.masked.mask = random_mask(kind, 4, 32, 40, unit=4)
        random_gradients(net, step)
        ours.step(languages=0)
        literal.step([p.grad for p in net.parameters()], live_flags(net, [0]))
    torch.testing.assert_close(list(net.parameters()), literal.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_masked_layers(kind):
    """A model whose masked layers are frozen trains what is left; there is no language to ask for."""
    torch.manual_seed(0)
    net = Net(kind)
    net.masked.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    optimizer = optimizer_of(net)
    net(torch.randn(2, 6), torch.tensor([0, 3])).square().sum().backward()
    optimizer.step()
    assert torch.equal(net.masked.weight, before["masked.weight"])
    assert not torch.equal(net.after.weight, before["after.weight"])


# ---- an optimizer like any other


def test_groups_schedulers_and_missing_gradients():
    """Groups have their own settings, schedulers work, and parameters without a gradient stay as they are."""
    torch.manual_seed(0)
    net = Net("rows")
    other = copy.deepcopy(net)

    def build(module, make):
        vectors = [p for p in module.parameters() if p.ndim == 1]
        matrices = [p for p in module.parameters() if p.ndim == 2]
        groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.1, "betas": (0.8, 0.9)}]
        optimizer = make(groups)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    ours, our_schedule = build(net, lambda g: fm.LiveAdamW(g, lr=1e-2, model=net))
    theirs, their_schedule = build(other, lambda g: torch.optim.AdamW(g, lr=1e-2))
    for step in range(4):
        for module, optimizer, schedule in ((net, ours, our_schedule), (other, theirs, their_schedule)):
            random_gradients(module, step)
            module.after.weight.grad = None
            if step == 2:
                module.before.weight.grad = None
            optimizer.step(**({"languages": [-1]} if optimizer is ours else {}))
            schedule.step()
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()))
    assert net.after.weight not in ours.state
    assert ours.state[net.before.weight]["step"] == 3


def test_a_closure_is_run_before_the_step():
    """A closure's gradients are those of this step, and its loss is returned."""
    torch.manual_seed(0)
    net = Net("rows")
    optimizer = optimizer_of(net)
    x, ids = torch.randn(2, 6), torch.zeros(2, dtype=torch.int64)

    def closure():
        optimizer.zero_grad()
        loss = net(x, ids).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("setting", ["amsgrad", "differentiable"])
def test_what_it_does_not_do_is_refused(setting):
    """A group that asks for amsgrad is refused."""
    net = Net("rows")
    with pytest.raises(ValueError, match=setting):
        fm.LiveAdamW([{"params": net.parameters(), setting: True}], model=net)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fm.LiveAdamW(net.parameters(), model=net.parameters())


def test_a_shard_of_a_weight_is_refused_before_anything_moves():
    """A shard of a weight, as FSDP and ZeRO leave it in a parameter, is refused."""
    net = Net("rows")
    optimizer = optimizer_of(net)
    random_gradients(net, 0)
    weight = net.masked.weight
    weight.data, weight.grad = weight.data.flatten()[:5].clone(), None
    weight.grad = torch.ones(5)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"\(5,\) is not the whole weight"):
        optimizer.step(languages=0)
    assert all(map(torch.equal, net.parameters(), before))
