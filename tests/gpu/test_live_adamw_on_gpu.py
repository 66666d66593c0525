"""`LiveAdamW` on real hardware: every kind of mask in every dtype, without waiting for the GPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here: these tests are for real hardware", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))
from literal_adamw import Net, live_flags, random_gradients, state_of
from oracle import KINDS, assert_close

import fastmask as fm

DEVICE = "cuda"
SEQUENCE = [[0], [3], [0, 3], [1], [-1], [0]]


def gradients_for(net, others, step, flags):
    """The same random gradients for all; of `net` NaN where it is dead, of the others 0."""
    random_gradients(others[0].cpu(), step)
    for p, plain, keep in zip(net.parameters(), others[0].parameters(), flags, strict=True):
        p.grad = plain.grad.to(p.dtype).to(DEVICE).where(keep, torch.nan)
    for other in others:
        other.to(DEVICE)
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.nan_to_num(0).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_live_part_moves(kind, dtype):
    """What a language of the batch owns is as near to float64 as torch's AdamW, all else keeps its bits."""
    for languages in SEQUENCE:
        torch.manual_seed(0)
        net = Net(kind, N=64, K=160).to(DEVICE, dtype)
        plain, exact = copy.deepcopy(net), copy.deepcopy(net).double()
        start = [p.detach().clone() for p in net.parameters()]
        options = {"lr": 1e-2, "weight_decay": 0.1}
        ours = fm.LiveAdamW(net.parameters(), model=net, **options)
        theirs, truth = (torch.optim.AdamW(n.parameters(), foreach=False, **options) for n in (plain, exact))
        flags = [keep.to(DEVICE) for keep in live_flags(net, languages)]
        for step in range(3):
            gradients_for(net, (plain, exact), step, flags)
            ours.step(languages=languages)
            theirs.step()
            truth.step()
        parameters = zip(net.parameters(), plain.parameters(), exact.parameters(), flags, start, strict=True)
        for p, rounded, right, keep, old in parameters:
            assert_close("parameter", p.detach()[keep], right.detach()[keep], rounded.detach()[keep])
            assert torch.equal(p[~keep], old[~keep])
            assert not ours.state[p]["exp_avg"][~keep].any()


def test_a_step_does_not_wait_for_the_gpu():
    """With languages that are known on the CPU, nothing of a step is read back."""
    torch.manual_seed(0)
    net = Net("rows", N=64, K=160).to(DEVICE)
    optimizer = fm.LiveAdamW(net.parameters(), lr=torch.tensor(1e-2, device=DEVICE), model=net)
    for step in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.announce([0, 3])
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_states_go_both_ways(form):
    """Whatever form of torch it comes from, either optimizer resumes from the state of the other."""
    torch.manual_seed(0)
    net = Net("rows").to(DEVICE)
    plain = copy.deepcopy(net)
    ours = fm.LiveAdamW(net.parameters(), lr=1e-2, model=net)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, **form)
    for step in range(4):
        for module, optimizer, languages in ((net, ours, {"languages": -1}), (plain, theirs, {})):
            for i, p in enumerate(module.parameters()):
                p.grad = torch.full_like(p, (-1) ** step + i)
            optimizer.step(**languages)
        state = ours.state_dict()
        if step == 1:
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(state)
    torch.testing.assert_close([t.cpu() for t in state_of(ours)], [t.cpu() for t in state_of(theirs)])
