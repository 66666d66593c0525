"""The loop: a resumed run ends like an unbroken one, and a run that fails leaves something to resume from."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from processes import start_process
from safetensors.torch import load_file
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_parser, toy_task

import fastmask as fm
from fastmask.dynamic import History
from fastmask.errors import FastmaskKeyError
from fastmask.settings import ConfigError
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training import engine, run_folder
from fastmask.training.loop import TrainingDiverged, TrainResult, train
from fastmask.training.methods import SwitchPoint, some_rows, training_data


class Killed(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


def kill_at(step: int) -> Any:
    """Return a hook that raises after `step` steps."""

    def hook(done: int) -> None:
        if done == step:
            raise Killed

    return hook


def random_subnetworks(point: SwitchPoint) -> Any:
    """Random masks; draws random numbers on purpose, which must not show in the rest of the run."""
    torch.rand(5)
    config = point.task.model.encoder.config
    return fm.Subnetworks.random(config, LANGUAGES, density=0.5, seed=point.config.seed)


def run(folder: Path, hook: Any = None, **changes: Any) -> TrainResult:
    """Train the toy parser."""
    config = toy_config(folder, **changes)
    task = Parsing(toy_parser(), config.max_length)
    return train(task, toy_data(), config, random_subnetworks, hook, progress=False)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """One unbroken run per method."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {method: run(folder / method, method=method) for method in ("full", "random")}


def test_same_seed_same_run_and_another_seed_another(unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """The seed decides the run: the same one repeats it, another one changes it."""
    again = run(tmp_path / "again")
    assert_same_weights(again.task.model, unbroken["full"].task.model)
    assert metrics(again.run) == metrics(unbroken["full"].run)
    other = run(tmp_path / "other", seed=1)
    assert metrics(other.run) != metrics(again.run)


@pytest.mark.parametrize("killed_at", [2, 7, 12])
def test_resumed_full_run_ends_like_the_unbroken_one(killed_at: int, unbroken: Any, tmp_path: Path) -> None:
    """A resumed run ends with the weights and metrics of an unbroken one; step 2 is before the first checkpoint."""
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at(killed_at))
    if killed_at == 7:
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 8, "lo')  # as a kill in the middle of a line leaves it
    torch.rand(7)  # the state of this process must not matter
    resumed = run(tmp_path / "run", resume=True)
    assert_same_weights(resumed.task.model, unbroken["full"].task.model)
    assert metrics(resumed.run) == metrics(unbroken["full"].run)


@pytest.mark.parametrize("killed_at", [4, 6, 8, 10])
def test_resumed_run_with_subnetworks_ends_like_the_unbroken_one(killed_at: int, unbroken: Any, tmp_path: Path) -> None:
    """Stopped before, at or after the switch, a run ends with the same masks, weights and metrics."""
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at(killed_at), method="random")
    resumed = run(tmp_path / "run", method="random", resume=True)
    assert_same_weights(resumed.task.model, unbroken["random"].task.model)
    assert metrics(resumed.run) == metrics(unbroken["random"].run)
    masks = [load_file(folder.run / "masks.safetensors") for folder in (resumed, unbroken["random"])]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])


def test_killed_while_looking_for_subnetworks(unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """Discovery that is killed loses none of the training before the switch."""

    def fail(point: SwitchPoint) -> Any:
        raise Killed

    config = toy_config(tmp_path / "run", method="random", checkpoint_every=0)
    with pytest.raises(Killed):
        train(toy_task(), toy_data(), config, fail, progress=False)
    latest = run_folder.latest(tmp_path / "run")
    assert latest is not None
    assert latest.name == "step-00000006"
    resumed = run(tmp_path / "run", method="random", checkpoint_every=0, resume=True)
    assert_same_weights(resumed.task.model, unbroken["random"].task.model)


def test_all_methods_train_alike_until_the_switch(unbroken: dict[str, TrainResult]) -> None:
    """All methods start their subnetworks from one network, and differ after the switch."""
    full, masked = (metrics(unbroken[method].run) for method in ("full", "random"))
    assert [r for r in full if r["step"] <= 6] == [r for r in masked if r["step"] <= 6]
    assert [r for r in full if r["step"] > 6] != [r for r in masked if r["step"] > 6]
    assert [r["step"] for r in full] == [r["step"] for r in masked]


def test_dead_units_of_all_languages_get_no_gradient(tmp_path: Path) -> None:
    """Once masks are attached, units that no language owns stay as they are."""

    def one_dead_head(point: SwitchPoint) -> Any:
        heads = torch.ones(len(LANGUAGES), 2, 2, dtype=torch.bool)
        heads[:, 1, 0] = False
        return fm.Subnetworks(LANGUAGES, heads=heads)

    before: dict[str, torch.Tensor] = {}

    def spy(point: SwitchPoint) -> Any:
        before.update({k: v.clone() for k, v in point.task.model.state_dict().items()})
        return one_dead_head(point)

    config = toy_config(tmp_path / "run", method="static", discover_at=0.0, weight_decay=0.0, schedule="constant")
    result = train(toy_task(), toy_data(), config, spy, progress=False)
    after = result.task.model.state_dict()
    name = next(k for k in after if k.startswith("encoder.") and "layer.1" in k and k.endswith("query.weight"))
    assert torch.equal(before[name][:8], after[name][:8])
    assert not torch.equal(before[name][8:], after[name][8:])
    assert list(result.subnetworks.languages) == LANGUAGES


def test_dev_scores_are_those_of_the_saved_model(unbroken: dict[str, TrainResult]) -> None:
    """The scores in the metrics are those of the model in the run's folder."""
    result = unbroken["random"]
    parser = Parser.load(result.run / "model")
    subnetworks = fm.Subnetworks.load(result.run / "masks.safetensors")
    fm.attach(parser.encoder, subnetworks)
    dev = {code: splits["dev"] for code, splits in toy_data().items()}
    scores = {}
    for code, rows in dev.items():
        encoded = Parsing(parser).examples(rows)
        with fm.language(parser.encoder, code):
            scores[code] = Parsing(parser).score(encoded, Parsing(parser).predict(encoded))
    logged = [r for r in metrics(result.run) if "dev" in r][-1]["dev"]
    assert {code: s["las"] for code, s in scores.items()} == pytest.approx({c: s["las"] for c, s in logged.items()})


def train_in_a_process(folder: str, method: str) -> None:
    """Train slowly enough to be killed."""
    run(Path(folder), lambda step: time.sleep(0.05), method=method)


@pytest.mark.parametrize("method", ["full", "random"])
def test_killed_by_sigkill(method: str, unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """A killed process leaves a run that resumes to the same end."""
    process = start_process(train_in_a_process, str(tmp_path / "run"), method)
    limit = time.monotonic() + 120
    while (path := run_folder.latest(tmp_path / "run")) is None or path.name < "step-00000009":
        assert time.monotonic() < limit, "no checkpoint was written"
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "run" / "model").exists()
    resumed = run(tmp_path / "run", method=method, resume=True)
    assert_same_weights(resumed.task.model, unbroken[method].task.model)
    assert metrics(resumed.run) == metrics(unbroken[method].run)


def test_keep_checkpoints_reaches_the_run(tmp_path: Path) -> None:
    """`--keep-checkpoints` decides how many are kept, and may change when a run is resumed."""
    run(tmp_path / "run", keep_checkpoints=0, checkpoint_every=4)
    assert [run_folder.step_of(path) for path in run_folder.complete(tmp_path / "run")] == [4, 6, 8, 12]
    run(tmp_path / "run", keep_checkpoints=1, checkpoint_every=4, resume=True)


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A loss that is NaN ends the run, and the error names the last good checkpoint."""
    parser = toy_parser()

    def poison(step: int) -> None:
        if step == 4:
            with torch.no_grad():
                parser.root.fill_(math.nan)

    with pytest.raises(TrainingDiverged, match=r"at step 5; the last good checkpoint is .*step-00000003"):
        train(Parsing(parser), toy_data(), toy_config(tmp_path / "run"), random_subnetworks, poison, progress=False)
    fresh = run(tmp_path / "run", resume=True)
    assert all(bool(torch.isfinite(p).all()) for p in fresh.task.model.parameters())


def test_spoilt_weights_are_not_checkpointed(tmp_path: Path) -> None:
    """Weights with a NaN never replace a good checkpoint."""
    parser = toy_parser()

    def poison(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                parser.upos.weight[-1].fill_(math.inf)  # a tag that no batch need have

    with pytest.raises(TrainingDiverged):
        train(Parsing(parser), toy_data(), toy_config(tmp_path / "run"), random_subnetworks, poison, progress=False)
    for path in run_folder.folder_of(tmp_path / "run").iterdir():
        assert path.name == "step-00000003"


def test_another_run_is_never_overwritten(unbroken: dict[str, TrainResult], tmp_path: Path) -> None:
    """A second run cannot be started in the folder of the first."""
    folder = unbroken["full"].run
    with pytest.raises(ConfigError, match="holds a run"):
        run(folder)
    with pytest.raises(ConfigError, match=r"batch_size was 6 and is 9.*seed was 0 and is 5"):
        run(folder, resume=True, seed=5, batch_size=9)
    finished = run(folder, resume=True)  # nothing left to do
    assert metrics(finished.run)[-1]["step"] == 12


def test_subnetworks_without_a_language_of_the_data(tmp_path: Path) -> None:
    """Masks that lack a language of the data are refused."""

    def too_few(point: SwitchPoint) -> Any:
        return fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES[:1], density=0.5, seed=0)

    with pytest.raises(FastmaskKeyError, match=LANGUAGES[1]):
        train(toy_task(), toy_data(), toy_config(tmp_path / "r", method="static"), too_few, progress=False)


def test_bf16_tensorboard_and_long_sentences(tmp_path: Path) -> None:
    """Mixed precision and TensorBoard work, and sentences left out for their length are reported."""
    changes = {"precision": "bf16", "tensorboard": True, "max_length": 12, "steps": 3}
    with pytest.warns(UserWarning, match="training sentences are left out"):
        result = run(tmp_path / "run", **changes)
    assert math.isfinite(metrics(result.run)[0]["loss"])
    assert list((result.run / "tensorboard").iterdir())
    assert next(result.task.model.parameters()).dtype == torch.float32
    json.loads((result.run / "metrics.jsonl").read_text().splitlines()[0])


def test_few_training_sentences_are_the_only_ones(tmp_path: Path) -> None:
    """A run on some rows of each language is the run on data that have no others; all rows are a limit of their own."""
    rows = {code: some_rows(splits["train"], 4) for code, splits in toy_data().items()}
    few = {code: {**splits, "train": rows[code]} for code, splits in toy_data().items()}
    asked = train(toy_task(), toy_data(), toy_config(tmp_path / "asked", train_sentences=4), progress=False)
    given = train(toy_task(), few, toy_config(tmp_path / "given"), progress=False)
    assert_same_weights(asked.task.model, given.task.model)
    assert metrics(asked.run) == metrics(given.run)
    with pytest.raises(ConfigError, match="train_sentences was 4 and is 0"):
        train(toy_task(), few, toy_config(tmp_path / "asked", resume=True, train_sentences=0), progress=False)


def test_fewer_training_sentences_than_asked_for_are_named(tmp_path: Path) -> None:
    """Else an experiment on 1,000 sentences a language is one on 400 of some, and nobody sees it."""
    data = toy_data()
    data = {**data, "qab": {**data["qab"], "train": data["qab"]["train"].select(range(7))}}
    with pytest.warns(UserWarning, match="fewer training rows than train_sentences, 40: qab 7$"):
        training_data(toy_task(), data, toy_config(tmp_path / "run", train_sentences=40))


def test_progress_without_a_terminal(tmp_path: Path, capsys: Any) -> None:
    """Each phase is said once, and so is each step; the line of the last one stands at the end."""
    train(toy_task(), toy_data(), toy_config(tmp_path / "run", method="random"), random_subnetworks)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "full network", "scoring dev data", "step 5/12 (full network)", "finding subnetworks", "subnetworks",
        "step 10/12 (subnetworks)", "saving", "step 12/12 (subnetworks)",
    ]  # fmt: skip
    assert re.search(r": loss [0-9.]+ · dev LAS [0-9.]+ · [0-9,]+ words/s, done$", lines[-1])


def test_progress_without_dev_data(tmp_path: Path, capsys: Any) -> None:
    """The line of the last step needs no score."""
    data = {name: {"train": splits["train"]} for name, splits in toy_data().items()}
    train(toy_task(), data, toy_config(tmp_path / "run", steps=2))
    *others, last = capsys.readouterr().err.splitlines()
    assert others == ["full network", "saving"]
    assert re.fullmatch(r"step 2/2 \(full network\): loss [0-9.]+ · [0-9,]+ words/s, done", last)


TWO_PROCESSES = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_training_loop import random_subnetworks
from toy_run import toy_config, toy_data, toy_task
from fastmask.training.loop import train
config = toy_config(sys.argv[2], method="random", resume=True, steps=12)
hook = (lambda step: sys.exit(1) if step == 8 else None) if sys.argv[3] == "kill" else None
train(toy_task(dropout=0.0), toy_data(), config, random_subnetworks, hook, progress=False)
"""


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """A batch split over two processes trains the same, and such a run can be resumed."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for ending, succeeds in (("kill", False), ("finish", True)):
        arguments = [str(Path(__file__).parent), str(tmp_path / "two"), ending]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
        latest = run_folder.latest(tmp_path / "two")
        assert latest is not None
        assert len(run_folder.read_progress(latest).random) == 2
    parser = toy_parser(dropout=0.0)
    train(
        Parsing(parser), toy_data(), toy_config(tmp_path / "one", method="random"), random_subnetworks, progress=False
    )
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_training_learns(tmp_path: Path) -> None:
    """Training lowers the loss."""
    result = run(tmp_path / "run", steps=60, eval_every=60, log_every=10, checkpoint_every=0)
    losses = [record["loss"] for record in metrics(result.run) if "loss" in record]
    assert losses[-1] < 0.75 * losses[0]


# ---- dynamic subnetworks

DYNAMIC = {"method": "dynamic", "update_every": 2, "update_sentences": 4, "units": "both"}


def halves(point: SwitchPoint) -> Any:
    return fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES, 0.5, seed=0, units="both")


def dynamic_run(out: Path, on_step: Any = None, **changes: Any) -> TrainResult:
    config = toy_config(out, **{**DYNAMIC, **changes})
    return train(toy_task(), toy_data(), config, halves, on_step, progress=False)


@pytest.fixture(scope="module")
def unbroken_dynamic(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return dynamic_run(tmp_path_factory.mktemp("dynamic") / "run")


def test_dynamic_masks_change_and_are_what_the_run_leaves(unbroken_dynamic: TrainResult) -> None:
    """Masks are updated during training, and the run's file holds the last ones."""
    result = unbroken_dynamic
    start = halves(SwitchPoint(result.task, {}, {}, toy_config(result.run)))
    stored = fm.Subnetworks.load(result.run / "masks.safetensors")
    assert torch.equal(stored.neurons, result.subnetworks.neurons)
    assert torch.equal(stored.neurons.sum(-1).sum(-1), start.neurons.sum(-1).sum(-1)), "sizes are fixed"
    assert not torch.equal(stored.neurons, start.neurons)
    changed = [record for record in result.history if "masks_changed" in record]
    assert changed
    assert {record["step"] for record in changed} <= {8, 10}
    history = History.load(result.run / "dynamic.safetensors")
    assert len(history) > len(LANGUAGES)
    assert history.at(0) == start
    assert history.at(12) == stored


def test_masks_are_frozen_at_the_end(tmp_path: Path) -> None:
    """No mask may change in the last share of the steps after the switch, nor ever after the last optimizer step."""
    for freeze, last in ((0.0, 11), (0.1, 11), (0.5, 9), (1.0, 6)):
        result = dynamic_run(tmp_path / str(freeze), update_every=1, freeze_masks=freeze, eval_every=0)
        changed = [record["step"] for record in result.history if "masks_changed" in record]
        assert max(changed, default=6) == last
    for share, steps, last in ((0.25, 1500, 1350), (0.0, 1500, 1499), (0.25, 2, 1), (1.0, 1500, 900)):
        assert toy_config(tmp_path, freeze_masks=share, steps=steps, discover_at=0.6).last_mask_step == last


@pytest.mark.parametrize("killed_at", [6, 8, 10])
def test_resumed_dynamic_run_ends_like_the_unbroken_one(
    killed_at: int, unbroken_dynamic: TrainResult, tmp_path: Path
) -> None:
    """Masks and their history survive being stopped."""
    with pytest.raises(Killed):
        dynamic_run(tmp_path / "run", kill_at(killed_at))
    torch.rand(7)
    resumed = dynamic_run(tmp_path / "run", resume=True)
    assert_same_weights(resumed.task.model, unbroken_dynamic.task.model)
    assert metrics(resumed.run) == metrics(unbroken_dynamic.run)
    for name in ("masks.safetensors", "dynamic.safetensors"):
        ours, theirs = (load_file(run.run / name) for run in (resumed, unbroken_dynamic))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_model_split_over_processes_is_refused(monkeypatch):
    """What accelerate was set up for is said before anything is built."""
    set_up = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(engine, "Accelerator", lambda **_: set_up)
    with pytest.raises(ConfigError, match=r"accelerate is set to FSDP \(expected DistributedDataParallel"):
        engine.accelerator_for("cpu", "no")
