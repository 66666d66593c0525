"""What a folder is, what is skipped and why, and what ends a report before anything is computed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil

import pandas as pd
import pytest
import torch
from tiny_runs import make_run

import fastmask as fm
from fastmask.compare.plan import SETTINGS_FILE, Plan
from fastmask.compare.report import write_report
from fastmask.errors import FastmaskKeyError
from fastmask.reports import ANALYSES, Options, analyses, make_report
from fastmask.reports.page import Part
from fastmask.reports.runs import Run, SkipError, batches_of, studies_of
from fastmask.tasks.parsing.task import Parsing

FEW = Options(sentences=4)


def reasons(made):
    return {str(reason) for reason in made.skipped}


def says(made, *parts):
    """Whether one reason has all of these."""
    return any(all(part in reason for part in parts) for reason in reasons(made))


def test_a_comparison_is_its_cells(comparison):
    """Each cell is found under its method and seed, with the scores of the comparison."""
    (study,) = studies_of([comparison])
    assert {name: [run.config.seed for run in runs] for name, runs in study.variants.items()} == {
        "full": [0, 1],
        "static": [0, 1],
    }
    assert study.unseen == "qad,qag,qah"
    assert study.scores is not None
    assert set(study.scores["condition"]) >= {"seen", "adapted", "zero-shot"}
    assert list(study.masked) == ["static"]


def test_an_unfinished_cell_is_named_and_left_out(comparison, tmp_path):
    """A comparison that still runs can be looked at; unfinished cells are named."""
    copy = tmp_path / "copy"
    shutil.copytree(comparison, copy)
    (copy / "seed-1" / "static" / "result.json").unlink()
    (copy / "results.csv").unlink(missing_ok=True)  # tables, if there are any, stand for cells done elsewhere
    (study,) = studies_of([copy])
    assert study.missing == {"seed-1/static": "this cell is not done yet"}
    made = make_report([copy], ["effect", "overlap"], options=FEW)
    assert says(made, "comparison (seed-1/static)", "not done")
    assert says(made, "overlap (static, between seeds)", "one seed only")
    for seed in (0, 1):
        shutil.rmtree(copy / f"seed-{seed}")
    with pytest.raises(FileNotFoundError, match="no finished cell"):
        studies_of([copy])


def test_runs_of_one_method_are_told_apart(static_run, tmp_path):
    """Two runs of one method and seed are two variants; seeds of one method are one variant."""
    other = tmp_path / "other"
    shutil.copytree(static_run, other)
    (study,) = studies_of([static_run, other])
    assert [name.replace("(", "/").split("/")[-1] for name in study.variants] == ["static)", "other)"]
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 5"))
    (study,) = studies_of([static_run, other])
    assert [run.config.seed for run in study.variants["static"]] == [0, 5]


@pytest.mark.parametrize("changes", [{}, {"seed": "5", "lr": "0.5"}], ids=["same seed", "other settings"])
def test_folders_of_one_name(static_run, tmp_path, changes):
    """Two runs whose folders have the same name are two variants."""
    folders = [tmp_path / name for name in ("a/runs/x", "b/runs/x", "other")]
    for folder in folders:
        shutil.copytree(static_run, folder)
    text = (folders[1] / "config.yaml").read_text()
    for name, value in changes.items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    (folders[1] / "config.yaml").write_text(text)
    (tmp_path / "link").symlink_to(folders[0])
    (study,) = studies_of([*folders, tmp_path / "link", tmp_path / "b" / ".." / "other"])
    assert list(study.variants) == ["static (a/runs/x)", "static (b/runs/x)", "static (other)"]
    assert [run.folder.resolve() for (run,) in study.variants.values()] == folders
    assert study.title == "a/runs/x, b/runs/x, other"


def test_folders_of_one_name_in_a_report(static_run, tmp_path):
    """The report shows both of two runs whose folders have the same name."""
    without = shutil.ignore_patterns("checkpoints")
    folders = [shutil.copytree(static_run, tmp_path / name / "x", ignore=without) for name in "ab"]
    made = make_report(folders, ["conflict"], tmp_path / "out", FEW)
    assert {"conflict-static-a-x.csv", "conflict-static-b-x.csv"} <= {
        path.name for path in made.report.parent.iterdir()
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.mkdir(), f"holds neither a run .* nor a comparison .*{SETTINGS_FILE}"),
        (
            lambda path: (path / "run").mkdir(parents=True) or (path / "run" / "config.yaml").touch(),
            "did you mean .*run",
        ),
        (lambda path: path.mkdir() or (path / "config.yaml").touch(), "has not finished"),
    ],
)
def test_what_is_no_run(make, message, tmp_path):
    """A folder that is no run is named in the error."""
    make(tmp_path / "given")
    with pytest.raises(FileNotFoundError, match=message):
        make_report([tmp_path / "given"])
    assert not (tmp_path / "given" / "analysis").exists()


def test_bad_names(static_run, full_run, tmp_path):
    """A misspelt analysis is refused before any work."""
    with pytest.raises(FastmaskKeyError, match="unknown analysis 'overlp'; did you mean 'overlap'"):
        make_report([static_run], ["overlp"])
    with pytest.raises(ValueError, match=r"expected --out"):
        make_report([static_run, full_run])


def test_a_run_without_masks(full_run, tmp_path):
    """A full run gets the analyses it can have, and the report says why the others are missing."""
    copy = tmp_path / "full"
    shutil.copytree(full_run, copy)
    shutil.rmtree(copy / "checkpoints")
    made = make_report([copy], options=FEW, out=tmp_path / "out")
    for name in ("overlap", "use", "cross", "ablation"):
        assert says(made, f"{name}: ", "no run has subnetworks"), name
    assert says(made, "dynamics: ", "no run is of method dynamic")
    assert says(made, "conflict (along checkpoints)", "kept no checkpoint", "--keep-checkpoints 0")
    assert says(made, "effect", "no run to compare")
    assert says(made, "typology", "fastmask compare")
    assert [path.stem for path in (tmp_path / "out").glob("*.png")] == ["conflict-full"]


def test_without_checkpoints(comparison, tmp_path):
    """The report says why an analysis along training could not be made."""
    with pytest.raises(ValueError, match=r"nothing could be analysed:\n.*does not exist .expected a folder") as caught:
        make_report([comparison], ["conflict"], tmp_path / "out", Options(data=str(tmp_path / "nowhere")))
    assert "a cell of a comparison keeps no checkpoint" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_languages_missing_from_the_data(static_run, comparison, data, tmp_path):
    """A language without a treebank is left out; the other languages are analysed."""
    some = tmp_path / "ud"
    shutil.copytree(data, some)
    codes = {path.name.split("_")[0]: path.parent for path in some.glob("UD_*/*-test.conllu")}
    shutil.rmtree(codes["qab"])
    next(codes["qag"].glob("*-test.conllu")).unlink()
    made = make_report([static_run], ["ablation", "conflict"], tmp_path / "one", Options(sentences=4, data=str(some)))
    for name in ("ablation", "conflict"):
        assert says(made, f"{name} (qab)", "no data of it"), reasons(made)
    text = (tmp_path / "one" / "ablation-static.csv").read_text()
    assert "qaa" in text
    assert "qab" not in text
    made = make_report([comparison], ["cross"], tmp_path / "two", Options(sentences=4, data=str(some)))
    assert says(made, "cross (qab)", "no data of it")
    assert says(made, "cross (qag)", "no test split")
    shutil.rmtree(codes["qac"])
    with pytest.raises(ValueError, match="between two languages or more, and there is qaa"):
        make_report([static_run], ["conflict"], tmp_path / "three", Options(sentences=4, data=str(some)))


def test_one_seed_only(static_run, tmp_path):
    """The report says that seeds cannot be compared because there is only one."""
    made = make_report([static_run], ["overlap"], tmp_path / "out")
    assert says(made, "overlap (static, between seeds)", "one seed only")


def test_the_command_names_every_analysis():
    """The command lists the library's analyses."""
    from fastmask.cli import finished

    assert finished.ANALYSES.split(",") == list(ANALYSES)


def test_examples_without_trees(comparison, tmp_path, monkeypatch):
    """Nothing is counted in them, and the report says so."""
    real = analyses.load_data

    def without_trees(*given):
        splits, missing = real(*given)
        words = {
            language: {name: [{"words": row["words"]} for row in rows] for name, rows in of.items()}
            for language, of in splits.items()
        }
        return words, missing

    monkeypatch.setattr(analyses, "load_data", without_trees)
    made = make_report([comparison], ["effect", "typology"], tmp_path / "out", FEW)
    assert says(made, "typology (by head direction)", "no example of qaa, qab, qac, qad, qag, qah has a tree")


@pytest.mark.parametrize("count", [2, 5, 16, 17, 64])
def test_few_rows_make_two_batches(count):
    """The control of gradients is one half of a language against the other, also of few sentences."""

    class Some(list):
        def select(self, rows):
            return Some(self[row] for row in rows)

    class Made:
        device = "cpu"
        training_examples = staticmethod(lambda rows, name, kind: Some(rows))
        collate = staticmethod(torch.tensor)

    batches = batches_of(Made(), list(range(count)), "xx")
    assert len(batches) > 1
    assert max(map(len, batches)) <= 16
    assert torch.cat(batches).tolist() == list(range(count))


@pytest.fixture
def without_models(comparison, tmp_path):
    """A comparison of which only the scores are there."""
    copy = tmp_path / "copy"
    shutil.copytree(comparison, copy)
    for cell in copy.glob("seed-*/*/run"):
        shutil.rmtree(cell)
    return copy


def test_a_comparison_without_models(comparison, without_models, data, tmp_path):
    """What scores alone allow is drawn as with models, and the rest is left out with the reason."""
    whole = make_report([comparison], ["effect", "typology"], tmp_path / "whole", FEW)
    made = make_report([without_models], None, tmp_path / "out", Options(sentences=4, data=str(data)))
    for path in whole.report.parent.glob("*.csv"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("overlap", "use", "conflict", "cross", "ablation", "dynamics"):
        assert says(made, f"{name}: ", "the comparison has no models here (--no-keep-models)"), name
    assert not says(made, "comparison (")
    made = make_report([without_models], ["effect", "typology"], tmp_path / "again", FEW)
    assert says(made, "typology", "does not know where its data is: name it with --data")


def test_a_comparison_with_some_models(comparison, tmp_path):
    """A model that was not kept is named; its scores count."""
    copy = tmp_path / "copy"
    shutil.copytree(comparison, copy)
    shutil.rmtree(copy / "seed-1" / "static" / "run")
    made = make_report([copy], ["effect", "overlap"], tmp_path / "out", FEW)
    assert says(made, "comparison (seed-1/static)", "is not here")
    assert says(made, "overlap (static, between seeds)", "one seed only")
    assert pd.read_csv(tmp_path / "out" / "effect-seen_methods.csv").seeds.tolist() == [2]


def test_cells_that_were_done_elsewhere(comparison, tmp_path):
    """What `compare --known` took from tables counts as in its summary."""
    copy = shutil.copytree(comparison, tmp_path / "copy")
    write_report(Plan.stored(copy))
    shutil.rmtree(copy / "seed-1" / "static")
    (study,), (whole,) = studies_of([copy]), studies_of([comparison])
    assert len(study.scores) == len(whole.scores)
    assert study.days == whole.days
    assert study.missing.keys() == {"seed-1/static"}
    assert "is not here" in study.missing["seed-1/static"]
    assert [run.config.seed for run in study.variants["static"]] == [0, 1]


def test_vectors_along_training(data, tmp_path):
    """A model that got its vectors at the switch can be analysed as it was before."""
    run = make_run(tmp_path / "vector", data, "vector", keep_checkpoints=0)
    made = make_report([run], ["conflict"], tmp_path / "out", FEW)
    assert not made.skipped
    found = pd.read_csv(tmp_path / "out" / "conflict-along-vector-seed-0.csv")
    assert sorted(set(found.step)) == [2, 3, 4, 6]


def test_vectors_are_no_masks(static_run, tmp_path):
    """Of method vector every language owns everything, of which there is nothing to say."""
    copy = shutil.copytree(static_run, tmp_path / "vector")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("method: static", "method: vector"))
    (study,) = studies_of([copy])
    with pytest.raises(SkipError, match="methods full and vector have none"):
        _ = study.masked


def test_a_language_without_labels(static_run, tmp_path, monkeypatch):
    """It is left out, and the others are not."""
    asked = itertools.count()  # of three languages, for each analysis
    monkeypatch.setattr(Parsing, "has_answers", lambda task, examples: next(asked) % 3 != 0)
    made = make_report([static_run], ["cross", "ablation"], tmp_path / "out", FEW)
    for name in ("cross", "ablation"):
        assert says(made, f"{name} (qaa)", "none of its test sentences have labels")
    assert set(pd.read_csv(tmp_path / "out" / "ablation-static.csv").language) == {"qab", "qac"}


def test_languages_without_subnetworks_in_scores_of_single_runs(static_run, full_run, tmp_path):
    """The full network reads them, which says nothing of the method."""
    copy = shutil.copytree(static_run, tmp_path / "static")
    results = json.loads((copy / "results.json").read_text())
    results["test"][0]["own"] = None
    (copy / "results.json").write_text(json.dumps(results))
    made = make_report([copy, full_run], ["effect"], tmp_path / "out", FEW)
    assert says(made, "effect (qaa)", "static has no subnetwork of it")
    assert set(pd.read_csv(tmp_path / "out" / "effect.csv").language) == {"qab", "qac"}


def test_scores_of_runs_that_cut_words_into_other_pieces(static_run, full_run, tmp_path):
    """How many pieces a test set has depends on the model, and on where texts are cut."""
    copy = shutil.copytree(full_run, tmp_path / "full")
    results = json.loads((copy / "results.json").read_text())
    for row in results["test"]:
        row["words"] += 7
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="the runs have no test set in common"):
        make_report([static_run, copy], ["effect"], tmp_path / "none", FEW)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub("max_length: .*", "max_length: 99", text))
    make_report([static_run, copy], ["effect"], tmp_path / "out", FEW)
    assert pd.read_csv(tmp_path / "out" / "effect.csv").language.tolist() == ["qaa", "qab", "qac"]


def test_scores_of_single_runs(static_run, full_run, tmp_path):
    """A run without scores, and a language scored on another test set, are left out and named."""
    others = [shutil.copytree(full_run, tmp_path / name) for name in ("full-1", "full-2")]
    for seed, other in enumerate(others, start=1):
        text = (other / "config.yaml").read_text()
        (other / "config.yaml").write_text(text.replace("seed: 0", f"seed: {seed}"))
    (others[0] / "results.json").unlink()
    results = json.loads((others[1] / "results.json").read_text())
    results["test"][0]["words"] += 1
    del results["test"][1]
    (others[1] / "results.json").write_text(json.dumps(results))
    made = make_report([static_run, full_run, *others], ["effect"], tmp_path / "out", FEW)
    assert says(made, "effect (full, seed 1)", "has no test scores")
    assert says(made, "effect (qaa)", "different test sets, of ")
    assert says(made, "effect (qab)", "scored in 2 of 3 runs")
    assert pd.read_csv(tmp_path / "out" / "effect.csv").language.tolist() == ["qac"]


def test_masks_of_weights_have_no_units_to_switch_off(static_run, tmp_path, monkeypatch):
    """The report says so."""
    weights = fm.Subnetworks(["qaa", "qab"], weights={"layer": torch.ones(2, 3, 4, dtype=torch.bool)})
    monkeypatch.setattr(Run, "masks", property(lambda run: weights))
    made = make_report([static_run], ["effect", "overlap", "specificity"], tmp_path / "out", FEW)
    assert says(made, "specificity", "the subnetworks mask neither heads nor neurons")


def test_the_control_of_cross_evaluation_is_found_by_its_method(static_run):
    """Whatever an arm of random masks is called, it stands beside the masks that were found."""
    (study,) = studies_of([static_run])
    (run,) = study.runs
    control = dataclasses.replace(run, variant="chance", config=dataclasses.replace(run.config, method="random"))
    part = Part(dataclasses.replace(study, runs=(run, control)), "cross", FEW)
    analyses.cross(part)
    assert [section.title for section in part.sections] == ["static", "chance"]
