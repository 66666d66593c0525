"""Whole comparisons on tiny treebanks: cells are the runs they claim to be, and a killed comparison resumes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import tiny_encoder

from fastmask.cli import main
from fastmask.compare.plan import CONDITIONS, CompareConfig, Hypothesis, Plan, Runner, arms_of, do, is_done, read_result
from fastmask.compare.report import load_tables, read_tables, write_report
from fastmask.compare.tables import COLUMNS
from fastmask.files import FileError
from fastmask.settings import ConfigError
from fastmask.tasks.data.synthetic import write_treebanks
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.loop import train
from fastmask.training.run_folder import load_run

TRAINING = {
    "steps": 10,
    "batch_size": 6,
    "density": 0.5,
    "score_sentences": 8,
    "dev_sentences": 4,
    "eval_every": 0,
    "threads": 1,
    "inner_steps": 1,
    "support_sentences": 2,
    "query_sentences": 2,
    "update_every": 2,
    "update_sentences": 2,
}
COMPARISON = {
    "train": "qaa,qab,qac",
    "unseen": "qad,qah",
    "shots": 4,
    "support_sets": 2,
    "adapt_steps": 2,
    "adapt_lr": 1e-3,
    "adapt_encoder_lr": 1e-3,
    "test_sentences": 6,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Treebanks, and beside them an encoder: the one that is trained from scratch is large for so many cells."""
    folder = tmp_path_factory.mktemp("data") / "ud"
    write_treebanks(folder, sentences={"train": 24, "dev": 6, "test": 12})
    tiny_encoder(folder.parent / "encoder", "".join(path.read_text() for path in folder.glob("UD_*/*.conllu")))
    return folder


ARMS = {
    **arms_of(["full", "static", "dynamic", "shuffled", "permuted"], ["none"]),
    "static-fomaml": {"meta": "fomaml"},
    "denser": {"density": 0.8},  # other subnetworks of the same start
    "late": {"discover_at": 0.8},  # another start
    "twice": {"lr": 2e-3},
    "few": {"train_sentences": 4},
}


def training(data):
    return {**TRAINING, "model": str(data.parent / "encoder")}


@pytest.fixture(scope="module")
def plan(tmp_path_factory, data):
    """A comparison of one seed, done."""
    out = tmp_path_factory.mktemp("compare") / "out"
    made = Plan(out, str(data), CompareConfig(**COMPARISON, seeds=1), training(data), ARMS)
    made.open()
    runner = Runner(made)
    runner.check()
    for job in made.jobs:
        do(made, job)
    return made


@pytest.mark.parametrize("name", ["full", "static-fomaml", "dynamic", "denser", "late", "twice", "few"])
def test_a_cell_is_the_run_that_it_is_called_after(plan, name, tmp_path):
    """A cell that starts from the shared steps ends with the weights of `fastmask train` from the beginning."""
    job = next(job for job in plan.jobs if job.name == f"seed-0/{name}")
    config = dataclasses.replace(plan.train_config(job, tmp_path), resume=False)
    datasets = Runner(plan).datasets
    unbroken = train(Parsing.build(config, datasets), datasets, config, progress=False)
    of_cell = load_file(plan.folder(job) / "run" / "model" / "parser.safetensors")
    alone = load_file(unbroken.run / "model" / "parser.safetensors")
    assert of_cell.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(value, of_cell[key]), key


def test_a_hypothesis_names_languages_that_are_scored(data, tmp_path):
    """Else it would be tested on nothing, after everything was trained."""
    wanted = {"arm": "full", "over": "full", "condition": "seen"}
    config = CompareConfig(**COMPARISON, seeds=1)
    for condition, language, known in (("seen", "qad", "qaa"), ("adapted", "qaa", "qad")):
        hypotheses = {"H": Hypothesis(**{**wanted, "condition": condition}, languages=[known, language])}
        made = Plan(tmp_path, str(data), config, training(data), {"full": {"method": "full"}}, hypotheses=hypotheses)
        with pytest.raises(ConfigError, match=f"hypothesis H: unknown language '{language}'"):
            Runner(made).check()


def test_what_is_left_out_is_said_once(data, tmp_path):
    """Each language once before anything is trained, however many seeds and support sets, and no more in the jobs."""
    settings = {**training(data), "max_length": 64}
    made = Plan(tmp_path, str(data), CompareConfig(**COMPARISON, seeds=2), settings, {"full": {"method": "full"}})
    made.open()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Runner(made).check()
        said = [str(warning.message) for warning in caught]
        for kind, languages in (("training", ("qaa", "qab", "qac")), ("support", ("qad", "qah"))):
            found = [line.partition(":")[0] for line in said if f"{kind} sentences are left out" in line]
            assert found == sorted(set(found))
            assert found
            assert set(found) <= set(languages)
        do(made, made.jobs[0])
        assert len(caught) == len(said)


def test_every_language_is_scored_under_every_condition(plan):
    """Each language is in the table for each support set and rule of choosing, scored by the right subnetwork."""
    for job in plan.cells:
        scores = pd.DataFrame(read_result(plan, job)["scores"])
        masked = job.arm != "full"
        counts = scores.groupby(["condition", "language"]).size()
        for language in ("qaa", "qab", "qac"):
            assert counts["seen", language] == 1
        for language in ("qad", "qah"):
            assert counts["zero-shot", language] == 1
            assert counts["chosen", language] == counts["adapted", language] == 2
            assert not masked or counts["other choice", language] == 3  # full, and nearest for both support sets
        assert set(scores["condition"]) - {"other choice"} == set(CONDITIONS)
        own = scores[scores["condition"] == "seen"]
        assert (own["subnetwork"] == (own["language"] if masked else "full")).all()
        assert set(scores.loc[scores["condition"] == "zero-shot", "subnetwork"]) == {"union" if masked else "full"}
        chosen = scores[scores["condition"].isin(("chosen", "adapted"))]
        assert set(chosen["subnetwork"]) <= ({"qaa", "qab", "qac"} if masked else {"full"})
        assert set(scores.loc[scores["condition"] == "adapted", "steps"]) == {2}


def test_arms_share_what_they_can(plan):
    """One start for all arms that train alike until the switch, and masks found once for all that find them alike."""
    needs = {job.arm: job.needs for job in plan.cells}
    assert needs["full"] == ("seed-0/start",)
    assert needs["static"] == needs["dynamic"] == needs["permuted"] == ("seed-0/start", "seed-0/masks")
    assert needs["denser"] == ("seed-0/start", "seed-0/masks-2")
    assert needs["late"] == ("seed-0/start-2", "seed-0/masks-3")
    assert needs["twice"] == ("seed-0/start-3", "seed-0/masks-4")
    static, permuted, denser = (
        load_run(plan.folder(f"seed-0/{arm}") / "run") for arm in ("static", "permuted", "denser")
    )
    assert torch.allclose(static.subnetworks.overlap(), permuted.subnetworks.overlap())
    assert denser.subnetworks.heads.sum() > static.subnetworks.heads.sum()


def test_support_sets_are_new_ones_for_each_seed(plan):
    """Seeds share the test, not the support sets; sets of one seed have no sentence in common."""
    scorer = Runner(plan).scorer
    first, second = (scorer.supports("qad", seed) for seed in (0, 1))
    words = [[tuple(row["words"]) for row in rows] for rows in first]
    assert len({word for rows in words for word in rows}) == 8
    assert first != second
    assert first == scorer.supports("qad", 0)


def test_masks_may_be_given_to_an_arm(plan, data, tmp_path):
    """An arm trains with the subnetworks of a file, one for each seed where its name says so."""
    masks = plan.folder("seed-0/masks") / "masks.safetensors"
    (tmp_path / "masks-0.safetensors").write_bytes(masks.read_bytes())
    arms = {"static": {}, "given": {"masks": str(tmp_path / "masks-{seed}.safetensors")}}
    made = Plan(tmp_path / "out", str(data), CompareConfig(**COMPARISON, seeds=1), training(data), arms)
    assert [job.name for job in made.jobs] == ["seed-0/start", "seed-0/masks", "seed-0/static", "seed-0/given"]
    made.open()
    Runner(made).check()
    for job in made.jobs:
        do(made, job)
    assert read_result(made, "seed-0/given")["scores"] == read_result(made, "seed-0/static")["scores"]
    with pytest.raises(FileNotFoundError, match="masks-1"):
        Runner(dataclasses.replace(made, config=dataclasses.replace(made.config, seeds=2))).check()


def test_models_are_kept_only_where_they_are_asked_for(plan, data, tmp_path):
    """Without `keep_models` a cell leaves its result and no weights; the scores are the same."""
    config = dataclasses.replace(plan.config, keep_models=False)
    made = Plan(tmp_path / "out", str(data), config, training(data), {"full": {"method": "full"}})
    made.open()
    for job in made.jobs:
        do(made, job)
    assert [path.name for path in made.folder("seed-0/full").iterdir() if path.is_dir()] == []
    assert read_result(made, "seed-0/full")["scores"] == read_result(plan, "seed-0/full")["scores"]


def test_scores_are_computed_in_the_precision_of_training(data, tmp_path, monkeypatch):
    """Under bf16 every prediction multiplies in bfloat16, and else none does."""
    seen, predict = [], Parser.predict

    def note(function):
        def noted(*args, **kwargs):
            seen.append(torch.is_autocast_enabled("cpu"))
            return function(*args, **kwargs)

        return noted

    for precision in ("bf16", "no"):
        settings = {**training(data), "precision": precision}
        made = Plan(tmp_path / precision, str(data), CompareConfig(**COMPARISON, seeds=1), settings, {"static": {}})
        made.open()
        for job in made.jobs:
            with monkeypatch.context() as patched:
                patched.setattr(Parser, "predict", note(predict))
                do(made, job)
        assert seen
        assert set(seen) == {precision == "bf16"}
        seen.clear()
    scores = [read_result(Plan.stored(tmp_path / name), "seed-0/static")["scores"] for name in ("bf16", "no")]
    assert scores[0] != scores[1]


def test_plain_and_meta_cells_have_the_same_budget(plan):
    """Meta-learning is compared after seeing as many sentences."""
    spent = {job.name: read_result(plan, job)["sentences"] for job in plan.cells}
    assert set(spent.values()) == {10 * 6}


def run_in_a_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "fastmask", *arguments])


def without_times(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    cells = pd.read_csv(folder / "cells.csv")
    times = [name for name in cells if "seconds" in name or name in ("words_per_second", "resumed", "day")]
    return pd.read_csv(folder / "results.csv"), cells.drop(columns=times)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_the_same(data, tmp_path, capsys):
    """Killed and started again, `fastmask compare` loses and repeats no cell, and ends with the same results."""
    common = ["--data", str(data), "--methods", "full,static", "--seeds", "1"]
    for name, value in {**COMPARISON, **training(data), "checkpoint_every": 1}.items():
        common += [f"--{name.replace('_', '-')}", str(value)]
    unbroken = ["compare", "--out", str(tmp_path / "unbroken"), "--workers", "2", *common]
    assert main(unbroken) == 0
    killed = tmp_path / "killed"
    arguments = ["compare", "--out", str(killed), "--workers", "2", *common]
    for cell in ("seed-0/start", "seed-0/static", "seed-0/static-fomaml"):
        process = run_in_a_process(arguments)
        deadline = time.monotonic() + 300
        while not (killed / cell / "run" / "checkpoints").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()  # its workers end by themselves
        process.wait()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "static" in capsys.readouterr().out
    for mine, theirs in zip(without_times(killed), without_times(tmp_path / "unbroken"), strict=True):
        order = [name for name in ("seed", "arm", "condition", "language", "choice", "support_set") if name in mine]
        pd.testing.assert_frame_equal(
            mine.sort_values(order, ignore_index=True), theirs.sort_values(order, ignore_index=True)
        )
    assert main([*arguments, "--steps", "11"]) == 1
    assert "steps was 10 and is 11" in capsys.readouterr().err


def test_tables_stand_for_cells_that_were_done_elsewhere(plan, tmp_path):
    """What is reported of one cell done here, and of the others' tables, is what is reported of all done here."""
    write_report(plan)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("results.csv", "cells.csv"):
        table = pd.read_csv(plan.out / name)
        table.loc[table["arm"] == "dynamic", "arm"] = "of another plan"
        table[table["arm"] != "static"].to_csv(elsewhere / name, index=False)
    known = read_tables(elsewhere)
    here = dataclasses.replace(plan, out=tmp_path / "here")
    for name in ("seed-0/static", "seed-0/dynamic"):
        here.folder(name).mkdir(parents=True)
        (here.folder(name) / "result.json").write_bytes((plan.folder(name) / "result.json").read_bytes())
    for whole, joined in zip(load_tables(plan), load_tables(here, known), strict=True):
        assert list(joined["arm"]) == list(whole["arm"])
        pd.testing.assert_frame_equal(joined, whole, check_dtype=False, rtol=1e-3)
    longer = dataclasses.replace(here, training={**plan.training, "steps": 600})
    with pytest.raises(ValueError, match=r"the known cell \w+ of seed 0 has \d+ outer steps, the plan 600"):
        load_tables(longer, known)
    nothing_here = dataclasses.replace(plan, out=tmp_path / "nothing")
    assert {"static", "dynamic"} == set(plan.arms) - set(load_tables(nothing_here, known)[0]["arm"])
    cells = pd.read_csv(elsewhere / "cells.csv")
    cells.drop(columns="day").to_csv(elsewhere / "cells.csv", index=False)
    with pytest.raises(FileError, match=r"cells\.csv: no column day .expected a table of a comparison"):
        read_tables(elsewhere)
    (elsewhere / "cells.csv").write_text("")
    with pytest.raises(FileError, match=r"cells\.csv.*expected a table of a comparison"):
        read_tables(elsewhere)


@pytest.mark.slow
def test_names_in_tables_are_text(tmp_path):
    """Whatever a language or an arm is called: nan is the code of Min Nan."""
    others = dict.fromkeys((*COLUMNS, "day", "made_by", "seconds"), 0)
    row = {**others, "language": "nan", "choice": None, "score": 1.5}
    rows = [{**row, "arm": arm} for arm in ("None", "0.50", "1")]
    for name in ("results.csv", "cells.csv"):
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    for table in read_tables(tmp_path):
        assert table["arm"].tolist() == ["None", "0.50", "1"]
        assert table["language"].tolist() == ["nan"] * 3
        assert table["choice"].isna().all()
        assert table["score"].tolist() == [1.5] * 3


def test_a_failing_cell_is_named_and_the_rest_stays(data, tmp_path, capsys):
    """The error names the cell that failed, and finished cells stay."""
    arguments = [
        "compare",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--methods",
        "full,static",
        "--seeds",
        "1",
    ]
    settings = {**COMPARISON, **training(data), "metas": "none", "adapt_lr": 1e30, "adapt_encoder_lr": 1e30}
    for name, value in settings.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "seed-0/full: AdaptationDiverged" in error
    first, trained, *rest = error.splitlines()  # said before anything is trained
    assert first.startswith("parsing, 2 cells of 2 arms (4 jobs), model ")
    assert "on cpu, workers: 1, threads of each: 1; takes up to 0.0 GB in" in first
    assert trained.endswith(": 24 train, 6 dev, 6 test sentences")
    assert any("qad, unseen" in line and " support, " in line for line in rest)
    assert json.loads((tmp_path / "out" / "seed-0" / "masks" / "result.json").read_text())["density"]
    assert not is_done(Plan.stored(tmp_path / "out"), "seed-0/full")


def test_known_cells_of_another_budget_are_refused_before_training(plan, data, tmp_path, capsys):
    """Hours of training must not come before the message that their tables cannot be joined."""
    write_report(plan)
    settings = {**COMPARISON, **training(data), "seeds": 1, "steps": 600, "metas": "none", "methods": "full"}
    arguments = ["compare", "--data", str(data), "--known", str(plan.out), "--out", str(tmp_path / "out")]
    for name, value in settings.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    assert main(arguments) == 1
    assert "the known cell full of seed 0 has 10 outer steps, the plan 600" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
