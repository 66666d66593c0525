"""Method `vector`: the full network and a vector for each language, which examples find by their language ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, ElectraConfig, ElectraModel

import fastmask as fm
from fastmask.settings import ConfigError
from fastmask.tasks.parsing.parser import LanguageVectors
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.config import TrainConfig
from fastmask.training.loop import train
from fastmask.training.run_folder import load_run
from fastmask.unseen import adapted, choose, with_union
from fastmask.unseen.choosing import Choice
from tests.compare.tiny_encoder import tiny_encoder

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from toy_run import LANGUAGES, assert_same_weights, metrics, toy_config, toy_data, toy_task


class Killed(Exception):  # noqa: N818
    """Raised in the middle of a run."""


@pytest.fixture(scope="module", params=["small", "pretrained"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run, with an encoder from scratch and with a pretrained one."""
    model = "small"
    if request.param == "pretrained":
        model = str(tmp_path_factory.mktemp("encoder"))
        words = (word for splits in toy_data().values() for row in splits["train"] for word in row["words"])
        tiny_encoder(Path(model), "".join(words))
    return {"method": "vector", "model": model, "lr": 1e-2, "checkpoint_every": 1}


def task_of(config: TrainConfig) -> Parsing:
    return toy_task() if config.model == "small" else Parsing.build(config, toy_data())


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    config = toy_config(tmp_path_factory.mktemp("run") / "run", **settings)
    return train(task_of(config), toy_data(), config, progress=False).run


def test_by_hand() -> None:
    """An example gets its language's vector, the union their mean, and the full network none."""
    vectors = LanguageVectors(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    inputs = torch.zeros(4, 3, 2)
    found = vectors(inputs, torch.tensor([0, 1, 2, -1]))
    assert found[:, 0].tolist() == found[:, 2].tolist() == [[1, 2], [3, 6], [2, 4], [0, 0]]
    assert vectors(inputs, 1)[0, 0].tolist() == [3, 6]
    assert vectors(inputs, None) is inputs
    assert vectors(inputs, -1) is inputs
    assert vectors.with_copy(1).weight.tolist() == [[1, 2], [3, 6], [3, 6]]
    assert vectors.with_copy(2).weight.tolist()[2] == [2, 4]
    assert vectors.with_copy(-1).weight.tolist()[2] == [0, 0]


def test_a_run_learns_vectors_and_keeps_them(run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Languages get vectors of their own after the switch; the saved run has them; resuming is exact."""
    loaded = load_run(run)
    vectors = loaded.task.model.language_vectors.weight
    assert len(vectors) == len(LANGUAGES)
    assert all(bool(vector.any()) for vector in vectors)
    assert not torch.equal(vectors[0], vectors[1])

    def kill(step: int) -> None:
        if step >= 9:
            raise Killed

    config = toy_config(tmp_path / "run", **settings)
    with pytest.raises(Killed):
        train(task_of(config), toy_data(), config, on_step=kill, progress=False)
    again = toy_config(tmp_path / "run", resume=True, **settings)
    assert_same_weights(train(task_of(again), toy_data(), again, progress=False).task.model, loaded.task.model)
    assert metrics(tmp_path / "run") == metrics(run)


def test_the_full_network_runs_with_a_language_or_without(run: Path) -> None:
    """Each language's sentences are read with its vector, in mixed batches and alone, and all units are computed."""
    task = load_run(run).task
    task.model.double()
    rows = [toy_data()[name]["dev"][0] for name in LANGUAGES]
    examples, ids = task.examples(rows), torch.arange(len(LANGUAGES))
    mixed = task.model(task.collate(examples, ids)).states
    plain = task.model(task.collate(examples, torch.full_like(ids, -1))).states
    for number, name in enumerate(LANGUAGES):
        with task.reading(name):
            one = task.model(task.collate(examples)).states[number]
        torch.testing.assert_close(one, mixed[number])
        assert not torch.allclose(one, plain[number])
        fm.set_language(task.encoder, name)  # what stands reaches the vectors, too
        torch.testing.assert_close(task.model(task.collate(examples)).states[number], mixed[number])
        fm.set_language(task.encoder)
    with torch.no_grad():
        task.model.language_vectors.weight.zero_()
    torch.testing.assert_close(task.model(task.collate(examples, ids)).states, plain)


def test_embeddings_that_are_narrower_than_states(tmp_path: Path) -> None:
    """ELECTRA and ALBERT widen their embeddings: vectors are as wide as what they are added to, and saved so."""
    words = (word for splits in toy_data().values() for row in splits["train"] for word in row["words"])
    tiny_encoder(tmp_path, "".join(words))
    size = AutoConfig.from_pretrained(tmp_path).vocab_size
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
    ElectraModel(ElectraConfig(vocab_size=size, hidden_size=16, embedding_size=8, **sizes)).save_pretrained(tmp_path)
    config = toy_config(tmp_path / "run", method="vector", model=str(tmp_path))
    task = Parsing.build(config, toy_data())
    assert task.add_vectors(len(LANGUAGES)).shape == (len(LANGUAGES), 8)
    for weight in (task.model.language_vectors.weight, task.model.arcs.bilinear.weight, task.model.labels.forms):
        torch.nn.init.normal_(weight)  # scorers of zeros let no gradient through
    fm.attach(task.encoder, fm.Subnetworks.full(task.encoder, LANGUAGES))
    examples = task.examples([toy_data()[name]["dev"][0] for name in LANGUAGES])
    task.loss(task.collate(examples, torch.arange(len(LANGUAGES)))).mean.backward()
    assert all(bool(grad.any()) for grad in task.model.language_vectors.weight.grad)
    task.save(tmp_path / "saved")
    assert torch.equal(
        Parsing.open(tmp_path / "saved").model.language_vectors.weight, task.model.language_vectors.weight
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_unseen_language_takes_a_vector_and_adapts_it(run: Path, optimizer: str) -> None:
    """Choice by lowest loss and union work as with masks; adapting moves the vector that was chosen, and is undone."""
    loaded = load_run(run, attached=False)
    task, subnets = loaded.task, with_union(loaded.subnetworks)
    fm.attach(task.encoder, subnets)
    support = task.training_examples(list(toy_data()[LANGUAGES[2]]["dev"]), "xx", "support")
    best = choose(task, subnets, support, "best")
    assert len(set(best.losses.values())) == len(LANGUAGES)
    before = task.model.language_vectors.weight.detach().clone()
    for choice in (best, choose(task, subnets, support, "union")):
        rates = {"head_lr": 0.01, "encoder_lr": 0.01}
        with adapted(task, support, choice.language_id, steps=2, optimizer=optimizer, **rates) as losses:
            assert losses[1] < losses[0]
            moved = (task.model.language_vectors.weight != before).any(1).tolist()
            others = [number == choice.language_id for number in range(len(LANGUAGES))]
            assert moved == (others if choice is best else [True] * len(LANGUAGES))
        assert torch.equal(task.model.language_vectors.weight, before)
    task.add_language(Choice(best.language_id, best.name).language_id)
    assert torch.equal(task.model.language_vectors.weight[-1], before[best.language_id])


def test_other_tasks_are_refused() -> None:
    """A model that cannot tell languages apart is not trained as one that can."""
    with pytest.raises(ConfigError, match="task tagging has no language vectors"):
        TrainConfig(task="tagging", method="vector")
