"""`fastmask analyze` as a person types it: what it prints, leaves and exits with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from typed_command import output_of

from fastmask.cli import main

TINY = ["--languages", "qaa,qab", "--batch-size", "8", "--score-sentences", "8", "--dev-sentences", "4"]
TINY += ["--threads", "1", "--eval-every", "0"]


@pytest.fixture(scope="module")
def tiny(encoder):
    """The options of the smallest of runs."""
    return [*TINY, *encoder]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, tiny):
    out = tmp_path_factory.mktemp("runs") / "static"
    options = ["--steps", "4", "--density", "0.4", "--checkpoint-every", "2"]
    assert main(["train", "--data", str(data), "--out", str(out), *options, "--keep-checkpoints", "0", *tiny]) == 0
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory, data, tiny):
    out = tmp_path_factory.mktemp("runs") / "full"
    options = ["--method", "full", "--steps", "2"]
    assert main(["train", "--data", str(data), "--out", str(out), *options, *tiny]) == 0
    return out


def test_a_run_gets_a_report(run, capsys):
    """The command says where its report is, and what is missing from it and why."""
    said = output_of(capsys, "analyze", run, "--sentences", "4")
    assert f"report: {(run / 'analysis' / 'report.html').resolve()}" in said
    assert "skipped typology" in said
    assert "skipped overlap (static, between seeds): there is one seed only" in said
    names = {path.name for path in (run / "analysis").iterdir()}
    assert {
        "conflict-static.png",
        "conflict-along-static-seed-0.svg",
        "cross-static.csv",
        "ablation-static.csv",
    } <= names
    text = (run / "analysis" / "report.html").read_text()
    assert f"fastmask analyze {run} --sentences 4" in text
    assert main(["analyze", str(run), "--what", "use"]) == 0
    assert "static, use: " in capsys.readouterr().err
    assert not (run / "analysis" / "cross-static.csv").exists()


def test_runs_side_by_side(run, full, data, capsys, tmp_path):
    """Several runs go into one report."""
    out = tmp_path / "out"
    what = ["--what", "effect,conflict", "--data", data, "--sentences", "4"]
    output_of(capsys, "analyze", run, full, "--out", out, *what)
    names = {path.name for path in out.iterdir()}
    assert {"effect.csv", "conflict-all.png", "conflict-static.csv", "conflict-full.csv"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "overlap,conflct"], "unknown analysis 'conflct'; did you mean 'conflict'"),
        (["--what", " , "], "--what names no analysis"),
        (["--sentences", "1"], "--sentences is 1 (expected at least 2)"),
        (["--seed", "-1"], "--seed is -1 (expected at least 0)"),
        (["--out", "{run}"], "holds no report"),
        (["--what", "typology,dynamics"], "nothing could be analysed"),
    ],
)
def test_what_goes_wrong_exits_with_1(run, arguments, message, capsys):
    """A mistake ends with exit code 1 and a message, without a traceback."""
    said = output_of(capsys, "analyze", run, *(word.format(run=run) for word in arguments), code=1)
    assert message in said
    assert "Traceback" not in said


def test_no_run_is_one_line(capsys, tmp_path):
    """A folder that is no run is named in one line."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none"):
        said = output_of(capsys, "analyze", path, code=1)
        assert str(path) in said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(run, tmp_path):
    """Ctrl-C leaves no half a report."""
    out = tmp_path / "out"
    command = ["analyze", str(run), "--out", str(out), "--sentences", "400"]

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and hand that down

    whole = [sys.executable, "-m", "fastmask", *command]
    process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    time.sleep(20)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not out.exists()
