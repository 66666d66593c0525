"""`make gpu` as far as it goes without a GPU: the gate, the process that measures, and what is printed and written."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from fastmask_kernels.interpreter import interpreter_problem

from benchmarks import row as rows_file
from benchmarks import tables
from benchmarks.baselines import EXPLAINED
from benchmarks.cases import CASES
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import gate
from benchmarks.gpu.sections import GRAPH, HOST, SECTIONS, TARGETS, tiny
from benchmarks.row import Job, Row, Setting

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from made_rows import made_row
from processes import fork_pools
from worker_calls import call

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from a plain checkout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# ---- the command


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    """`make gpu` fails on a machine without a GPU, or writes results that nobody measured."""
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == "no GPU here: nothing to check, nothing to measure"
    assert not list(tmp_path.iterdir())


def test_make_needs_no_virtual_environment():
    """`make gpu` would install something first."""
    # Under `make test` this is a make inside of a make, which must not inherit its options.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PYTHONPATH=.:kernels", "python3", "-m", "benchmarks.gpu"]


# With all out of sight but what the page names, and what that requires. Of this, too, what older versions do without.
LITTLE = """
import functools, importlib.machinery as machinery, importlib.metadata as metadata, importlib.util, re
from packaging.requirements import Requirement
left, there = ["torch", "triton", "transformers", "numpy", "pytest"], set()
while left:
    name = re.sub("[-_.]+", "-", left.pop()).lower()
    if name not in there:
        there.add(name)
        try:
            needs = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
there -= {"pydantic", "pydantic-core", "rich"}
known = metadata.packages_distributions()
hidden = {name for name, of in known.items() if not any(re.sub("[-_.]+", "-", one).lower() in there for one in of)}
find = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):  # transformers asks whether a package is there, so nothing is raised
    return None if name.partition(".")[0] in hidden else find(name, path, target)
machinery.PathFinder.find_spec = functools.partial(find_spec)  # pytest keeps it in a class, where functions bind
assert {"pydantic", "hypothesis", "pandas"} <= hidden and importlib.util.find_spec("pydantic") is None
"""
# One job in the interpreter.
ONE_JOB = """
from benchmarks import tables
from benchmarks.gpu import __main__
from benchmarks.gpu.sections import UNITS, tiny
from benchmarks.cases.encoder import encoder_of
from benchmarks.measure import measure
from benchmarks.row import SHAPES
encoder_of(SHAPES["toy"], 1, 8)
tables.print_rows(measure(tiny(UNITS["heads"]), 0.0))
"""


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
def test_it_needs_little_and_measures():
    """A machine with torch, triton, transformers, numpy and pytest alone cannot run it, or dies of a typo there."""
    done = run("-c", LITTLE + ONE_JOB, TRITON_INTERPRET="1", FASTMASK_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert all(name in lines[1] for name in ("over torch dense", "over our dense", "ideal", "share of ideal"))
    assert [line.split()[0] for line in lines[2:7]] == ["dense", "full", "fastmask", "loop", "gating"]


def test_its_tests_need_little():
    """A test of the gate needs what is not on such a machine, so that all of them end at once there."""
    collect = """
import pytest
from pathlib import Path
from benchmarks.gpu import gate
raise SystemExit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *gate.test_files(Path.cwd())]))
"""
    done = run("-c", LITTLE + collect, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "tests/triton_path/test_triton_path.py: " in done.stdout


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
@pytest.mark.slow
def test_dry_run_of_everything():
    """The same of the whole command."""
    done = run("-m", "benchmarks.gpu", "--dry-run", "--seconds", "3600")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"==== {section}: done" in done.stdout for section in SECTIONS)
    assert "FAILED" not in done.stdout


class Clock:
    """Time that passes as the test says, and what ran when."""

    def __init__(self, monkeypatch, red=(), broken=()):  # type: ignore[no-untyped-def]
        self.now, self.ran, self.limits, self.broken = 0.0, [], {}, broken
        monkeypatch.setattr(command.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "SECTIONS", {name: [jobs[0]] for name, jobs in SECTIONS.items()})
        monkeypatch.setattr(command.workers, "processes", lambda number, threads: nullcontext(self))
        for check in ("repeatable", "green"):
            monkeypatch.setattr(
                gate, check, lambda root, limit, check=check: self.passed(check, limit, check not in red)
            )

    def submit(self, measure: object, job: Job, seconds: float) -> Clock:
        """As a process; `result` as what it promises."""
        self.job = job
        return self

    def result(self, limit: float) -> list[Row]:
        job = self.job.on(self.job.setting.threads, "cpu")
        (section,) = (name for name, jobs in SECTIONS.items() if jobs[0] == job)
        if section in self.broken:
            raise self.broken[section]
        rows = [made_row(part=part, **vars(self.job.setting)) for part in job.parts]
        return self.passed(section, limit, rows)  # type: ignore[no-any-return]

    def passed(self, what, limit, result):  # type: ignore[no-untyped-def]
        self.ran.append(what)
        self.limits[what] = limit
        self.now += 30
        return result


FILE = "a-processor-with-a-comma-model-2.csv"


@pytest.mark.parametrize("red", [(), ("repeatable",), ("green",), ("repeatable", "green")], ids=str)
def test_a_red_test_stops_nothing_and_marks_every_row(red, monkeypatch, tmp_path, capsys):
    """One red test loses all timings, or they look as if everything had been right."""
    clock = Clock(monkeypatch, red)
    code = command.main(["--out", str(tmp_path)])
    assert clock.ran == ["repeatable", "green", *SECTIONS]
    assert code == (1 if red else 0)
    assert {row.checked for row in rows_file.read(tmp_path / FILE)} == {not red}
    said = capsys.readouterr().out
    assert ("UNCHECKED: a test failed" in said) is bool(red)
    assert ("unchecked\n" in said) is bool(red)  # in the tables


def test_sections_come_in_the_order_of_their_worth():
    """What is worth most is measured when the time is over."""
    assert list(SECTIONS) == ["units", "encoder", "blocks", "bits", "launches", "compiled"]


def test_each_section_is_printed_and_written_as_it_ends(monkeypatch, tmp_path, capsys):
    """A run that is stopped loses what it had measured."""
    Clock(monkeypatch, broken={"bits": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(tmp_path)])
    done = ["units", "encoder", "blocks"]
    settings = dict.fromkeys(row.setting for row in rows_file.read(tmp_path / FILE))
    assert [setting.unit for setting in settings] == ["neurons", "both", "blocks64"]
    said = capsys.readouterr().out
    assert all(f"==== {section}: done at" in said for section in done)


def test_what_fails_is_said_and_costs_nothing_else(monkeypatch, tmp_path, capsys):
    """One kernel that crashes or is wrong takes all results with it, or the command succeeds."""
    clock = Clock(monkeypatch, broken={"encoder": RuntimeError("y is wrong")})
    assert command.main(["--out", str(tmp_path)]) == 1
    assert clock.ran[2:] == [section for section in SECTIONS if section != "encoder"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("bfloat16-parameters: RuntimeError: y is wrong")


def test_seconds_bound_everything(monkeypatch, tmp_path, capsys):
    """The tests take the time of the measurements, or the whole takes longer than was asked for."""
    clock = Clock(monkeypatch)
    assert command.main(["--out", str(tmp_path), "--seconds", "100"]) == 1
    assert clock.limits == {"repeatable": command.TURNS_SECONDS, "green": 35, "units": 40, "encoder": 10}
    assert capsys.readouterr().out.count("out of time") == 2 * (len(SECTIONS) - 2)
    clock.now, clock.limits = 0, {}
    command.main(["--out", str(tmp_path)])
    assert clock.limits["green"] == command.GATE_SECONDS
    assert clock.limits["units"] == command.JOB_SECONDS


def test_targets_decide_only_where_they_shall(monkeypatch, tmp_path):
    """A slow machine looks like a broken one, or `--strict` passes where a target is missed."""
    Clock(monkeypatch)
    assert command.main(["--out", str(tmp_path)]) == 0
    assert command.main(["--out", str(tmp_path), "--strict"]) == 1


# ---- what is measured


def test_sections_can_be_measured():
    """A job asks for what its case does not know, or a target is about nothing that is measured."""
    jobs = [job for own in SECTIONS.values() for job in own]
    for job in jobs:
        CASES[job.setting.case].refuse(replace(job, parts=tuple(part for part in job.parts if part != GRAPH)))
        CASES[job.setting.case].refuse(tiny(job))
    for target in TARGETS:
        assert target.job in jobs
        assert target.part in target.job.parts
        assert {target.of, *target.against} <= {"dense", *target.job.names}
        assert target.job.peaks or target.metric != "peak"
    assert {name for job in jobs for name in job.names} <= set(EXPLAINED)


def test_the_vendors_grouped_product_is_a_rival_wherever_it_applies():
    """We are only compared with what is easy to beat."""
    for job in (job for jobs in SECTIONS.values() for job in jobs if job.setting.unit != "weights"):
        names = {name for other in SECTIONS["compiled"] for name in other.names} if job.setting.compiled else job.names
        assert "packed" in names, job
        reason = CASES[job.setting.case].why_not(job.setting, "packed")
        assert reason is None or (job.setting.unit == "blocks64" and "rows and columns" in reason)


def test_host_time_and_the_device_alone_are_columns_of_their_own():
    """What a launch costs the host hides in the time of the device."""
    parts = {part for jobs in SECTIONS.values() for job in jobs for part in job.parts}
    assert {GRAPH, HOST} <= parts
    assert {job.setting.unit for job in SECTIONS["launches"]} > {"both", "neurons", "blocks64", "weights"}


def test_predictions_stand_beside_the_measurements(monkeypatch, tmp_path, capsys):
    """A number on paper is looked for elsewhere, or taken for a measurement."""
    Clock(monkeypatch)
    command.main(["--out", str(tmp_path)])
    assert all(row.predicted_ms is not None for row in rows_file.read(tmp_path / FILE) if not row.setting.compiled)
    said = capsys.readouterr().out
    heads = [line.split()[:3] for line in said.splitlines() if "over our dense" in line]
    assert heads.count(["ms", "on", "paper"]) == len(heads) - 1  # those of the section `compiled`
    assert "on paper: milliseconds on an H200" in said


def test_an_unchecked_row_says_so(capsys):
    """A row whose kernels failed a test looks like any other."""
    tables.print_rows([made_row(checked=False)])
    tables.print_rows([made_row(checked=True), made_row(checked=None)])
    assert capsys.readouterr().out.count("unchecked") == 1


# ---- the process that measures


def test_a_measurement_that_fails_loses_no_other(monkeypatch):
    """A kernel that never ends, or kills its process, costs its own rows alone; behind it a new process begins."""
    fork_pools(monkeypatch)
    monkeypatch.setattr(command, "measure", call)
    asked = ("runs", "runs", "fails", "crashes", "hangs", "runs")
    results = command.measured([Job(Setting("op"), (what,)) for what in asked], 0, command.time.monotonic() + 600)
    found = []
    for what in asked:
        monkeypatch.setattr(command, "JOB_SECONDS", 0.5 if what == "hangs" else 60)
        found.append(next(results))
    (first, same, *none, after), wrong = ([row.note for row in rows] for rows, _ in found), [line for _, line in found]
    assert first == same != after
    assert none == [[], [], []]
    assert ["" if not line else line.partition("float32: ")[2][:23] for line in wrong] == [
        "", "", "ValueError: it is wrong", "BrokenProcessPool: A pr", "TimeoutError: took over", "",
    ]  # fmt: skip


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
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of the time of so small tests
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    (tmp_path / "test_sample.py").write_text(tests)
    assert gate.green(tmp_path, 4 if "sleep" in tests else 60, ["test_sample.py"], processes=2) is green
    said = capsys.readouterr().out
    if green:
        assert "3 passed, 0 failed" in said  # each test in one process


def test_gate_takes_the_tests_that_run_there(monkeypatch):
    """The gate runs every test of a kernel that the machine can run, and none that needs what is not there."""
    files = gate.test_files(ROOT)
    assert files[:2] == [os.path.join("tests", "gpu"), os.path.join("tests", "triton_path")]
    names = {Path(path).name for path in files[2:]}
    assert names >= {"test_row_kernels.py", "test_tile_kernels.py", "test_pair_kernels.py", "test_packing.py"}
    assert "test_row_owned_grad.py" in names
    assert any("from hypothesis" in (ROOT / path).read_text() for path in files[2:])
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: None)
    few = gate.test_files(ROOT)
    assert few[:2] == files[:2]
    assert all("from hypothesis" not in (ROOT / path).read_text() for path in few[2:])


def test_the_programs_that_take_turns_have_a_test_of_their_own():
    """The first check runs nothing, and a hang is found when the time of the whole gate has passed."""
    assert f"def test_{gate.TURNS}(" in (ROOT / "tests" / "gpu" / "test_on_gpu.py").read_text()
