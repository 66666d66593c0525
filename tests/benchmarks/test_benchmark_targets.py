"""Targets: what was asked for, read from what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_rows import made_row, pair

from benchmarks import command
from benchmarks import row as rows_file
from benchmarks.cases import case_of
from benchmarks.command import main
from benchmarks.plans import PLANS, placed
from benchmarks.running import Job, Measured
from benchmarks.setting import DoesNotFitError, Setting
from benchmarks.targets import GROWTHS, TARGETS, Growth, Reading, Target, reading_of_rows

JOB = Job(Setting("encoder"))
BOTH = "forward+backward"


def target(metric: str, bound: float, **more: object) -> Target:
    """A target of the encoder."""
    return Target("it", JOB, BOTH, metric, bound, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "bound", "reached"),
    [
        ("speed", 1.8, 1.764, 1.836, 1.8, True),
        ("share", 0.9, 0.882, 0.918, 0.91, False),
        ("time", 1 / 1.8, 1 / 1.836, 1 / 1.764, 0.56, True),
        ("time", 1 / 1.8, 1 / 1.836, 1 / 1.764, 0.55, False),
        ("saved", 0.5, None, None, 0.5, True),
        ("peak", 0.75, None, None, 0.7, False),
    ],
)
def test_readings(metric, value, low, high, bound, reached):
    """SHORT is printed as ok, or a ratio is read upside down."""
    base = made_row("dense", 1.0, 0.0, ideal=1.0, saved_mib=8.0, peak_mib=8.0)
    rows = [base, made_row("fastmask", 1.8, saved_mib=4.0, peak_mib=6.0)]
    reading = reading_of_rows(target(metric, bound), rows)
    assert (reading.value, reading.low, reading.high) == pytest.approx((value, low, high))
    assert target(metric, bound).reached(reading) is reached


def measured(**times: list[float]) -> Measured:
    """Rounds that nobody ran."""
    return Measured(JOB, pair(), {BOTH: times})


def test_against_the_better_of_two():
    """We are held against the slower alternative."""
    found = measured(dense=[4.0, 4.0, 4.0], fastmask=[1.0, 1.0, 1.0], loop=[3.0, 3.0, 3.0], gating=[1.5, 1.2, 1.5])
    reading = target("speed", 1.2, against=("loop", "gating")).reading([found])
    assert (reading.value, reading.low) == pytest.approx((1.5, 1.35))


@pytest.mark.parametrize(("ratios", "exponent"), [((2.0, 2.0), 0.0), ((2.0, 1.0), 0.5), ((1.0, 0.25), 1.0)])
def test_growth(ratios, exponent):
    """Something that grows like the square of a size is called linear."""
    jobs = (JOB, JOB)
    growth = Growth("it", jobs, (1.0, 4.0), BOTH, "time", 0.4)
    reading = growth.reading([Measured(JOB, pair(ratio), {}) for ratio in ratios])
    assert reading.value == pytest.approx(exponent)
    assert growth.reached(reading) is (exponent <= 0.4)


def test_noisy_readings_say_so():
    """A target is believed to be missed, or reached, on a machine too noisy to tell."""
    assert Reading(2.0, 1.8, 2.1).noisy
    assert not Reading(2.0, 1.95, 2.1).noisy
    assert not Reading(2.0).noisy


def test_every_target_can_be_measured():
    """A target names a part or an implementation that there is not, and is never held."""
    for wanted in [*TARGETS, *GROWTHS]:
        for job in wanted.jobs:
            case = case_of(job.setting.case)
            case.refuse(job.setting)
            chosen = job.names or case.implementations
            assert wanted.part in (job.parts or case.parts)
            assert wanted.metric != "peak" or job.peaks
            if isinstance(wanted, Target):
                assert {wanted.of, *wanted.against} <= set(chosen)
                assert all(case.why_not(job.setting, name) is None for name in (wanted.of, *wanted.against))


def test_plans_repeat_nothing():
    """The same is measured twice, or a plan names a case that there is not."""
    for name in ("quick", "targets", "growth"):
        jobs = PLANS[name]()
        assert len(set(jobs)) == len(jobs)
    assert {job.setting.case for job in PLANS["full"]()} >= {"op", "encoder", "inference", "step", "discovery"}
    assert placed(JOB, 3, "cpu").setting.threads == 3


def run_targets(ratio: float, monkeypatch, capsys) -> tuple[int, str]:
    """The plan `targets` of one target, with rows that nobody measured."""
    wanted = target("speed", 1.8)
    monkeypatch.setattr(command, "TARGETS", [wanted])
    monkeypatch.setattr(command, "GROWTHS", [])
    monkeypatch.setitem(command.PLANS, "targets", lambda: [JOB])
    monkeypatch.setattr(command, "measure", lambda job, seconds, say: Measured(job, pair(ratio), {}))
    return main(["targets", "--threads", "1", "--device", "cpu"]), capsys.readouterr().out


def test_exit_code_of_targets(monkeypatch, capsys):
    """A missed target ends well."""
    code, said = run_targets(1.9, monkeypatch, capsys)
    assert code == 0
    assert " ok " in said
    code, said = run_targets(1.7, monkeypatch, capsys)
    assert code == 1
    assert "SHORT" in said


@pytest.mark.parametrize(
    ("ratio", "part", "code", "word"),
    [(1.9, "forward+backward", 0, " ok "), (1.7, "forward+backward", 1, "SHORT"), (1.9, "dX", 1, "NOT MEASURED")],
)
def test_stored_rows_are_judged(ratio, part, code, word, monkeypatch, capsys, tmp_path):
    """A stored run passes whatever it holds, or rows of something else are taken for what is missing."""
    monkeypatch.setattr(command, "TARGETS", [target("speed", 1.8, against=("dense",))])
    monkeypatch.setattr(command, "GROWTHS", [])
    stored = tmp_path / "rows.csv"
    rows_file.append(stored, [replace(row, part=part) for row in pair(ratio)])
    assert main(["targets", "--from", str(stored)]) == code
    assert word in capsys.readouterr().out


def test_a_file_without_rows_cannot_be_judged(capsys, tmp_path):
    """A run that was stopped before its first row ends in a traceback, or passes."""
    stored = tmp_path / "rows.csv"
    rows_file.append(stored, pair())
    stored.write_text(stored.read_text().splitlines()[0] + "\n")
    assert main(["targets", "--from", str(stored)]) == 2
    assert "holds no rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [RuntimeError, DoesNotFitError])
def test_what_could_not_be_measured_is_not_reached(kind, monkeypatch, capsys):
    """A target whose measurement failed, or did not fit into memory, is passed over."""
    monkeypatch.setattr(command, "TARGETS", [target("speed", 1.8)])
    monkeypatch.setattr(command, "GROWTHS", [])
    monkeypatch.setitem(command.PLANS, "targets", lambda: [JOB, Job(Setting("encoder", density=0.25))])

    def measure(job, seconds, say):  # type: ignore[no-untyped-def]
        if job.setting.density == 0.5:
            raise kind("it was not measured")
        return Measured(job, pair(), {})

    monkeypatch.setattr(command, "measure", measure)
    assert main(["targets", "--threads", "1", "--device", "cpu"]) == 1
    assert "NOT MEASURED" in capsys.readouterr().out
