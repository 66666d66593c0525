"""What a comparison consists of, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmask.compare.plan import CompareConfig, Plan, check_languages
from fastmask.settings import ConfigError
from fastmask.tasks.data.synthetic import write_treebanks


def plan_in(out: Path, training: dict[str, object] | None = None, **settings: object) -> Plan:
    config = CompareConfig(**{"train": "qaa,qab", "unseen": "qad", "methods": "full,static", "seeds": 2, **settings})
    return Plan(out, "data", config, training or {})


def test_every_cell_needs_the_start_of_its_seed(tmp_path):
    """A cell is missing, is done twice, or could begin before the run that it goes on from."""
    jobs = plan_in(tmp_path).jobs
    assert [job.name for job in jobs] == [
        f"seed-{seed}/{name}"
        for seed in (0, 1)
        for name in ("start", "full-none", "static-none", "full-fomaml", "static-fomaml")
    ]
    for job in jobs:
        assert job.needs == (None if job.method is None else f"seed-{job.seed}/start")


def test_all_cells_share_the_settings_of_training(tmp_path):
    """Cells run under different budgets, seeds or data."""
    plan = plan_in(tmp_path, {"steps": 70, "density": 0.5})
    for job in plan.jobs:
        config = plan.train_config(job, tmp_path / job.name)
        assert (config.steps, config.density, config.seed) == (70, 0.5, job.seed)
        assert (config.languages, config.data) == ("qaa,qab", "data")
        assert (config.method, config.meta) == (job.method or "static", job.meta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "full,statc"}, "methods.*statc.*shuffled"),
        ({"metas": "maml"}, "metas.*maml.*reptile"),
        ({"seeds": 0}, "seeds is 0"),
        ({"shots": 0}, "shots is 0"),
        ({"adapt_lr": 0.0}, "adapt_lr"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, settings, message):
    """A typo starts hours of training."""
    with pytest.raises(ConfigError, match=message):
        plan_in(tmp_path, **settings)


def test_settings_of_single_runs_are_refused(tmp_path):
    """One seed or method given for training would quietly make all cells the same."""
    with pytest.raises(ConfigError, match="seed is a setting of single runs"):
        plan_in(tmp_path, {"seed": 3})
    with pytest.raises(ConfigError, match="steps is -1"):
        plan_in(tmp_path, {"steps": -1})


def test_a_folder_goes_on_only_with_its_own_comparison(tmp_path):
    """Cells of two different comparisons end up in one table."""
    plan_in(tmp_path / "a", {"steps": 70, "threads": 1}).open()
    plan_in(tmp_path / "a", {"steps": 70, "threads": 2}).open()  # how it is run is free
    with pytest.raises(ConfigError, match="steps was 70 and is 80"):
        plan_in(tmp_path / "a", {"steps": 80}).open()
    with pytest.raises(ConfigError, match="shots was 20 and is 5"):
        plan_in(tmp_path / "a", {"steps": 70}, shots=5).open()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    """A comparison spreads over somebody's files."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        plan_in(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_languages_are_checked_against_the_treebanks(tmp_path):
    """A language is tested as unseen that was trained on, or training starts on a misspelt one."""
    write_treebanks(tmp_path / "ud", sentences={"train": 2, "dev": 2, "test": 2})
    check_languages(Plan(tmp_path / "out", str(tmp_path / "ud"), CompareConfig(train="qaa,qab", unseen="qad"), {}))
    with pytest.raises(ConfigError, match="qab is in both"):
        check_languages(
            Plan(tmp_path / "out", str(tmp_path / "ud"), CompareConfig(train="qaa,qab", unseen="qad,UD_Belusk-Toy"), {})
        )
    with pytest.raises(KeyError, match="qzz"):
        check_languages(Plan(tmp_path / "out", str(tmp_path / "ud"), CompareConfig(train="qaa", unseen="qzz"), {}))
    with pytest.raises(ConfigError, match="unseen names no language"):
        check_languages(Plan(tmp_path / "out", str(tmp_path / "ud"), CompareConfig(train="qaa"), {}))
