"""What a comparison consists of, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmask.cli import main
from fastmask.compare.plan import CompareConfig, Plan, Runner, arms_of
from fastmask.settings import ConfigError
from fastmask.tasks.data.synthetic import write_treebanks

ARMS = arms_of(["full", "static"], ["none", "fomaml"])


def plan_in(out: Path, training: dict[str, object] | None = None, arms: object = ARMS, **settings: object) -> Plan:
    config = CompareConfig(**{"train": "qaa,qab", "unseen": "qad", "seeds": 2, **settings})
    return Plan(out, "data", config, training or {}, arms)


def test_every_cell_needs_the_start_of_its_seed(tmp_path):
    """Each seed has one start, the subnetworks found in it, and a cell for each arm, which needs them."""
    jobs = plan_in(tmp_path).jobs
    assert [job.name for job in jobs] == [
        f"seed-{seed}/{name}"
        for seed in (0, 1)
        for name in ("start", "masks", "full", "static", "full-fomaml", "static-fomaml")
    ]
    for job in jobs:
        start, masks = f"seed-{job.seed}/start", f"seed-{job.seed}/masks"
        if job.kind == "cell":
            assert job.needs == ((start,) if job.arm.startswith("full") else (start, masks))
        else:
            assert job.needs == (() if job.kind == "start" else (start,))


def test_some_arms_bring_what_they_need_and_no_more(tmp_path):
    """The jobs of an arm are its cells, its starts and its masks; those of no arm in particular are all."""
    plan = plan_in(tmp_path, arms={"full": {"method": "full"}, "static": {}, "other": {"lr": 0.002}}, seeds=1)
    assert [job.name for job in plan.jobs_for(["full"])] == ["seed-0/start", "seed-0/full"]
    assert [job.name for job in plan.jobs_for(["other"])] == ["seed-0/start-2", "seed-0/masks-2", "seed-0/other"]
    assert plan.jobs_for([]) == list(plan.jobs)
    assert plan.jobs_for([], {(0, "other")}) == plan.jobs_for(["full", "static"])
    assert plan.jobs_for(["other"], {(0, "other"), (1, "full")}) == []


def test_an_arm_that_the_plan_has_not(tmp_path, capsys):
    """It is named, with those that there are, before anything is read."""
    command = ["compare", "--data", "d", "--train", "en", "--unseen", "fo", "--out", str(tmp_path / "out")]
    assert main([*command, "--methods", "full", "--metas", "none", "--arms", "stattic"]) == 1
    assert "--arms: unknown entry 'stattic'. Known: full" in capsys.readouterr().err


def test_methods_that_need_no_subnetworks_have_none_found(tmp_path):
    """A comparison of full networks looks for no subnetworks."""
    jobs = plan_in(tmp_path, arms=arms_of(["full"], ["none", "reptile"])).jobs
    assert {job.kind for job in jobs} == {"start", "cell"}


def test_all_cells_share_the_settings_of_training(tmp_path):
    """Steps, data and density are those of the plan, the seed that of the job, and an arm's own settings its own."""
    arms = {**ARMS, "sparse": {"density": 0.2}}
    plan = plan_in(tmp_path, {"steps": 70, "density": 0.5}, arms)
    for job in plan.jobs:
        config = plan.train_config(job, tmp_path / job.name)
        assert (config.steps, config.seed) == (70, job.seed)
        assert config.density == (0.2 if job.arm == "sparse" else 0.5)
        assert (config.languages, config.data) == ("qaa,qab", "data")
        expected = (arms[job.arm].get("method", "static"), arms[job.arm].get("meta", "none"))
        assert (config.method, config.meta) == (expected if job.kind == "cell" else ("static", "none"))


def test_baselines(tmp_path):
    """An arm is compared with the arm of a method that has the most settings in common with it."""
    arms = {
        **arms_of(["full", "static", "random"], ["none", "fomaml"]),
        "static-35": {"density": 0.35},
        "random-35": {"method": "random", "density": 0.35},
    }
    plan = plan_in(tmp_path, {"density": 0.5}, arms)
    assert {arm: plan.baseline(arm, "full") for arm in arms} == {
        "full": None, "static": "full", "random": "full", "full-fomaml": "full", "static-fomaml": "full-fomaml",
        "random-fomaml": "full-fomaml", "static-35": "full", "random-35": "full",
    }  # fmt: skip
    of_random = {arm: plan.baseline(arm, "random") for arm in ("static", "static-fomaml", "static-35")}
    assert of_random == {"static": "random", "static-fomaml": "random-fomaml", "static-35": "random-35"}
    assert plan.baseline("static", "shared") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"seeds": 0}, "seeds is 0"), ({"shots": 0}, "shots is 0"), ({"adapt_lr": 0.0}, "adapt_lr")],
)
def test_a_wrong_setting_is_named(tmp_path, settings, message):
    """A number out of its range is refused before hours of training."""
    with pytest.raises(ConfigError, match=message):
        plan_in(tmp_path, **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "full,statc"], "--methods: unknown entry 'statc'; did you mean 'static'"),
        (["--metas", "maml"], "--metas: unknown entry 'maml'"),
        (["--plan", "{plan}", "--seeds", "2"], "--seeds given beside --plan"),
        (["--plan", "{plan}", "--methods", "full"], "--methods given beside --plan"),
        (["--plan", "{plan}/none"], "none"),
    ],
)
def test_a_wrong_option_is_named(options, message, tmp_path, capsys):
    """A typo, or settings beside a plan that says everything, are refused before anything is written."""
    plan_in(tmp_path / "of").open()
    given = [word.format(plan=tmp_path / "of" / "compare.yaml") for word in options]
    assert main(["compare", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_single_runs_are_refused(tmp_path):
    """A seed or a method for all runs, which would make cells the same, is refused."""
    with pytest.raises(ConfigError, match="seed is a setting of single runs"):
        plan_in(tmp_path, {"seed": 3})
    with pytest.raises(ConfigError, match="steps is -1"):
        plan_in(tmp_path, {"steps": -1})


def test_a_folder_goes_on_only_with_its_own_comparison(tmp_path):
    """Cells of two different comparisons never end up in one table."""
    plan_in(tmp_path / "a", {"steps": 70, "threads": 1}).open()
    plan_in(tmp_path / "a", {"steps": 70, "threads": 2}).open()  # how it is run is free
    with pytest.raises(ConfigError, match="steps was 70 and is 80"):
        plan_in(tmp_path / "a", {"steps": 80}).open()
    with pytest.raises(ConfigError, match="shots was None and is 5"):
        plan_in(tmp_path / "a", {"steps": 70}, shots=5).open()
    with pytest.raises(ConfigError, match=r"arms.sparse.density was None and is 0.3"):
        plan_in(tmp_path / "a", {"steps": 70}, {**ARMS, "sparse": {"density": 0.3}}).open()


def test_a_plan_of_a_file_is_that_of_its_folder(tmp_path):
    """What a comparison keeps in its folder can be given to another one as its plan, and says the same."""
    plan = plan_in(tmp_path / "a", {"steps": 70})
    plan.open()
    again = Plan.read(tmp_path / "a" / "compare.yaml", tmp_path / "b", "data")
    assert again.settings == plan.settings
    assert again.jobs == plan.jobs


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    """A comparison does not spread over somebody's files."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        plan_in(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_languages_are_checked_against_the_treebanks(tmp_path):
    """Every language is there, and an unseen one was not trained on."""
    write_treebanks(tmp_path / "ud", sentences={"train": 60, "dev": 2, "test": 2})

    def check(train: str, unseen: str) -> None:
        plan = Plan(tmp_path / "out", str(tmp_path / "ud"), CompareConfig(train, unseen, shots=1), {}, ARMS)
        assert Runner(plan).check()

    check("qaa,qab", "qad")
    with pytest.raises(ConfigError, match="qab is in both"):
        check("qaa,qab", "qad,UD_Belusk-Toy")
    with pytest.raises(KeyError, match="qzz"):
        check("qaa", "qzz")
    with pytest.raises(ConfigError, match="unseen names no language"):
        check("qaa", "")
