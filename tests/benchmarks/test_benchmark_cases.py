"""The cases: their ideals by hand, and nothing is timed that computes something else."""

from __future__ import annotations

import pytest
import torch

import fastmask as fm
from benchmarks.baselines import BASELINES, Task, why_not
from benchmarks.cases import CASES, case_of
from benchmarks.cases.encoder import live_flops
from benchmarks.product import Product
from benchmarks.running import Job, measure
from benchmarks.setting import UNITS, Setting, Shape
from benchmarks.variants import Variants
from fastmask import Mask

TINY = {"shape": "toy", "layers": 1, "tokens": 4, "batch": 4, "languages": 3}
OF_OP = [unit for unit in CASES["op"].units if unit not in ("blocks32", "blocks64")] + ["blocks32"]


def tiny(case: str, **changes: object) -> Setting:
    """A setting of a case that takes no time."""
    return Setting(case, **(TINY | case_of(case).defaults | TINY | changes))  # type: ignore[arg-type]


# ---- ideals


def test_live_flops_by_hand():
    """The ideal that every share is taken of forgets a product."""
    shape = Shape(hidden=8, ffn=16, heads=2)
    # Per token of 4: Q, K, V, O 4 x 64; scores and mix 2 x 4 x 8; up and down 2 x 8 x 16.
    heads, neurons = torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [0.25]])
    assert live_flops(shape, 4, heads, neurons).tolist() == [320 + 256, 160 + 64]


@pytest.mark.parametrize(
    ("setting", "ideal"),
    [
        (tiny("encoder", unit="both", density=0.5), 2.0),
        (tiny("encoder", unit="neurons", density=0.5, layers=2), (4 * 1024 + 2 * 4 * 32 + 4096) / (4352 + 2048)),
        (tiny("encoder", unit="weights", density=0.5), 1.0),
        (tiny("attention", unit="heads", density=0.25), 4.0),
        (tiny("op", unit="neurons", density=0.25), 4.0),
        (tiny("op", unit="head-inputs", density=0.75), 4 / 3),
        (tiny("op", unit="blocks16", density=0.5), 2.0),
        (tiny("op", unit="weights", density=0.5), 1.0),
        (tiny("discovery", density=0.7), 3 / (1 + 0.9 + 0.8)),
        (tiny("episode", density=0.5, languages=2, present=2), 2.0),
    ],
    ids=lambda value: value.words() if isinstance(value, Setting) else "",
)
def test_ideal_by_hand(setting, ideal):
    """Shares of the FLOP-ideal are shares of something else."""
    assert case_of(setting.case)(setting).ideal() == pytest.approx(ideal)


def test_ideal_of_the_optimiser_is_by_weights_moved():
    """Embeddings and LayerNorm, which no mask touches, are counted as skipped."""
    assert 1 < case_of("optimizer")(tiny("optimizer")).ideal() < 2


def test_ideal_of_a_step_counts_what_no_mask_touches():
    """The scorers above the encoder are counted as skipped."""
    case = case_of("step")(tiny("step", present=3))
    case.check()
    assert 1 < case.ideal() < 2


# ---- proofs


@pytest.mark.parametrize("present", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unit", OF_OP)
def test_every_implementation_is_proven(unit, dtype, present):
    """A baseline does not run for some kind of mask, or computes something else."""
    case = case_of("op")(tiny("op", unit=unit, dtype=dtype, present=present))
    case.check()
    assert {"dense", "fastmask", "full", "loop", "stack"} <= set(case.chosen)
    assert ("gating" in case.chosen) is not (unit.startswith("blocks") or unit == "weights")
    assert ("multiply" in case.chosen) is (present == 1)
    assert ("bsr" in case.chosen) is (unit.startswith("blocks") and dtype == "float32")


@pytest.mark.parametrize("name", ["multiply", "loop", "stack", "gating", "bsr"])
def test_a_wrong_baseline_is_not_timed(name, monkeypatch):
    """We are compared with something fast that computes something else."""
    right = BASELINES[name]
    monkeypatch.setitem(BASELINES, name, lambda x, weight, task, bias=None: right(x, 1.2 * weight, task, bias))
    unit = "blocks16" if name == "bsr" else "neurons"
    with pytest.raises(RuntimeError, match=f"{name} is wrong: nothing is timed"):
        measure(Job(tiny("op", unit=unit)), 0)


@pytest.mark.parametrize("case", ["op", "encoder", "attention", "step"])
def test_the_full_network_is_dense(case, monkeypatch):
    """The yardstick that multiplies matrices as we do leaves something out, and our shares come out too large."""
    made = case_of(case)(tiny(case, **({"present": 3} if case == "step" else {})), ("full",))
    made.check()
    assert made.ideal_of("full") == 1
    of_language, of_all = fm.language, Product.full
    monkeypatch.setattr(fm, "language", lambda model, name: of_language(model, name or "language 0"))
    monkeypatch.setattr(Product, "full", lambda self, x, weight, *more: of_all(self, x, 1.5 * weight, *more))
    with pytest.raises(RuntimeError, match=r"full is wrong|full network is wrong"):
        made.check()


@pytest.mark.parametrize("name", ["multiply", "gating", "compact"])
def test_a_wrong_model_is_not_timed(name):
    """The same of a whole encoder."""
    case = case_of("encoder")(tiny("encoder"))
    with torch.no_grad():
        wrong = case.models[name].encoder.layer[0].output.LayerNorm
        wrong.weight = torch.nn.Parameter(wrong.weight * 1.5)  # its own: the others share theirs
    with pytest.raises(RuntimeError, match=f"{name} is wrong"):
        case.check()


@pytest.mark.parametrize("unit", ["both", "weights"])
def test_a_wrong_fastmask_is_not_timed(unit):
    """We are reported as fast where we are wrong."""
    case = case_of("encoder")(tiny("encoder", unit=unit))
    layer = case.models["fastmask"].get_submodule("encoder.layer.0.output.dense")
    layer.mask = layer.mask.replaced(0, ~_own(layer.mask, 0))
    with pytest.raises(RuntimeError, match="is wrong"):
        case.check()


@pytest.mark.parametrize("case", ["op", "layer"])
def test_a_wrong_operator_is_not_timed(case):
    """The same where no baseline runs beside it."""
    made = case_of(case)(tiny(case), ("fastmask",))
    made.product.mask = made.product.mask.replaced(0, ~_own(made.product.mask, 0))
    with pytest.raises(RuntimeError, match="is wrong: error"):
        made.check()


def _own(mask: Mask, language: int) -> torch.Tensor:
    keep = mask.to_dense()[language]
    return {"rows": keep[:, 0], "columns": keep[0]}.get(mask.kind, keep)


def test_wrong_discovery_is_not_timed(monkeypatch):
    """Rounds that find other masks are timed as the same ones."""
    from benchmarks.cases import discovery

    case = case_of("discovery")(tiny("discovery"))
    monkeypatch.setattr(discovery, "_without_lowest", lambda keep, score, count: _first_out(keep, count))
    with pytest.raises(RuntimeError, match="finds other subnetworks"):
        case.check()


def _first_out(keep: torch.Tensor, count: int) -> torch.Tensor:
    flat = keep.flatten().clone()
    flat[flat.nonzero().flatten()[1 : 1 + count]] = False
    return flat.view_as(keep)


def test_wrong_step_is_not_timed(monkeypatch):
    """A training step that does not do what masks say is timed."""
    monkeypatch.setattr(Variants, "of", lambda self, name: self.plain)  # a reference without masks: not ours
    with pytest.raises(RuntimeError, match="of the attached parser is wrong: nothing is timed"):
        case_of("step")(tiny("step", present=3)).check()


def test_wrong_optimiser_is_not_timed():
    """A step that moves dead weights is timed as one that leaves them alone."""
    case = case_of("optimizer")(tiny("optimizer"))
    case.ours.param_groups[0]["lr"] *= 2
    with pytest.raises(RuntimeError, match="are not where AdamW moves them"):
        case.check()


def test_wrong_episode_is_not_timed():
    """An episode with another meta-gradient is timed."""
    case = case_of("episode")(tiny("episode", languages=2, present=2))
    case.beds["fastmask"].batches[0][1][1].zero_()
    with pytest.raises(RuntimeError, match="the meta-gradient of"):
        case.check()


# ---- baselines that were not there before


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
    """A sweep dies of a baseline that does not apply, or leaves one out that does."""
    assert why_not("multiply", "rows", 2, backward=True, half=False)
    assert why_not("multiply", "rows", 1, backward=True, half=False) is None
    assert why_not("gating", "columns", 9, backward=True, half=False) is None
    assert why_not("gating", "weights", 1, backward=True, half=False)
    assert why_not("bsr", "blocks", 4, backward=False, half=False) is None
    assert why_not("bsr", "blocks", 4, backward=True, half=False)
    assert why_not("grouped", "rows", 4, backward=True, half=False)
    assert why_not("loop", "weights", 4, backward=True, half=True) is None


def test_every_unit_belongs_to_a_case():
    """A unit can be named that nothing measures."""
    assert {unit for case in CASES.values() for unit in case.units} == set(UNITS)
