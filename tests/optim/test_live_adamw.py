"""`LiveAdamW` against torch's AdamW where all is live, and against AdamW written out with flags where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_adamw import Literal, Net, live_flags, random_gradients, state_of

import fastmask as fm
from fastmask.optim import compiled
from tests.core.oracle import KINDS, assert_close

PATHS = [pytest.param(True, id="compiled"), pytest.param(False, id="torch")]


def optimizer_of(net, use_compiled, **options):
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    return fm.LiveAdamW(net.parameters(), model=net, use_compiled=use_compiled, **options)


# ---- where all is live


@pytest.mark.parametrize("use_compiled", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3}])
def test_it_is_adamw_where_all_is_live(use_compiled, dtype, options):
    """Training with the full network would differ from training with torch's optimiser, beyond rounding."""
    torch.manual_seed(0)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    net = Net("rows").to(dtype)
    plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    ours = optimizer_of(net, use_compiled, **options)
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


def test_compiled_chunks_cover_large_parameters(monkeypatch):
    """Of a parameter larger than what a thread takes at a time, a part would not move, or move twice."""
    monkeypatch.setattr(compiled, "CHUNK", 64)
    compiled._code_for.cache_clear()
    try:
        torch.manual_seed(0)
        net = torch.nn.ParameterList([torch.randn(999), torch.randn(7, 50), torch.randn(0), torch.randn(())])
        other = copy.deepcopy(net)
        ours, theirs = optimizer_of(net, True), torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
        for step in range(3):
            for module, optimizer in ((net, ours), (other, theirs)):
                random_gradients(module, step)
                optimizer.step()
        torch.testing.assert_close(list(net), list(other))
    finally:
        compiled._code_for.cache_clear()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    """Threads would take the same chunk twice or leave one out, or one thread would not find its way without OpenMP."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    net = Net("weights", N=512, K=600)
    other = copy.deepcopy(net)
    try:
        for module, number in ((net, threads), (other, 1)):
            torch.set_num_threads(number)
            optimizer = optimizer_of(module, True)
            for step in range(3):
                random_gradients(module, step)
                optimizer.step(languages=0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


# ---- where it is not


def check_against_literal(net, use_compiled, sequence, **options):
    """Steps for each set of languages in turn; equal to the literal one within rounding, dead bits untouched."""
    net = net.double()
    other = copy.deepcopy(net)
    ours, literal = optimizer_of(net, use_compiled, **options), Literal(other.parameters(), **options)
    for step, languages in enumerate(sequence):
        random_gradients(net, step)
        flags = live_flags(net, languages)
        gradients = [p.grad.clone() for p in net.parameters()]
        for p, keep in zip(net.parameters(), flags, strict=True):
            p.grad[~keep] = float("nan")
        before = None if step == 0 else state_of(ours)
        parameters = [p.detach().clone() for p in net.parameters()]
        ours.step(languages=languages)
        literal.step(gradients, flags)
        after = state_of(ours)
        for i, (p, keep) in enumerate(zip(net.parameters(), flags, strict=True)):
            _, exp_avg, exp_avg_sq, count = after[4 * i : 4 * i + 4]
            torch.testing.assert_close(p, literal.parameters[i])
            torch.testing.assert_close(exp_avg, literal.moments[i][0])
            torch.testing.assert_close(exp_avg_sq, literal.moments[i][1])
            assert count == step + 1
            assert torch.equal(p[~keep], parameters[i][~keep])
            if before is not None:
                assert torch.equal(exp_avg[~keep], before[4 * i + 1][~keep])
                assert torch.equal(exp_avg_sq[~keep], before[4 * i + 2][~keep])


@pytest.mark.parametrize("use_compiled", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_live_slices_move(kind, use_compiled):
    """Momentum or decay of one language moves what another owns alone, or NaN in a dead gradient spreads."""
    torch.manual_seed(0)
    check_against_literal(Net(kind), use_compiled, [[0], [3], [0, 3], [1], [-1], [0], [3, 1], [2], [0]])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from([1, 2, 4, 16]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 24),
    sequence=st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    use_compiled=st.booleans(),
)
def test_any_shape_and_order_of_languages(kind, unit, rows, columns, sequence, decay, maximize, use_compiled):
    """Some shape (rests behind whole vectors, gaps of more than 256 columns) is updated wrongly."""
    torch.manual_seed(0)
    net = Net(kind, N=rows * unit, K=columns * unit, unit=unit)
    check_against_literal(net, use_compiled, sequence, lr=0.02, weight_decay=decay, maximize=maximize)


@pytest.mark.parametrize("use_compiled", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_gaps_and_rests_of_wide_rows(kind, use_compiled):
    """A gap that is jumped over, or the vectors next to it, are updated wrongly."""
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
    check_against_literal(net, use_compiled, [[0], [3], [0, 3]])


@pytest.mark.parametrize("use_compiled", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_torch_on_the_live_part(dtype, use_compiled):
    """The live part of a float32 or bfloat16 parameter drifts from what torch's AdamW makes of it."""
    torch.manual_seed(0)
    net = Net("columns").to(dtype)
    plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
    ours = optimizer_of(net, use_compiled)
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


@pytest.mark.parametrize("use_compiled", PATHS)
def test_weights_in_another_memory_order(use_compiled):
    """A weight that lies transposed in memory is read as if it did not."""
    torch.manual_seed(0)
    net = Net("columns")
    net.masked.weight.data = net.masked.weight.data.t().contiguous().t()
    check_against_literal(net, use_compiled, [[0], [3], [-1]])


@pytest.mark.parametrize("use_compiled", PATHS)
def test_masks_may_change(use_compiled):
    """After an update of dynamic subnetworks the slices of the old mask would go on moving."""
    torch.manual_seed(0)
    net = Net("rows").double()
    other = copy.deepcopy(net)
    ours, literal = optimizer_of(net, use_compiled), Literal(other.parameters())
    for step in range(4):
        if step == 2:
            net.masked.mask = net.masked.mask.replaced(0, ~net.masked.mask.to_dense()[0, :, 0])
        random_gradients(net, step)
        ours.step(languages=0)
        literal.step([p.grad for p in net.parameters()], live_flags(net, [0]))
    torch.testing.assert_close(list(net.parameters()), literal.parameters)


# ---- an optimiser like any other


@pytest.mark.parametrize("use_compiled", PATHS)
def test_groups_schedulers_and_missing_gradients(use_compiled):
    """Groups share one setting, a scheduler has no effect, or a parameter without a gradient decays or counts steps."""
    torch.manual_seed(0)
    net = Net("rows")
    other = copy.deepcopy(net)

    def build(module, make):
        vectors = [p for p in module.parameters() if p.ndim == 1]
        matrices = [p for p in module.parameters() if p.ndim == 2]
        groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.1, "betas": (0.8, 0.9)}]
        optimizer = make(groups)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    ours, our_schedule = build(net, lambda g: fm.LiveAdamW(g, lr=1e-2, model=net, use_compiled=use_compiled))
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
    """Optimisation with a closure uses gradients of the step before, or loses its loss."""
    torch.manual_seed(0)
    net = Net("rows")
    optimizer = optimizer_of(net, True)
    x, ids = torch.randn(2, 6), torch.zeros(2, dtype=torch.int64)

    def closure():
        optimizer.zero_grad()
        loss = net(x, ids).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0] / 2


def test_sparse_gradients_are_refused_before_anything_moves():
    """A sparse embedding gradient would be read as a dense one, or half of the parameters would have moved."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Embedding(5, 2, sparse=True))
    optimizer = optimizer_of(net, True)
    net[1](torch.tensor([1])).sum().backward()
    net[0].weight.grad = torch.ones(2, 2)
    before = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("setting", ["amsgrad", "differentiable"])
def test_what_it_does_not_do_is_refused(setting):
    """A group that asks for amsgrad would be trained without it."""
    net = Net("rows")
    with pytest.raises(ValueError, match=setting):
        fm.LiveAdamW([{"params": net.parameters(), setting: True}], model=net)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fm.LiveAdamW(net.parameters(), model=net.parameters())


@pytest.mark.parametrize("use_compiled", [True, False])
def test_a_shard_of_a_weight_is_refused_before_anything_moves(use_compiled):
    """FSDP and ZeRO leave a part of each weight in a parameter: the mask's places lie in foreign memory."""
    net = Net("rows")
    optimizer = optimizer_of(net, use_compiled)
    random_gradients(net, 0)
    weight = net.masked.weight
    weight.data, weight.grad = weight.data.flatten()[:5].clone(), None
    weight.grad = torch.ones(5)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"\(5,\) is not the whole weight"):
        optimizer.step(languages=0)
    assert all(map(torch.equal, net.parameters(), before))


def test_without_numba(monkeypatch):
    """Without the extra, the optimiser fails, or is slow without saying why."""
    monkeypatch.setattr(compiled, "installed", lambda: False)
    net = Net("rows")
    with pytest.warns(UserWarning, match="numba"):
        optimizer = fm.LiveAdamW(net.parameters(), model=net)
    random_gradients(net, 0)
    optimizer.step(languages=0)
    with pytest.raises(ImportError, match=r"\.\[cpu\]"):
        fm.LiveAdamW(net.parameters(), model=net, use_compiled=True)
