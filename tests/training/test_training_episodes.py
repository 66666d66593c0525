"""Meta-learning in a run: the right gradient, the same axis, and a kill in the middle of an episode costs nothing."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering
from literal_episode import first_meta_gradient
from processes import start_process
from safetensors.torch import load_file
from test_training_loop import Killed, random_subnetworks
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_parser, toy_task
from transformers import Gemma3Config

import fastmask as fm
from fastmask.cli import main
from fastmask.files import read_tensors
from fastmask.settings import ConfigError
from fastmask.tasks.data.synthetic import write_treebanks
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.tasks.task import Task
from fastmask.training import run_folder
from fastmask.training.batches import Episodes, episode_sampler
from fastmask.training.config import TrainConfig
from fastmask.training.engine import accelerator_for, build_optimizer, inner_rates, peak_rates
from fastmask.training.loop import TrainingDiverged, TrainResult, train
from fastmask.training.methods import SwitchPoint
from fastmask.unseen import adapted
from tests.compare.tiny_encoder import tiny_encoder

EPISODE = {"inner_steps": 2, "support_sentences": 3, "query_sentences": 3, "meta_lr": 2e-3}
EPISODE |= {"inner_lr": 0.05, "inner_encoder_lr": 0.05}
"""An episode draws 18 sentences of three languages: as many as three plain steps, for FOMAML and Reptile alike."""
PASSES = {"fomaml": 3, "reptile": 3 * 2}
"""Forward passes with dropout in an episode of three languages: queries, or Reptile's inner steps."""
SMALL_EPISODES = {"steps": 24, "checkpoint_every": 3}


def halves(point: SwitchPoint) -> Any:
    return fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES, 0.5, seed=0, units="both")


def run(folder: Path, meta: str, method: str = "random", parser: Parser | None = None, **changes: Any) -> TrainResult:
    """Train the toy parser: plain batches, then episodes."""
    config = toy_config(folder, meta=meta, method=method, **{**EPISODE, **SMALL_EPISODES, **changes})
    discover = halves if method == "dynamic" else random_subnetworks
    return train(toy_task() if parser is None else Parsing(parser), toy_data(), config, discover, progress=False)


CASES = [("full", "fomaml"), ("random", "fomaml"), ("random", "reptile"), ("dynamic", "fomaml")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], TrainResult]:
    """One unbroken run per method and algorithm."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {(m, a): run(folder / f"{m}-{a}", a, m, **dynamic_settings(m)) for m, a in CASES}


def dynamic_settings(method: str) -> dict[str, Any]:
    return {"update_every": 4, "update_sentences": 4} if method == "dynamic" else {}


# ---- the gradient


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
@pytest.mark.parametrize("method", ["full", "random"])
@pytest.mark.parametrize("inner", [(0.2, 0.05), (0.1, 0.1)])
def test_the_optimizer_gets_the_literal_meta_gradient(
    meta: str, method: str, inner: tuple[float, float], tmp_path: Path
) -> None:
    """Batches, rates, masks, averages and Reptile's scale are those of a literal episode."""
    parser = toy_parser(dropout=0.0).double()
    changes = {
        "discover_at": 0.0,
        "steps": 12,
        "max_grad_norm": 1e9,
        "inner_lr": inner[0],
        "inner_encoder_lr": inner[1],
    }
    config = toy_config(tmp_path / "run", meta=meta, method=method, **{**EPISODE, **changes, "checkpoint_every": 1})
    start = {name: p.detach().clone() for name, p in parser.named_parameters()}
    masks = None if method == "full" else random_subnetworks(SwitchPoint(Parsing(parser), {}, {}, config))
    expected = first_meta_gradient(parser, config, masks)

    def stop(step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(Parsing(parser), toy_data(), config, random_subnetworks, stop, progress=False)
    moments = first_moments(tmp_path / "run", Parsing(parser), config)
    for name, gradient in expected.items():
        # AdamW's first moment after one step is 0.1 times the gradient it was given. Scores are float32 in any case.
        assert_close(name, gradient, moments[name] * 10, 1e-6)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    assert any(not torch.equal(start[name], p) for name, p in parser.named_parameters())
    if meta == "fomaml":
        (line,) = metrics(tmp_path / "run")
        assert line["support_loss_first"] > line["support_loss_last"], "both on one batch"


def test_the_inner_loop_is_that_of_adaptation(tmp_path: Path) -> None:
    """FOMAML's gradient is taken, dropout on, at the weights that adapting to the support set gives, to the bit."""
    task = toy_task(dropout=0.2)
    config = toy_config(tmp_path, meta="fomaml", **EPISODE)
    data = {name: task.training_examples(splits["train"], name) for name, splits in toy_data().items()}
    subnets = random_subnetworks(SwitchPoint(task, {}, {}, config))
    fm.attach(task.encoder, subnets)
    episodes = Episodes(task, data, config, accelerator_for("cpu", "no"))
    task.model.train()
    loss, reached = episodes.learner.loss, []

    def watched(batch: Any) -> torch.Tensor:
        reached.append((task.model.training, {k: v.clone() for k, v in task.model.state_dict().items()}))
        return loss(batch)

    episodes.learner.loss = watched
    episodes.accumulate(0)
    passes = config.inner_steps + 1
    assert [training for training, _ in reached] == [*[False] * config.inner_steps, True] * 3
    for draw, (_, weights) in zip(next(episode_sampler(config, data)), reached[passes - 1 :: passes], strict=True):
        support, number = data[draw.language].select(draw.support), subnets.index(draw.language)
        rates = {"head_lr": config.inner_lr, "encoder_lr": config.inner_encoder_lr}
        before = {k: v.clone() for k, v in task.model.state_dict().items()}
        with adapted(task, support, number, steps=config.inner_steps, **rates):
            for name, value in task.model.state_dict().items():
                assert torch.equal(value, weights[name]), name
        assert any(not torch.equal(value, weights[name]) for name, value in before.items())


def test_reptile_keeps_dropout_in_its_steps(tmp_path: Path) -> None:
    """Reptile's model is trained by its inner steps alone, which are regularised like any others."""
    task = toy_task(dropout=0.2)
    config = toy_config(tmp_path, meta="reptile", **EPISODE)
    data = {name: task.training_examples(splits["train"], name) for name, splits in toy_data().items()}
    assert Episodes(task, data, config, accelerator_for("cpu", "no")).learner.inner_dropout


def assert_close(name: str, expected: torch.Tensor, given: torch.Tensor, ratio: float) -> None:
    """The error's norm is at most `ratio` times the expected one's, but for what is zero but for rounding."""
    error = float((given - expected).norm())
    assert error <= ratio * float(expected.norm()) + 1e-8, f"{name}: {error} of {float(expected.norm())}"


def first_moments(run: Path, task: Task, config: TrainConfig) -> dict[str, torch.Tensor]:
    """AdamW's first moments in the last checkpoint of a run, by parameter name."""
    latest = run_folder.latest(run)
    assert latest is not None
    moments = read_tensors(latest / "optimizer.safetensors")[0]
    if config.freeze_embeddings:
        task.freeze_embeddings()
    order = [p for group in build_optimizer(task, config).param_groups for p in group["params"]]
    names = {p: name for name, p in task.model.named_parameters()}
    return {names[p]: moments[f"{i}.exp_avg"] for i, p in enumerate(order) if f"{i}.exp_avg" in moments}


def test_outer_rates_of_a_pretrained_encoder_are_its_own(tmp_path: Path) -> None:
    """`meta_lr` moves what is above a pretrained encoder, `meta_encoder_lr` the encoder; each is the plain rate if it
    is not given.
    """
    task = toy_task()
    config = toy_config(tmp_path, meta="fomaml", meta_lr=0.5, lr=0.1, encoder_lr=0.01)
    assert peak_rates(task, config) == [0.1] * 2
    assert peak_rates(task, config, episodes=True) == [0.5] * 2
    task.model.trigrams = None  # what a parser on a pretrained encoder looks like
    assert sorted(peak_rates(task, config, episodes=True)) == [0.01] * 2 + [0.5] * 2
    config.meta_encoder_lr = 0.002
    assert sorted(peak_rates(task, config, episodes=True)) == [0.002] * 2 + [0.5] * 2
    assert sorted(peak_rates(task, config)) == [0.01] * 2 + [0.1] * 2
    unset = toy_config(tmp_path, meta="fomaml", lr=0.1)
    assert peak_rates(toy_task(), unset, episodes=True) == [0.1] * 2
    width = task.encoder.config.hidden_size
    assert sorted(peak_rates(task, unset)) == sorted([2e-4 * 384 / width] * 2 + [0.1] * 2)  # what was tuned at 384
    task.encoder.config = Gemma3Config(text_config={"hidden_size": 96})  # of text and pictures
    assert sorted(peak_rates(task, unset)) == sorted([2e-4 * 384 / 96] * 2 + [0.1] * 2)
    assert inner_rates(toy_task(), unset) == (0.03, 0.01)
    assert inner_rates(task, unset) == (0.03, 0.001)


# ---- the run


def test_the_axis_and_what_is_logged(unbroken: dict[tuple[str, str], TrainResult]) -> None:
    """Scores, checkpoints and learning rates are logged at the steps that were planned."""
    result = unbroken["random", "fomaml"]
    budget = result.budget
    assert (budget.plain_steps, budget.episodes) == (12, 4)
    lines = [record for record in metrics(result.run) if "query_loss" in record]
    assert [line["step"] for line in lines] == [15, 18, 21, 24]
    assert [line["episodes"] for line in lines] == [1, 2, 3, 4]
    assert (budget.outer_steps, budget.gradient_passes, budget.sentences) == (16, 12 + 4 * 9, 6 * 24)
    assert all(line["loss"] == line["query_loss"] for line in lines)
    assert all("query_loss" not in r for r in metrics(result.run) if r["step"] <= 12)
    # Every 5 steps: 5 and 10 are plain steps; 15, 20 and 24 are reached or passed by episodes.
    assert [r["step"] for r in metrics(result.run) if "dev" in r] == [5, 10, 15, 21, 24]
    rates = [line["learning_rate"] for line in lines]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[0] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * (12 - 5) / (24 - 5))))
    assert not any("query_loss" in r for r in metrics(unbroken["random", "reptile"].run))


def test_plain_steps_are_those_of_a_run_without_episodes(
    unbroken: dict[tuple[str, str], TrainResult], tmp_path: Path
) -> None:
    """Plain and meta runs start their second phase from the same network."""
    plain = train(toy_task(), toy_data(), toy_config(tmp_path / "plain", **SMALL_EPISODES), progress=False)
    for result in unbroken.values():
        theirs = [r for r in metrics(result.run) if r["step"] <= 12]
        assert theirs == [r for r in metrics(plain.run) if r["step"] <= 12]


def test_a_line_of_the_metrics_is_of_one_phase(tmp_path: Path) -> None:
    """A logged loss is an average over plain steps or over episodes, never over both."""
    lines = [r for r in metrics(run(tmp_path / "run", "fomaml", log_every=7).run) if "loss" in r]
    assert [line["step"] for line in lines] == [7, 12, 15, 21, 24]
    assert ["query_loss" in line for line in lines] == [False, False, True, True, True]


def test_dynamic_masks_change_after_episodes(unbroken: dict[tuple[str, str], TrainResult]) -> None:
    """Masks are updated between episodes even if no episode ends on a multiple of update_every."""
    result = unbroken["dynamic", "fomaml"]
    changed = [r["step"] for r in result.history if "masks_changed" in r]
    assert changed
    assert set(changed) <= {18, 21}  # 16 and 20 were passed then; at 24 masks are frozen


def test_bf16_runs_episodes_and_differs(tmp_path: Path, unbroken: dict[tuple[str, str], TrainResult]) -> None:
    """Mixed precision works in the inner loop, and is on there."""
    result = run(tmp_path / "run", "fomaml", precision="bf16", discover_at=0.0, steps=12)
    single = run(tmp_path / "single", "fomaml", discover_at=0.0, steps=12)
    ours, theirs = (next(r for r in metrics(x.run) if "loss" in r) for x in (result, single))
    for name in ("support_loss_last", "query_loss"):
        assert ours[name] != theirs[name]
        assert ours[name] == pytest.approx(theirs[name], rel=0.01)
    assert next(result.task.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("meta", ["fomaml", pytest.param("reptile", marks=pytest.mark.slow)])
def test_episodes_learn(meta: str, tmp_path: Path) -> None:
    """Training in episodes lowers the loss."""
    changes = {"discover_at": 0.0, "steps": 90, "checkpoint_every": 0, "eval_every": 0, "meta_lr": 3e-3}
    losses = [r["loss"] for r in metrics(run(tmp_path / "run", meta, "full", **changes).run) if "loss" in r]
    assert min(losses[-3:]) < 0.8 * losses[0]


# ---- killed


def kill_in_an_episode(parser: Parser, at: int) -> None:
    """Raise in the parser's forward pass number `at` of training (scoring does not count)."""
    passes = itertools.count(1)

    def hook(module: torch.nn.Module, *_: Any) -> None:
        if module.training and next(passes) == at:
            raise Killed

    parser.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("case", "where"), covering({"-".join(case): case for case in CASES}, ["in the first", "in a later"])
)
def test_killed_in_the_middle_of_an_episode(
    case: tuple[str, str], where: str, unbroken: dict[tuple[str, str], TrainResult], tmp_path: Path
) -> None:
    """A run that dies inside an episode resumes to the weights and metrics of an unbroken one."""
    method, meta = case
    parser = toy_parser()
    into = 2 if meta == "fomaml" else 5  # the second language's query, or the third one's inner loop
    at = 12 + PASSES[meta] * (0 if where == "in the first" else 2) + into
    kill_in_an_episode(parser, at)
    changes = dynamic_settings(method)
    with pytest.raises(Killed):
        run(tmp_path / "run", meta, method, parser, **changes)
    torch.rand(7)  # the state of this process must not matter
    resumed = run(tmp_path / "run", meta, method, resume=True, **changes)
    expected = unbroken[method, meta]
    assert_same_weights(resumed.task.model, expected.task.model)
    assert metrics(resumed.run) == metrics(expected.run)
    if method != "full":
        ours, theirs = (load_file(x.run / "masks.safetensors") for x in (resumed, expected))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def train_slowly(folder: str, marker: str) -> None:
    """Train with a pause in every forward pass, and say when the third episode is half way through."""
    parser, passes = toy_parser(), itertools.count(1)

    def hook(module: torch.nn.Module, *_: Any) -> None:
        if module.training:
            time.sleep(0.03)
            if next(passes) == 12 + 2 * PASSES["fomaml"] + 2:
                Path(marker).touch()
                time.sleep(60)  # until the kill comes

    parser.register_forward_pre_hook(hook)
    run(Path(folder), "fomaml", parser=parser)


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_episode(unbroken: dict[tuple[str, str], TrainResult], tmp_path: Path) -> None:
    """A process killed inside an episode leaves a run that resumes to the same end."""
    marker = tmp_path / "half way"
    process = start_process(train_slowly, str(tmp_path / "run"), str(marker))
    limit = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < limit, "the third episode was never reached"
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    latest = run_folder.latest(tmp_path / "run")
    assert latest is not None
    assert latest.name == "step-00000018"
    resumed = run(tmp_path / "run", "fomaml", resume=True)
    assert_same_weights(resumed.task.model, unbroken["random", "fomaml"].task.model)
    assert metrics(resumed.run) == metrics(unbroken["random", "fomaml"].run)


# ---- what goes wrong


def test_an_inner_loop_that_diverges_is_said(tmp_path: Path) -> None:
    """A NaN meta-gradient ends the run, and the error names the last good checkpoint."""
    parser = toy_parser()
    with pytest.raises(TrainingDiverged, match=r"is (nan|inf) at step 15; the last good checkpoint is .*step-00000012"):
        run(tmp_path / "run", "fomaml", parser=parser, inner_lr=1e30, inner_encoder_lr=1e30)
    assert all(bool(torch.isfinite(p).all()) for p in parser.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_batch": 4}, r"meta_batch is 4 \(expected at most the number of languages, 3\)"),
        ({"support_sentences": 30, "query_sentences": 11, "batch_size": 99}, r"take 41 different .*: qaa has 40, qab"),
        ({"support_sentences": 30}, "an episode draws 99 sentences"),
    ],
)
def test_bad_settings_are_said_before_anything_is_written(changes: Any, message: str, tmp_path: Path) -> None:
    """Settings that cannot work are refused before a run is started."""
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "fomaml", **changes)
    assert not (tmp_path / "run").exists()


def test_reptile_needs_an_inner_rate_everywhere(tmp_path: Path) -> None:
    """Reptile with an inner rate of 0 for the encoder, which would never train it, is refused."""
    with pytest.raises(ConfigError, match=r"inner_encoder_lr is 0.0 \(expected > 0 with meta reptile"):
        toy_config(tmp_path, meta="reptile", inner_encoder_lr=0.0)
    toy_config(tmp_path, meta="fomaml", inner_encoder_lr=0.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fastmask train --meta` trains in episodes, and refuses what it could not finish."""
    write_treebanks(tmp_path / "ud", sentences={"train": 40, "dev": 4, "test": 4})
    settings = (
        "--languages qaa,qac --method full --meta fomaml --inner-steps 2 --batch-size 8 --threads 1 --eval-every 0 "
        "--support-sentences 8 --query-sentences 8"
    )
    command = ["train", *settings.split(), "--data", str(tmp_path / "ud"), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "20", "--meta-batch", "3"]) == 1
    assert "meta_batch is 3 (expected at most the number of languages, 2)" in capsys.readouterr().err
    assert main([*command, "--steps", "90", "--support-sentences", "39"]) == 1
    assert "take 47 different sentences of each language: qaa has 40, qac has 40" in capsys.readouterr().err
    assert main([*command, "--method", "static", "--density", "0.1"]) == 1
    assert "density is 0.1: that is 3 of the 32 heads, which would kill a layer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    tiny_encoder(tmp_path / "encoder", "".join(path.read_text() for path in tmp_path.glob("ud/UD_*/*.conllu")))
    assert main([*command, "--steps", "20", "--model", str(tmp_path / "encoder")]) == 0
    said = capsys.readouterr()
    assert "words/s in episodes" in said.out
    spent = "14 optimizer steps (12 plain, 2 episodes), 160 training examples drawn, 24 gradient passes"
    assert f"  {spent}\n" in said.err
    assert f"spent: {spent}\n" in said.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["budget"] == {
        "steps": 20,
        "plain_steps": 12,
        "episodes": 2,
        "outer_steps": 14,
        "episode_sentences": 2 * (8 + 8),
        "sentences": 20 * 8,
        "gradient_passes": 12 + 2 * 2 * 3,
    }
    assert results["training_words_per_second"].keys() == {"full_network", "episodes"}
