"""Settings: what is wrong is named, and a YAML file gives back what was put in."""

import dataclasses
import itertools
import math

import pytest

from fastmask.errors import FastmaskKeyError
from fastmask.settings import ConfigError
from fastmask.training.config import TrainConfig
from fastmask.training.engine import learning_rate_factor


def test_yaml_gives_back_the_settings(tmp_path) -> None:
    """A run can be repeated from its config.yaml; the language `no` is not false there."""
    config = TrainConfig(languages="en,no,UD_Czech-CAC", density=0.5, lr=1e-5, method="random", data="däta")
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == config


def test_yaml_by_hand(tmp_path) -> None:
    """YAML's own ideas (no = false, 3e-4 = text) are read as the settings they stand for."""
    path = tmp_path / "c.yaml"
    path.write_text("languages: [en, no, ru]\nprecision: no\nlr: 3e-4\ndensity: 1\nsteps: 10\n")
    config = TrainConfig.load(path)
    assert config.language_list == ["en", "no", "ru"]
    assert (config.precision, config.lr, config.density, config.steps) == ("no", 3e-4, 1.0, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "statik"},
            r"method is 'statik' \(expected one of full, static, .*random, permuted, shuffled, shared, vector\)",
        ),
        ({"steps": 0}, r"steps is 0 \(expected >= 1\)"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.5}, "a whole number"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"lr": math.nan}, "lr is nan"),
        ({"density": 0.0}, r"density is 0.0 \(expected > 0 and <= 1\)"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"resume": "yes please"}, "true or false"),
        ({"steps": 1, "discover_at": 0.9}, "discover_at is 0.9"),
    ],
)
def test_a_wrong_value_is_named(values: dict, message: str) -> None:
    """A wrong value is refused; the message names the setting and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_an_unknown_name_gets_the_nearest(tmp_path) -> None:
    """A misspelt setting is refused, and the nearest name is given."""
    path = tmp_path / "c.yaml"
    path.write_text("bach_size: 3\n")
    with pytest.raises(FastmaskKeyError, match=r"c.yaml: .*'bach_size'.*'batch_size'"):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- 3\n", "Input should be a valid dictionary"),
        ("a: [\n", "is not YAML"),
        ("steps: 3.0\n", "steps is 3.0 (expected a whole number)"),
        ("steps: true\n", "steps is True (expected a whole number)"),
        ("steps: ٣\n", "steps is '٣' (expected a whole number)"),
        ("steps: '3'\n", "steps is '3' (expected a whole number)"),
        ("lr: ٣e-4\n", "lr is '٣e-4' (expected a number)"),
        ("lr: 1e999\n", "lr is inf"),
        ("lr: .nan\n", "lr is nan"),
        ("lr: true\n", "lr is True (expected a number)"),
        ("resume: 1\n", "resume is 1 (expected true or false)"),
        ("languages: [qaa, {b: c}]\n", "languages is ['qaa', {'b': 'c'}] (expected text)"),
        ("languages: [qaa, 3]\n", "languages is ['qaa', 3] (expected text)"),
        ("model: [small]\n", "model is ['small'] (expected text)"),
        ("out:\n", "out is None (expected text)"),
        (f"model: [{'x,' * 20000}]\n", "model is ['x', 'x'"),
    ],
)
def test_every_error_of_a_file_names_it(tmp_path, text, problem) -> None:
    """What is wrong with a file of settings is one line of ordinary length that begins with its name."""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the next lines look at the message
        TrainConfig.load(path)
    assert str(error.value).startswith(f"{path}:")
    assert problem in str(error.value)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_no_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"c\.yaml"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_settings_replace_a_file_whole(tmp_path) -> None:
    """A link to the settings stays a link, and permissions stay."""
    (tmp_path / "real.yaml").touch(mode=0o600)
    (tmp_path / "c.yaml").symlink_to("real.yaml")
    TrainConfig(steps=7).save(tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").is_symlink()
    assert (tmp_path / "real.yaml").stat().st_mode & 0o777 == 0o600
    assert TrainConfig.load(tmp_path / "real.yaml").steps == 7


def test_every_setting_has_a_help_text() -> None:
    """Every option of the command line is explained."""
    for item in dataclasses.fields(TrainConfig):
        assert len(item.metadata["help"]) > 10, item.name


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_learning_rate_falls_and_never_climbs_again(kind: str) -> None:
    """Past the schedule's end the rate stays low; in published code it climbs again."""
    rates = [learning_rate_factor(step, 100, 10, kind) for step in range(260)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[100:] == [0.0] * 160
