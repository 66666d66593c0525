"""Several processes: the gradients and metrics of one process with the same global batch, plain and in episodes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_run import CASES, OF_TASKS, masks, run, started
from test_training_episodes import assert_close, first_moments
from tiny_tasks import made
from toy_run import metrics

import fastmask as fm
from fastmask.discovery import COMPARING
from fastmask.files import check_files, held
from fastmask.tasks.data.synthetic import write_treebanks
from fastmask.training import run_folder

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def launched(*arguments: Any, succeeds: bool = True, launcher: str = "torchrun", processes: int = 2) -> str:
    """Run a Python script or module in two processes or more; returns what they said."""
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
        command += [f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        command += ["--main_process_port=0"]  # any that is free
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return done.stdout if succeeds else done.stderr


def with_models(folder: Path) -> Path:
    """The folder, with the models that `OF_TASKS` start from."""
    for case in OF_TASKS:
        made(case.partition("-")[0], folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, and the sums of gradients, in two processes."""
    folder = with_models(tmp_path_factory.mktemp("two"))
    launched(HERE / "processes_run.py", folder, *CASES, *OF_TASKS, "sums")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in this process."""
    folder = with_models(tmp_path_factory.mktemp("one"))
    for case in (*CASES, *OF_TASKS):
        run(folder, case)
    return folder


@pytest.mark.parametrize("case", [*CASES, *OF_TASKS])
def test_two_processes_have_the_gradients_of_one(case: str, one: Path, two: Path) -> None:
    """A batch or a meta-batch split over processes has the gradients of the whole."""
    task, _, config = started(one, case, case)
    ours, theirs = (first_moments(folder / f"{case}-gradient", task, config) for folder in (two, one))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # Ten times AdamW's first moment is the gradient.
        assert_close(name, gradient * 10, ours[name] * 10, 1e-6)


@pytest.mark.parametrize("case", [*CASES, *OF_TASKS])
def test_two_processes_end_with_the_metrics_of_one(case: str, one: Path, two: Path) -> None:
    """A run on two processes is the same experiment as the run on one."""
    latest = run_folder.latest(two / case)
    assert latest is not None
    check_files(latest)
    assert len(run_folder.read_progress(latest).random) == 2
    for ours, theirs in zip(metrics(two / case), metrics(one / case), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name == "dev" and case.startswith("masked"):  # perplexities, which no count makes exact
                value = {language: pytest.approx(scores, rel=1e-5) for language, scores in value.items()}
            elif name not in ("dev", "masks_changed"):
                value = pytest.approx(value, rel=1e-5)
            assert ours[name] == value, (theirs["step"], name)


@pytest.mark.parametrize("case", ["found", "relative"])
def test_two_processes_find_the_subnetworks_of_one(case: str, one: Path, two: Path) -> None:
    """Processes share the languages in discovery; the masks must be those of one process."""
    ours, theirs = (fm.Subnetworks.load(folder / case / "masks.safetensors") for folder in (two, one))
    assert ours == theirs
    assert ours.heads is not None
    assert not ours.heads.all()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_scores_that_compare_languages(processes: int, tmp_path: Path) -> None:
    """Each measures its languages once, of three in all; the masks are those of one process, which measures all."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    masks(alone)
    launched(HERE / "processes_run.py", shared, "masks", processes=processes)
    (total,) = (int(file.read_text()) for file in alone.glob("calls-*"))
    calls = [int((shared / f"calls-{rank}").read_text()) for rank in range(processes)]
    languages = [2, 1] if processes == 2 else [1, 1, 1, 0]
    assert calls == [total * n // 3 for n in languages]
    assert total
    for score in COMPARING:
        ours, theirs = (fm.Subnetworks.load(folder / f"{score}.safetensors") for folder in (shared, alone))
        assert ours == theirs
        assert len({masks.tobytes() for masks in ours.neurons.numpy()}) == 3


def test_gradients_that_only_some_processes_have(two: Path) -> None:
    """A parameter that only one process's languages use gets its whole gradient on both."""
    first, second = (torch.load(two / f"sums-{rank}.pt", weights_only=True) for rank in range(2))
    assert first["summed"].keys() == second["summed"].keys() == {"both", "first", "second", "half", "large"}
    for name, summed in first["summed"].items():
        parts = [given["given"][name] for given in (first, second) if name in given["given"]]
        assert len(parts) == 1 + (name in ("both", "half", "large"))
        assert torch.equal(summed, sum(parts))
        assert torch.equal(summed, second["summed"][name])
        assert summed.dtype == parts[0].dtype


KILLED = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from processes_run import subnetworks, CASES
from toy_run import toy_config, toy_data, toy_parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.loop import train
parser = toy_parser()  # with dropout: random states matter
config = toy_config(sys.argv[2], resume=True, **{**CASES["random-fomaml"], "steps": 24})
passes = itertools.count(1)
def hook(module, *_):
    if module.training and sys.argv[3] == "kill" and next(passes) == 12 + 2 * 2 + 2:
        sys.exit(1)
parser.register_forward_pre_hook(hook)
train(Parsing(parser), toy_data(), config, subnetworks, progress=False)
"""


def test_two_processes_killed_in_an_episode(tmp_path: Path) -> None:
    """A run on two processes that dies inside an episode resumes to the same end."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    launched(script, HERE, tmp_path / "killed", "kill", succeeds=False)
    latest = run_folder.latest(tmp_path / "killed")
    assert latest is not None
    assert 12 < int(latest.name[-2:]) < 24
    launched(script, HERE, tmp_path / "killed", "finish")
    launched(script, HERE, tmp_path / "unbroken", "finish")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "unbroken")


def test_two_processes_where_another_one_trains(tmp_path: Path) -> None:
    """Both end at once, with a message that names who is training there, and write nothing."""
    script = tmp_path / "second.py"
    script.write_text(KILLED)
    with held(tmp_path / "run"):
        said = launched(script, HERE, tmp_path / "run", "finish", succeeds=False)
    assert said.count(f"is in use by process {os.getpid()} on ") >= 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_command_under_accelerate_launch(tmp_path: Path) -> None:
    """`accelerate launch -m fastmask train` trains on the same sentences as one process, and prints once."""
    write_treebanks(tmp_path / "ud", sentences={"train": 40, "dev": 6, "test": 6})
    settings = ["--data", tmp_path / "ud", "--languages", "qaa,qac,qad", "--steps", "24", "--density", "0.5"]
    settings += ["--meta", "fomaml", "--inner-steps", "2", "--support-sentences", "4", "--query-sentences", "4"]
    settings += ["--batch-size", "9", "--score-sentences", "8", "--dev-sentences", "4", "--log-every", "1"]
    settings += ["--threads", "1", "--device", "cpu", "--eval-every", "0"]
    said = launched("-m", "fastmask", "train", *settings, "--out", tmp_path / "two", launcher="accelerate")
    assert said.count("LAS / UAS on the test sets") == 1
    alone = [sys.executable, "-m", "fastmask", "train", *map(str, settings), "--out", tmp_path / "one"]
    subprocess.run(alone, check=True, capture_output=True)
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert two["budget"] == one["budget"]
    assert two["budget"]["episodes"] == 3
    # Dropout differs from process to process, so losses are near, not equal; what is seen is the same.
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ("loss" in ours) == ("loss" in theirs)
        if "loss" in ours and ours["step"] <= 6:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
