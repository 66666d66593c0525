"""The cases: their ideals by hand, and nothing is timed that computes something else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_rows import MACHINE

import fastmask as fm
from benchmarks import measure as measuring
from benchmarks.baselines import BASELINES, EXPLAINED, Task, why_not
from benchmarks.cases import CASES
from benchmarks.cases.case import Side
from benchmarks.cases.encoder import live_flops
from benchmarks.measure import measure
from benchmarks.row import UNITS, Job, Setting, Shape
from benchmarks.targets import QUICK, TARGETS
from fastmask import Mask

TINY = {"shape": "toy", "layers": 1, "tokens": 4, "batch": 4, "languages": 3, "threads": 1}
OF_OP = [unit for unit in CASES["op"].units if unit not in ("blocks16", "blocks64")]


def tiny(case: str, **changes: object) -> Setting:
    """A setting of a case that takes no time."""
    return Setting(case, **(CASES[case].defaults | TINY | changes))  # type: ignore[arg-type]


# ---- ideals


def test_live_flops_by_hand():
    """The ideal that every share is taken of forgets a product."""
    shape = Shape(hidden=8, ffn=16, heads=2)
    # Per token of 4: Q, K, V, O 4 x 64; scores and mix 2 x 4 x 8; up and down 2 x 8 x 16.
    heads, neurons = torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [0.25]])
    assert live_flops(shape, 4, heads, neurons).tolist() == [320 + 256, 160 + 64]


@pytest.mark.parametrize(
    ("setting", "name", "ideal"),
    [
        (tiny("encoder", density=0.5), "fastmask", 2.0),
        (tiny("encoder", density=0.5), "full", 1.0),
        (tiny("encoder", unit="neurons", layers=2), "loop", (4 * 1024 + 2 * 4 * 32 + 4096) / (4352 + 2048)),
        (tiny("encoder", unit="weights"), "fastmask", 1.0),
        (tiny("op", unit="neurons", density=0.25), "fastmask", 4.0),
        (tiny("op", unit="neuron-inputs", density=0.75), "fastmask", 4 / 3),
        (tiny("op", unit="blocks16"), "bsr", 2.0),
        (tiny("op", unit="weights"), "fastmask", 1.0),
        (tiny("step"), "live", 2.0),
        (tiny("step"), "sparse", 3 / 2.5),  # a third of the FLOPs are those of dW
        (tiny("episode", present=2), "fastmask", 2.0),
    ],
    ids=lambda value: value.words() if isinstance(value, Setting) else "",
)
def test_ideal_by_hand(setting, name, ideal):
    """Shares of the FLOP-ideal are shares of something else."""
    assert CASES[setting.case](setting, (name,)).ideal(name) == pytest.approx(ideal)


# ---- proofs


@pytest.mark.parametrize("present", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unit", OF_OP)
def test_every_rival_is_proven(unit, dtype, present):
    """A rival does not run for some kind of mask, or computes something else."""
    case = CASES["op"](tiny("op", unit=unit, dtype=dtype, present=present))
    case.check()
    assert {"dense", "fastmask", "full", "loop"} <= set(case.chosen)
    units = not (unit.startswith("blocks") or unit == "weights")
    assert [name in case.chosen for name in ("gating", "packed")] == [units, units]
    assert ("multiply" in case.chosen) is (present == 1)
    assert ("bsr" in case.chosen) is (unit.startswith("blocks") and dtype == "float32")


@pytest.mark.parametrize("name", ["multiply", "loop", "gating", "packed", "bsr"])
def test_a_wrong_rival_is_not_timed(name, monkeypatch):
    """We are compared with something fast that computes something else."""
    right = BASELINES[name]
    monkeypatch.setitem(BASELINES, name, lambda x, weight, task, bias=None: right(x, 1.2 * weight, task, bias))
    with pytest.raises(RuntimeError, match=r"wrong.*nothing is timed"):
        measure(Job(tiny("op", unit="blocks16" if name == "bsr" else "neurons"), (name,)), 0)


@pytest.mark.parametrize("name", ["full", "multiply", "gating", "packed", "compact"])
def test_a_wrong_model_is_not_timed(name):
    """The same of a whole encoder."""
    _check_with_a_wrong_norm("encoder", name)


@pytest.mark.parametrize("name", ["full", "live", "sparse", "multiply"])
def test_a_wrong_step_is_not_timed(name):
    """The same of its training step."""
    _check_with_a_wrong_norm("step", name)


def _check_with_a_wrong_norm(case, name):  # type: ignore[no-untyped-def]
    made = CASES[case](tiny(case), (name,))
    wrong = made.models[name].encoder.layer[0].output.LayerNorm
    # Its own, where others share theirs.
    wrong.weight = torch.nn.Parameter(wrong.weight.detach() * 1.5, requires_grad=wrong.weight.requires_grad)
    with pytest.raises(RuntimeError, match="is wrong"):
        made.check()


@pytest.mark.parametrize("unit", ["both", "weights"])
def test_a_wrong_fastmask_is_not_timed(unit):
    """We are reported as fast where we are wrong."""
    case = CASES["encoder"](tiny("encoder", unit=unit), ("fastmask",))
    layer = case.models["fastmask"].get_submodule("encoder.layer.0.output.dense")
    layer.mask = layer.mask.replaced(0, ~_own(layer.mask, 0))
    with pytest.raises(RuntimeError, match="fastmask is wrong"):
        case.check()


def test_a_wrong_operator_is_not_timed():
    """The same where no rival runs beside it."""
    case = CASES["op"](tiny("op"), ("fastmask",))
    right, case.mask = case.mask, case.mask.replaced(0, ~_own(case.mask, 0))
    case.functions["fastmask"], case.mask = case.function("fastmask"), right
    with pytest.raises(RuntimeError, match="is wrong: error"):
        case.check()


def _own(mask: Mask, language: int) -> torch.Tensor:
    keep = mask.to_dense()[language]
    return {"rows": keep[:, 0], "columns": keep[0]}.get(mask.kind, keep)


def test_sparse_tuning_is_held_against_masked_gradients(monkeypatch):
    """A step that lets a language change what is not its own is timed as sparse fine-tuning."""
    attach = fm.attach
    monkeypatch.setattr(fm, "attach", lambda model, subnets, forward="masked": attach(model, subnets))
    case = CASES["step"](tiny("step", present=3), ("sparse",))
    with pytest.raises(RuntimeError, match="of sparse is wrong"):
        case.check()


@pytest.mark.parametrize("name", ["full", "fastmask", "multiply"])
def test_a_wrong_episode_is_not_timed(name):
    """An episode with another meta-gradient is timed."""
    case = CASES["episode"](tiny("episode", present=2), (name,))
    case.check()
    with torch.no_grad():
        case.models[name].classifier.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="is wrong"):
        case.check()


def test_speeds_are_taken_of_pairs(monkeypatch):
    """A slower implementation is reported as a faster one, or our dense is taken for PyTorch's."""
    times = [[4.0, 8.0, 4.0], [2.0, 4.0, 2.0], [1.0, 2.0, 0.5]]  # dense, full, fastmask
    monkeypatch.setattr(measuring, "rounds", lambda *_, **__: times)
    _, full, ours = measure(Job(tiny("op"), ("fastmask",), ("forward",)), 0)
    assert ours.ms == (1.0, 0.75, 1.5)
    assert (ours.over_dense, ours.over_full) == ((4, 4, 6), (2, 2, 3))
    assert (full.over_dense, full.over_full) == ((2, 2, 2), (1, 1, 1))
    assert ours.tokens_per_s == 16 / 1e-3


def test_a_part_may_say_how_it_runs(monkeypatch):
    """The host's time is the device's, a graph is the same as a call, or one that fails takes the others with it."""

    def captured(side):  # type: ignore[no-untyped-def]
        graphs.append(side)
        if len(graphs) == 3:
            raise RuntimeError("cannot be captured\nbecause")
        return side

    def rounds(sides, clock, *_, **__):  # type: ignore[no-untyped-def]
        clocks.append(clock)
        return [[1.0, 1.0]] * len(sides)

    graphs: list[object] = []
    clocks: list[str] = []
    monkeypatch.setattr(measuring, "captured", captured)
    monkeypatch.setattr(measuring, "rounds", rounds)
    monkeypatch.setattr(measuring, "this_machine", lambda device: MACHINE)
    case = CASES["op"](tiny("op"), ("fastmask", "loop"))
    monkeypatch.setattr(case, "sides", lambda part: dict.fromkeys(case.chosen, {"dW": Side(list)}[part]))
    case.setting = replace(case.setting, device="cuda")
    assert [row.part for row in measuring._rows(case, "dW host-time", 0, False)] == ["dW host-time"] * 4
    found = measuring._rows(case, "dW graph", 0, False)
    assert [row.implementation for row in found] == ["dense", "full", "loop"]
    assert found[0].note.endswith("without a graph of fastmask: cannot be captured")
    assert clocks == ["cpu", "cuda"]
    for part, message in (("dW twice", "unknown way to run a part 'twice'"), ("dW graph", "a CUDA graph needs a GPU")):
        with pytest.raises((KeyError, ValueError), match=message):
            CASES["op"].refuse(Job(tiny("op"), parts=(part,)))


# ---- rivals


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [2, 1, 0, 1], [-1, 0, -1, 0], [1]])
def test_block_sparse_rows(ids):
    """PyTorch's block-sparse product is compared on other masks, or in another order."""
    from fastmask.torch_path.naive import masked_linear_naive

    torch.manual_seed(0)
    mask = Mask.blocks(torch.rand(3, 2, 3) < 0.5, (16, 16))
    x, weight, bias = torch.randn(len(ids), 5, 48), torch.randn(32, 48), torch.randn(32)
    language_ids = torch.tensor(ids)
    found = BASELINES["bsr"](x, weight, Task(mask, language_ids), bias)
    torch.testing.assert_close(found, masked_linear_naive(x, weight, mask, language_ids, bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="for masks over blocks, not rows"):
        BASELINES["bsr"](x, weight, Task(Mask.rows(torch.ones(3, 32).bool(), 48), language_ids), bias)


def test_why_not():
    """A sweep dies of a rival that does not apply, or leaves one out that does."""
    for name, unit, present, dtype, applies in [
        ("multiply", "neurons", 2, "float32", False),
        ("multiply", "neurons", 1, "float32", True),
        ("gating", "neuron-inputs", 9, "float32", True),
        ("gating", "weights", 1, "float32", False),
        ("packed", "blocks16", 4, "float32", False),
        ("bsr", "blocks16", 4, "float32", True),
        ("bsr", "blocks16", 4, "bfloat16", False),
        ("loop", "weights", 4, "bfloat16", True),
    ]:
        setting = tiny("op", unit=unit, languages=9, batch=9, present=present, dtype=dtype)
        assert (why_not(name, setting) is None) is applies, name
    assert why_not("packed", tiny("op", compiled=True))
    assert why_not("loop", tiny("op", compiled=True)) is None


def test_what_is_asked_for_can_be_measured():
    """A unit, an implementation or a target is named that no case knows, or that no table explains."""
    assert {unit for case in CASES.values() for unit in case.units} == set(UNITS)
    assert {name for case in CASES.values() for name in case.implementations} == set(EXPLAINED)
    for job in [*QUICK, *(target.job for target in TARGETS)]:
        CASES[job.setting.case].refuse(job)
    for target in TARGETS:
        assert target.part in (target.job.parts or CASES[target.job.setting.case].parts)
        assert {target.of, *target.against} <= {"dense", "full", *target.job.names}
        assert target.job.peaks or target.metric != "peak"
