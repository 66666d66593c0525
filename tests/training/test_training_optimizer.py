"""`--optimizer live` in a run: no language's step moves what it does not own, and resuming is exact."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_training_loop import Killed
from toy_run import LANGUAGES, assert_same_weights, toy_config, toy_data, toy_parser, toy_task

import fastmask as fm
from fastmask.tasks.parsing.task import Parsing
from fastmask.training import loop
from fastmask.training.loop import train
from fastmask.training.methods import SwitchPoint

ONE_LANGUAGE = {"meta_batch": 1, "inner_steps": 1, "support_sentences": 2, "query_sentences": 2, "checkpoint_every": 1}


def halves(point: SwitchPoint) -> Any:
    return fm.Subnetworks.random(point.task.model.encoder.config, LANGUAGES, 0.5, seed=0, units="neurons")


def up_projection(parser: Any) -> torch.Tensor:
    return parser.encoder.encoder.layer[0].intermediate.dense.weight


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
@pytest.mark.parametrize("optimizer", ["live", "adamw"])
def test_a_step_of_one_language_moves_its_units_only(meta, optimizer, tmp_path, monkeypatch):
    """A step moves no unit that is dead for its language, whatever momentum and decay other languages have left."""
    parser, seen, dead_moved, live_moved = toy_parser(), [], [], []
    update = loop._Run._update

    def watched(run: Any) -> None:
        before = up_projection(parser).detach().clone()
        accumulate = run.phase.accumulate
        monkeypatch.setattr(run.phase, "accumulate", lambda step: seen.append(accumulate(step)) or seen[-1])
        update(run)
        monkeypatch.undo()
        if run.switched:
            (language,) = seen[-1].languages
            live = run.subnetworks.neurons[run.subnetworks.index(language), 0]
            moved = (up_projection(parser).detach() != before).any(1)
            live_moved.append(bool(moved[live].all()))
            dead_moved.append(bool(moved[~live].any()))

    config = toy_config(
        tmp_path, method="random", meta=meta, optimizer=optimizer, **{**ONE_LANGUAGE, "steps": 16, "meta_lr": 1e-2}
    )
    run = loop._Run(Parsing(parser), toy_data(), config, halves)
    run._update = lambda: watched(run)  # type: ignore[method-assign]
    run.train(None, show=False)
    assert len({language for of_step in seen for language in of_step.languages}) > 1
    assert live_moved
    assert all(live_moved)
    assert any(dead_moved) == (optimizer == "adamw")


@pytest.mark.parametrize("meta", ["none", "fomaml"])
def test_resuming_is_exact(meta, tmp_path):
    """A checkpoint holds the moments of all slices, and the languages of a step."""
    changes = {**ONE_LANGUAGE, "method": "random", "meta": meta, "optimizer": "live", "steps": 16}
    unbroken = train(toy_task(), toy_data(), toy_config(tmp_path / "a", **changes), halves, progress=False)

    def kill(step: int) -> None:
        if step >= 12:
            raise Killed

    with pytest.raises(Killed):
        train(toy_task(), toy_data(), toy_config(tmp_path / "b", **changes), halves, on_step=kill, progress=False)
    again = toy_config(tmp_path / "b", resume=True, **changes)
    assert_same_weights(unbroken.task.model, train(toy_task(), toy_data(), again, halves, progress=False).task.model)


@pytest.mark.parametrize("meta", ["none", "fomaml", "reptile"])
def test_rows_of_embeddings_move_when_they_are_looked_up(meta, tmp_path, monkeypatch):
    """A step moves the rows of the trigrams of its sentences, with gradients clipped as dense ones are, and no other
    row; in episodes, too, and with several processes, whose gradients come as dense ones.
    """
    settings = {
        **ONE_LANGUAGE,
        "method": "random",
        "meta": meta,
        "optimizer": "live",
        "steps": 14,
        "max_grad_norm": 0.1,
        "weight_decay": 0.0,
    }
    weights = {}
    for kind in ("sparse", "dense"):
        parser, looked_up = toy_parser(dropout=0.0).double(), set()
        parser.trigrams.register_forward_pre_hook(lambda _, inputs, ids=looked_up: ids.update(inputs[0].tolist()))

        def watched(run: Any, parser: Any = parser, looked_up: Any = looked_up) -> None:
            looked_up.clear()
            before = parser.trigrams.weight.detach().clone()
            loop._Run._update(run)
            moved = (parser.trigrams.weight.detach() != before).any(1).nonzero().flatten().tolist()
            assert moved or run.step == 1  # whose gradient is zero: the arcs' form starts there
            assert set(moved) <= looked_up
            assert not parser.trigrams.sparse

        if kind == "dense":
            monkeypatch.setattr(loop, "sparse_gradients", lambda tables: contextlib.nullcontext())
        run = loop._Run(Parsing(parser), toy_data(), toy_config(tmp_path / kind, **settings), halves)
        assert run.tables == [parser.trigrams, parser.upos]
        run._update = lambda run=run: watched(run)  # type: ignore[method-assign]
        run.train(None, show=False)
        weights[kind] = parser.state_dict()
    for name, value in weights["sparse"].items():
        torch.testing.assert_close(value, weights["dense"][name], rtol=1e-4, atol=1e-5, msg=name)
