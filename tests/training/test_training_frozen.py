"""Frozen input embeddings: no gradient and no optimizer state, in every part of a run and in what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_loop import Killed
from toy_run import LANGUAGES, assert_same_weights, toy_config, toy_data, toy_task

import fastmask as fm
from fastmask.files import read_tensors
from fastmask.tasks.parsing.task import Parsing
from fastmask.training import run_folder
from fastmask.training.loop import TrainResult, train
from fastmask.training.methods import SwitchPoint
from fastmask.training.run_folder import load_run
from fastmask.unseen import adapted
from tests.compare.tiny_encoder import tiny_encoder

EPISODE = {"inner_steps": 2, "support_sentences": 2, "query_sentences": 2, "inner_lr": 0.05, "inner_encoder_lr": 0.05}
FROZEN = {
    "small": ("trigrams.weight", "upos.weight"),
    "pretrained": tuple(f"encoder.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny pretrained encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    words = (word for splits in toy_data().values() for row in splits["train"] for word in row["words"])
    tiny_encoder(folder, "".join(words))
    return str(folder)


def task_of(config: Any) -> Parsing:
    return toy_task() if config.model == "small" else Parsing.build(config, toy_data())


def halves(point: SwitchPoint) -> Any:
    return fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES, 0.5, seed=0, units="both")


def run(out: Path, hook: Any = None, **changes: Any) -> TrainResult:
    config = toy_config(out, freeze_embeddings=True, method="random", **{**EPISODE, **changes})
    return train(task_of(config), toy_data(), config, halves, hook, progress=False)


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize(
    ("meta", "optimizer"), [("none", "adamw"), ("none", "live"), ("fomaml", "live"), ("reptile", "adamw")]
)
def test_nothing_of_them_moves(kind: str, meta: str, optimizer: str, encoder: str, tmp_path: Path) -> None:
    """Frozen tables keep their bits in all kinds of steps, without moments; all else moves, and resuming is exact."""
    changes = {"meta": meta, "optimizer": optimizer, "model": "small" if kind == "small" else encoder}
    config = toy_config(tmp_path / "first", **changes)
    before = task_of(config).model.state_dict()
    result = run(tmp_path / "run", **changes)
    own = dict(result.task.model.named_parameters())
    unused = {"encoder.embeddings.word_embeddings.weight"} if kind == "small" else set()  # it reads trigrams
    frozen = {*FROZEN[kind], *unused}
    assert {name for name, parameter in own.items() if not parameter.requires_grad} == frozen
    assert {name for name, parameter in own.items() if torch.equal(parameter, before[name])} == frozen
    assert all(own[name].grad is None for name in frozen)

    def kill(step: int) -> None:
        if step >= 9:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", kill, **changes)
    latest = run_folder.latest(tmp_path / "killed")
    assert latest is not None
    moments = [name for name in read_tensors(latest / run_folder.OPTIMIZER)[0] if name.endswith(".exp_avg")]
    assert len(moments) <= len(own) - len(frozen)
    assert_same_weights(run(tmp_path / "killed", resume=True, **changes).task.model, result.task.model)


@pytest.mark.parametrize("kind", FROZEN)
def test_a_finished_run_is_adapted_without_them(kind: str, encoder: str, tmp_path: Path) -> None:
    """A language that is adapted to changes what a training language may, and nothing more."""
    run(tmp_path / "run", model="small" if kind == "small" else encoder)
    loaded = load_run(tmp_path / "run")
    support = loaded.task.training_examples(list(toy_data()[LANGUAGES[0]]["dev"])[:4], "xx", "support")
    before = {name: value.clone() for name, value in loaded.task.model.state_dict().items()}
    for optimizer in ("sgd", "adamw"):
        with adapted(loaded.task, support, 0, steps=2, head_lr=0.1, encoder_lr=0.1, optimizer=optimizer):
            now = loaded.task.model.state_dict()
            assert all(torch.equal(now[name], before[name]) for name in FROZEN[kind])
            assert not torch.equal(now["arcs.bilinear.weight"], before["arcs.bilinear.weight"])
