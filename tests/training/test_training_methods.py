"""Subnetworks that cannot be made as asked are refused before anything is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import LANGUAGES, toy_config, toy_data, toy_parser, toy_task
from transformers import BertConfig

import fastmask as fm
from fastmask.discovery import combine, stability
from fastmask.errors import FastmaskKeyError
from fastmask.models.attach import is_attached
from fastmask.training.methods import SwitchPoint, check_subnetworks, draws_for, some_rows, subnetworks_of


def check(out: Path, **changes: Any) -> None:
    task = toy_task()
    try:
        check_subnetworks(task, toy_config(out, **{"method": "static", **changes}), LANGUAGES)
    finally:
        assert not is_attached(task.encoder)


def test_a_density_that_would_kill_a_layer(tmp_path: Path) -> None:
    """A density that would leave a layer without a head or neuron is refused, and the least that works is named."""
    message = r"density is 0.1: that is 0 of the 4 heads, which would kill a layer \(expected at least 0.5: one in each"
    with pytest.raises(ValueError, match=message):
        check(tmp_path, density=0.1, units="both")
    with pytest.raises(ValueError, match=r"density is 0.02: that is 1 of the 64 neurons.*at least 0.03125"):
        check(tmp_path, density=0.02, units="neurons")
    check(tmp_path, density=0.1, units="neurons")
    check(tmp_path, density=0.5, units="both")
    check(tmp_path, density=0.1, units="both", method="full")
    task = toy_task()
    config = toy_config(tmp_path, method="static", density=0.1)
    with pytest.raises(ValueError, match="would kill a layer"):  # `fastmask discover` goes this way
        draws_for(task, training_data(task), {}, config)


def training_data(task: Any) -> dict[str, Any]:
    return {name: task.training_examples(splits["train"], name) for name, splits in toy_data().items()}


def test_several_draws_at_the_switch_are_joined_by_vote(tmp_path: Path) -> None:
    """A run draws as often as asked, other sentences each time, and trains what `combine` makes of them."""
    task = toy_task()
    with torch.no_grad():  # an untrained parser's output layer is zero, and so is every score
        for parameter in task.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    train = training_data(task)
    config = toy_config(tmp_path, method="static", units="neurons", density=0.5, draws=3, score_sentences=6)
    seen: list[Any] = []
    found = subnetworks_of(SwitchPoint(task, toy_data(), train, config), on_draws=seen.extend)
    assert found == combine(seen, "most")
    assert found.neurons.sum((1, 2)).tolist() == [32, 32, 32]
    assert len(seen) == 3
    assert len({draw.subnetworks.neurons.numpy().tobytes() for draw in seen}) == 3
    alone = draws_for(task, train, {}, dataclasses.replace(config, draws=1))
    assert alone[0].subnetworks == seen[0].subnetworks
    numbers = stability(seen)["neurons"]
    assert numbers.draws is not None
    assert numbers.draws > numbers.chance


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    """Masks that do not fit the model are refused before the first step."""
    path = tmp_path / "masks.safetensors"
    with pytest.raises(OSError, match=r"masks.safetensors"):
        check(tmp_path, masks=str(path))
    encoder = toy_parser().encoder.config
    fm.Subnetworks.random(encoder, LANGUAGES[1:], 0.5, seed=0).save(path)
    with pytest.raises(FastmaskKeyError, match=LANGUAGES[0]):
        check(tmp_path, masks=str(path))
    other = BertConfig(num_hidden_layers=3, num_attention_heads=4, hidden_size=16, intermediate_size=8)
    fm.Subnetworks.random(other, LANGUAGES, 0.5, seed=0).save(path)
    with pytest.raises(ValueError, match="masks are for 3 layers of 4 heads"):
        check(tmp_path, masks=str(path))
    fm.Subnetworks.full(encoder, LANGUAGES).save(path)
    with pytest.raises(ValueError, match="nothing could change"):
        check(tmp_path, masks=str(path), method="dynamic")
    check(tmp_path, masks=str(path), method="random")


def test_shuffling_needs_two_languages(tmp_path: Path) -> None:
    """The control that exchanges masks is refused, before the first step, for one language."""
    parser = toy_parser()
    with pytest.raises(ValueError, match=f"method is 'shuffled' .*single language, {LANGUAGES[0]}"):
        check_subnetworks(parser, toy_config(tmp_path, method="shuffled"), LANGUAGES[:1])
    heads = torch.ones(1, 2, 2, dtype=torch.bool)
    fm.Subnetworks(LANGUAGES[:1], heads=heads).save(tmp_path / "m")
    check_subnetworks(parser, toy_config(tmp_path, method="static", masks=str(tmp_path / "m")), LANGUAGES[:1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "entropy"}, r"score is 'entropy', which compares languages .*single language"),
        ({"score": "shapley", "units": "both"}, r"score is 'shapley', .* units is 'both' \(expected heads\)"),
        ({"method": "dynamic", "density": 1.0}, r"density is 1.0 \(expected less with method dynamic"),
    ],
    ids=["score of two", "score of heads", "nothing to swap"],
)
def test_what_finding_subnetworks_would_refuse(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """It is refused before the full network is trained, not at the switch; where nothing is found, it is no matter."""
    languages, settings = LANGUAGES[:1], {"method": "static", "density": 0.5, **changes}
    with pytest.raises(ValueError, match=said):
        check_subnetworks(toy_task(), toy_config(tmp_path, **settings), languages)
    for method in ("full", "vector"):
        check_subnetworks(toy_task(), toy_config(tmp_path, **{**settings, "method": method}), languages)


def test_dev_rows_are_drawn_from_all_of_them_and_always_alike() -> None:
    """Scores must not go by the first rows, which are often of one source, and runs must score the same ones."""
    rows = [{"number": number} for number in range(400)]
    numbers = [row["number"] for row in some_rows(rows, 40)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 40
    assert all(any(first <= number < first + 100 for number in numbers) for first in range(0, 400, 100))
    assert some_rows(rows, 40) == some_rows(iter(rows), 40)
    for limit in (0, 400, 500):
        assert some_rows(rows, limit) == some_rows(iter(rows), limit) == rows
    splits = toy_data()[LANGUAGES[0]]
    drawn = some_rows(splits["dev"], 3)
    assert len(drawn) == 3
    assert all(row in list(splits["dev"]) for row in drawn)
