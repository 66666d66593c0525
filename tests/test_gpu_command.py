"""`make gpu` as far as it goes without a GPU: its baselines, its arithmetic, and the code that waits and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastmask_kernels.interpreter import interpreter_problem

from benchmarks import baselines
from benchmarks.baselines import BASELINES, BaselineLinear, Task
from benchmarks.checking import check_close
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import gate
from benchmarks.gpu.layers import Layer, spread
from benchmarks.gpu.report import Row, file_name, row_of, table, write
from benchmarks.gpu.setup import TINY
from benchmarks.gpu.timing import break_even
from benchmarks.measure import Ratio, Side, compare, quartile_ratios, rounds
from benchmarks.product import Product, gathered, mixed_ids, units_of
from fastmask import Mask
from fastmask.torch_path.naive import masked_linear_naive

ROOT = Path(__file__).resolve().parents[1]
interprets = pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
L, N, K = 3, 32, 48
IDS = {
    "mixed": [2, 0, 0, 1, -1, 2, 0],
    "one": [0, 0],
    "dead": [1, 1, 1],
    "full": [-1, -1],
    "shares": [0, 0, 2, 2],
    "uneven": [0, 2, 2, 2],
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from a plain checkout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# ---- the command


def test_without_a_gpu_it_says_so(tmp_path):
    """`make gpu` fails on a machine without a GPU, or writes results that nobody measured."""
    done = run("-m", "benchmarks.gpu", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no GPU here: nothing to check, nothing to measure"
    assert not list(tmp_path.iterdir())


def test_make_needs_no_virtual_environment():
    """`make gpu` would install something first."""
    # Under `make test` this is a make inside of a make, which must not inherit its options.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PYTHONPATH=.:kernels", "python3", "-m", "benchmarks.gpu"]


BLOCKED = """
import importlib.machinery as machinery
BLOCKED = {"rich", "hypothesis", "accelerate", "datasets", "conllu", "udtools", "ufal", "matplotlib", "xdist", "pandas"}
find = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):  # transformers asks whether a package is there, so nothing is raised
    return None if name.partition(".")[0] in BLOCKED else find(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
import importlib.util
assert importlib.util.find_spec("rich") is None
import benchmarks.baselines, benchmarks.gpu.__main__
from benchmarks.gpu import encoder, layers, small, sweep
from benchmarks.gpu.setup import TINY
encoder.Encoders(TINY)
print("imported")
"""


def test_imports_little():
    """A machine with torch, triton, transformers, numpy and pytest alone cannot run it."""
    done = run("-c", BLOCKED)
    assert done.stdout.strip() == "imported", done.stderr[-2000:]


def dry_run(*sections: str) -> str:
    done = run("-m", "benchmarks.gpu", "--dry-run", "--only", *sections)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@interprets
def test_dry_run():
    """The code that measures dies of a typo on the first real run."""
    said = dry_run("ceilings", "blocks", "layouts")
    for what in ("64^3 product", "dW: break-even sparsity", "TileLayout from bits"):
        assert what in said
    assert "FAILED" not in said


@interprets
@pytest.mark.slow
def test_dry_run_of_everything():
    """The same for the sections that take long in the interpreter."""
    assert "FAILED" not in dry_run(*command.SECTIONS)


def test_a_measurement_that_hangs_loses_no_other(monkeypatch):
    """One kernel that never ends takes all results with it."""
    seen = []

    def child(argv, **options):
        first = int(argv[argv.index("--first") + 1])
        seen.append(first)
        lines = {
            0: [{"begins": "a", "number": 0}, {"row": {"what": "a", "value": 2.0}}, {"begins": "b", "number": 1}],
            2: [{"begins": "c", "number": 2}, {"row": {"what": "c", "error": "sticky"}}],
            3: [{"begins": "d", "number": 3}],
            4: [{"begins": "e", "number": 4}, {"row": {"what": "e"}}],
        }[first]
        Path(argv[argv.index("--rows") + 1]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if first == 0:
            raise subprocess.TimeoutExpired(argv, 1)
        return SimpleNamespace(returncode={2: command.STICKY, 3: -11, 4: 0}[first], stderr="it\nbroke\n")

    monkeypatch.setattr(command.subprocess, "run", child)
    rows = command.measure("units", 60, dry_run=True)
    assert seen == [0, 2, 3, 4]
    assert [(row.what, row.error) for row in rows] == [
        ("a", ""),
        ("b", "took too long"),
        ("c", "sticky"),
        ("d", "crashed: broke"),
        ("e", ""),
    ]


def test_a_section_that_does_not_start_is_reported(monkeypatch):
    """A section that cannot be imported is begun again and again, or goes unnoticed."""
    done = SimpleNamespace(returncode=1, stderr="ImportError: x")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: done)
    assert [row.error for row in command.measure("units", 60, dry_run=True)] == ["ImportError: x"]
    assert "out of time" in command.measure("units", 0, dry_run=True)[0].error


class Clock:
    """Time that passes as the test says, and what ran when."""

    def __init__(self, monkeypatch, red=()):  # type: ignore[no-untyped-def]
        self.now, self.ran, self.limits = 0.0, [], {}
        monkeypatch.setattr(command.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "describe", lambda root: {"gpu": "A GPU"})
        for check in ("repeatable", "green"):
            monkeypatch.setattr(gate, check, lambda root, limit, check=check: self.run(check, limit, check not in red))
        monkeypatch.setattr(
            command, "measure", lambda section, limit, dry: self.run(section, limit, [Row(section, 2.0, goal=1.0)])
        )

    def run(self, what, limit, result):  # type: ignore[no-untyped-def]
        self.ran.append(what)
        self.limits[what] = limit
        self.now += 30
        return result


@pytest.mark.parametrize("red", [(), ("repeatable",), ("green",), ("repeatable", "green")], ids=str)
def test_a_red_test_stops_nothing_and_marks_every_row(red, monkeypatch, tmp_path, capsys):
    """One red test loses all timings, or they look as if everything had been right."""
    clock = Clock(monkeypatch, red)
    code = command.main(["--out", str(tmp_path)])
    assert clock.ran == ["repeatable", "green", *command.SECTIONS]
    assert code == (1 if red else 0)
    found = json.loads((tmp_path / "a-gpu.json").read_text())
    assert found["checked"] is (not red)
    assert {row["checked"] for row in found["rows"]} == {not red}
    assert ("UNCHECKED: a test failed" in capsys.readouterr().out) is bool(red)


def test_each_section_is_printed_and_written_as_it_ends(monkeypatch, tmp_path, capsys):
    """A run that is stopped loses what it had measured."""
    clock = Clock(monkeypatch)
    measured = command.measure

    def stopped(section, limit, dry):  # type: ignore[no-untyped-def]
        if section == "encoder":
            raise KeyboardInterrupt
        return measured(section, limit, dry)

    monkeypatch.setattr(command, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(tmp_path)])
    done = clock.ran[2:]
    assert done == ["ceilings", "units", "bert"]
    assert [row["what"] for row in json.loads((tmp_path / "a-gpu.json").read_text())["rows"]] == done
    said = capsys.readouterr().out
    assert all(f"{section}: done at" in said for section in done)


def test_seconds_bound_everything(monkeypatch, tmp_path):
    """The tests take the time of the measurements, or the whole takes longer than was asked for."""
    clock = Clock(monkeypatch)
    command.main(["--out", str(tmp_path), "--seconds", "100"])
    assert clock.limits["repeatable"] == command.TURNS_SECONDS
    assert clock.limits["green"] == 70
    assert clock.limits["ceilings"] == 40
    assert clock.limits["units"] == 10
    assert clock.limits["bert"] < 0  # `measure` begins nothing then


# ---- the gate


@pytest.mark.parametrize(
    ("tests", "green"),
    [
        ("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass", True),
        ("def test_a(): pass\ndef test_b(): assert False", False),
        ("import nothing_of_this_name\ndef test_a(): pass", False),
        ("", False),
        ("def test_a(): pass\ndef test_b():\n    import time; time.sleep(60)", False),
    ],
    ids=["green", "red", "broken", "none", "hangs"],
)
def test_gate(tests, green, tmp_path, monkeypatch, capsys):
    """Something is timed although a test fails, hangs, or never ran."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    (tmp_path / "test_sample.py").write_text(tests)
    assert gate.green(tmp_path, 5 if "sleep" in tests else 60, ["test_sample.py"], processes=2) is green
    said = capsys.readouterr().out
    if green:
        assert "3 passed, 0 failed" in said  # each test in one process


def test_gate_takes_the_tests_that_run_there(monkeypatch):
    """The gate runs every test of a kernel that the machine can run, and none that needs what is not there."""
    files = gate.test_files(ROOT)
    assert files[:2] == [os.path.join("tests", "gpu"), os.path.join("tests", "triton_path")]
    names = {Path(path).name for path in files[2:]}
    assert names >= {"test_row_kernels.py", "test_tile_kernels.py", "test_pair_kernels.py", "test_packing.py"}
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: None)
    few = gate.test_files(ROOT)
    assert few[:2] == files[:2]
    assert all("from hypothesis" not in (ROOT / path).read_text() for path in few[2:])


def test_the_programs_that_take_turns_have_a_test_of_their_own():
    """The first check runs nothing, and a hang is found when the time of the whole gate has passed."""
    assert f"def test_{gate.TURNS}(" in (ROOT / "tests" / "gpu" / "test_on_gpu.py").read_text()


# ---- baselines


def mask_of(kind: str) -> Mask:
    """Language 1 owns nothing, 2 everything."""
    generator = torch.Generator().manual_seed(0)

    def keep(*shape: int) -> torch.Tensor:
        flags = torch.rand(L, *shape, generator=generator) < 0.5
        flags[1], flags[2] = False, True
        return flags

    if kind == "rows":
        return Mask.rows(keep(N), K)
    if kind == "columns":
        return Mask.columns(keep(K), N)
    return Mask.blocks(keep(N // 16, K // 16), (16, 16)) if kind == "blocks" else Mask.weights(keep(N, K))


def gradients(function, x, weight, bias, dy):  # type: ignore[no-untyped-def]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = function(*leaves, *([None] if bias is None else []))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", [(3,), (), (2, 3)], ids=["tokens", "no_tokens", "two_axes"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", ["rows", "columns", "blocks", "weights"])
@pytest.mark.parametrize("name", ["multiply", "loop", "gating"])
def test_baselines_compute_the_masked_layer(name, kind, ids, with_bias, shape):
    """We would be compared with something that computes less, or something else."""
    mask, language_ids = mask_of(kind), torch.tensor(IDS[ids])
    task, baseline = Task(mask, language_ids), BASELINES[name]
    torch.manual_seed(1)
    x, dy = (torch.randn(len(language_ids), *shape, size, dtype=torch.float64) for size in (K, N))
    weight, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    bias = bias if with_bias else None

    def ours():  # type: ignore[no-untyped-def]
        return gradients(lambda x, w, b: baseline(x, w, task, b), x, weight, bias, dy)

    if (name == "multiply" and len(set(IDS[ids])) > 1) or (name == "gating" and kind in ("blocks", "weights")):
        with pytest.raises(ValueError, match=r"one mask for a whole batch|gates are for masks"):
            ours()
        return
    expected = gradients(lambda x, w, b: masked_linear_naive(x, w, mask, language_ids, b), x, weight, bias, dy)
    for found, exact in zip(ours(), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_dense_knows_no_masks():
    """The yardstick of every row would be masked."""
    task = Task(mask_of("weights"), torch.tensor(IDS["mixed"]))
    x, weight, bias = torch.randn(7, 3, K), torch.randn(N, K), torch.randn(N)
    assert torch.equal(baselines.dense(x, weight, task, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
@pytest.mark.parametrize("ids", ["mixed", "dead", "shares", "uneven"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_packed_equals_an_attached_layer(kind, ids):
    """The vendor's grouped product over live rows computes less, or something else."""
    mask, language_ids = mask_of(kind), torch.tensor(IDS[ids])
    product = Product(mask, language_ids, 8, torch.device("cpu"), torch.bfloat16)
    product.check_against("packed")


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
def test_a_wrong_packed_baseline_is_noticed(monkeypatch):
    """We are compared with something that computes less."""
    product = Product(mask_of("rows"), torch.tensor([0, 2]), 8, torch.device("cpu"), torch.bfloat16)
    wrong = lambda x, w, task, b: baselines.packed(x, 1.2 * w, task, b)  # noqa: E731
    monkeypatch.setitem(BASELINES, "packed", wrong)
    with pytest.raises(RuntimeError, match="baseline packed is wrong"):
        product.check_against("packed")


def test_baseline_linear_shares_parameters():
    """A model under a baseline trains other weights than the one it stands for."""
    linear = torch.nn.Linear(K, N)
    layer = BaselineLinear(linear, Task(mask_of("rows"), torch.tensor([0, 2])), baselines.loop)
    assert layer.weight is linear.weight
    assert layer(torch.randn(2, 3, K)).shape == (2, 3, N)


# ---- arithmetic


def test_quartile_ratios():
    """Ratios are taken of medians, or the wrong way round."""
    low, median, high = quartile_ratios([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 1.0, 2.0, 2.0, 2.0])  # 2 4 3 4 5
    assert (low, median, high) == (3.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([1.4, 1.2, 0.8, 0.5], 0.15),  # crosses 1 half-way between 0.1 and 0.2
        ([1.1, 1.0, 0.9, 0.8], 0.1),
        ([0.9, 0.8, 0.7, 0.6], 0.0),
        ([1.3, 1.2, 1.1, 1.01], None),
        ([0.9, 1.2, 1.2, 0.8], 0.25),  # what it was before the last crossing does not count
        ([1.2, 0.9, 0.9, 1.1], None),
    ],
)
def test_break_even(times, found):
    """A kernel that never pays is reported as one that does."""
    result = break_even([0.0, 0.1, 0.2, 0.3], times)
    assert result == pytest.approx(found) if found is not None else result is None


def test_rows_say_whether_their_goal_is_reached():
    """SHORT is printed as ok."""
    ratio = Ratio(median=1.5, low=1.4, high=1.6, baseline_ms=3.0, ours_ms=2.0, pairs=9)
    row = row_of("speed", ratio, "dense", goal=1.7, flops=4e9)
    assert (row.verdict, row.ours_ms, row.baseline_ms) == ("SHORT", 2.0, 3.0)
    assert row.tflops == pytest.approx(2.0)  # 4e9 in 2 ms
    # As time, ours is the first side that `compare` was given.
    row = row_of("time", ratio, "dense", as_time=True, goal=1.6, flops=6e9)
    assert (row.verdict, row.ours_ms, row.baseline_ms) == ("ok", 3.0, 2.0)
    assert row.tflops == pytest.approx(2.0)
    assert Row("a", 1.0).verdict == ""
    assert Row("a", goal=1.0, error="broke").verdict == "FAILED"


def test_table_fits():
    """The end of the output, which is all that some machines return, cuts the table off."""
    rows = [Row(f"row {i}", 1.234, 1.1, 1.3, goal=1.0 if i % 3 else None, note="n" * 200) for i in range(60)]
    rows += [Row("broken", error="it broke " * 20), Row("file only", printed=False)]
    text = table(rows)
    assert len(text) <= 9300
    assert all(f"row {i} " in text for i in range(60))
    assert "1.23x" in text
    assert "it broke" in text
    assert "file only" not in text
    short = table([*rows, *(Row(f"more {i}", 1.0) for i in range(200))], limit=6000)
    assert len(short) <= 6000
    assert "more rows in the file" in short
    assert "broken" in short


def test_results_file(tmp_path):
    """The file does not hold what was printed, or hides that nothing was checked."""
    path = tmp_path / "new" / file_name("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    write(path, {"gpu": "NVIDIA H200"}, [Row("a", 2.0, goal=1.5, more={"pairs": 3})], checked=False)
    found = json.loads(path.read_text())
    assert found["checked"] is False
    assert found["rows"][0]["reached"] is True
    assert found["rows"][0]["more"] == {"pairs": 3}


def test_rounds_run_every_side_in_turn():
    """One side always runs first, with the other's data in the cache."""
    order: list[str] = []
    sides = [Side(lambda name=name: order.append(name)) for name in "ab"]
    times = rounds(sides, torch.device("cpu"), seconds=0.0, warm_up=1)
    assert "".join(order) == "ab" + "ab" + "abba"
    assert [len(own) for own in times] == [2, 2]
    assert compare(*sides, torch.device("cpu"), 0.0).pairs == 2


def test_nothing_wrong_is_timed():
    """A fast wrong kernel makes it into the table."""
    layer = Layer(TINY, Mask.weights(torch.rand(2, 8, 8) < 0.5), mixed_ids(4, 2))
    layer.check()
    wrong = Layer(TINY, Mask.weights(torch.rand(2, 8, 8) < 0.5), mixed_ids(4, 2))
    wrong.mask = wrong.mask.map(lambda tensor: tensor ^ 1)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        wrong.compared("forward", "row")
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="is wrong"):
        check_close("y", torch.full((4,), torch.nan), exact, torch.ones(4))


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_packed_and_spread(kind):
    """Packed layers are checked against the wrong numbers."""
    mask, ids = mask_of(kind), torch.tensor([0, 2, 1, -1])
    size = N if kind == "rows" else K
    full = torch.randn(4, 3, size)
    own = torch.cat([mask.to_dense(), torch.ones(1, N, K, dtype=torch.bool)])[ids].any(2 if kind == "rows" else 1)
    packed = gathered(full, mask, ids, size + 2)
    count = mask.live_counts()[0]
    assert torch.equal(packed[0, :, :count], full[0][:, own[0]])
    assert not packed[0, :, count:].any()
    assert torch.equal(spread(packed, mask, ids, size), full * own[:, None])


def test_units_of_a_density():
    """Masks are not as dense as the row says."""
    keep = units_of(8, 64, 16, 0.5)
    assert keep.sum(1).tolist() == [32] * 8
    assert torch.equal(keep, keep[:, ::16].repeat_interleave(16, 1))
    assert mixed_ids(4, 2).tolist() == [0, 0, 1, 1]
    assert sorted(mixed_ids(32, 8, shuffled=True).tolist()) == mixed_ids(32, 8).tolist()
