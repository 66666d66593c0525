"""`fastmask analyze` on runs of tasks other than parsing: every analysis, or a line that says why there is none."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny_tasks import CASES, LANGUAGES, SIZES, config_of
from typed_command import output_of

from fastmask.cli import main
from fastmask.compare.plan import RESERVED, CompareConfig, Plan, do
from fastmask.compare.report import write_report
from fastmask.reports.analyses import ANALYSES
from fastmask.tasks import task_class
from fastmask.tasks.data.synthetic import write_treebanks
from tests.compare.tiny_encoder import tiny_encoder

# The one whose score is better when lower is the one that most can go wrong with.
TASKS = ["masked", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tagging", "classification"))]


def skipped(said: str) -> set[str]:
    """What the command lists: the analyses, and parts of them, that could not be done."""
    return {line.partition("skipped ")[2] for line in said.splitlines() if line.startswith("skipped ")}


def scores_of(run: Path, network: str) -> dict[str, float]:
    """Language -> the test score that training left, of the full network or the language's own."""
    rows = json.loads((run / "results.json").read_text())["test"]
    return {row["language"]: next(iter(row[network].values())) for row in rows}


@pytest.mark.parametrize("name", TASKS)
def test_every_analysis_of_runs(name: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All analyses but that of unseen languages can be done, and agree with the scores that training left."""
    place, sign = tiny(name), 1 if task_class(CASES[name].task).higher_is_better else -1
    runs = {method: tmp_path / method for method in ("full", "dynamic")}
    for method, out in runs.items():
        # What is not slow has one kind of units: pictures are most of the work.
        units, every = "heads" if name == "masked" else "both", 0 if method == "full" else 3
        given = {"method": method, "units": units, "checkpoint_every": every}
        config_of(name, place, out, **given).save(tmp_path / "settings.yaml")
        assert main(["train", "--config", str(tmp_path / "settings.yaml")]) == 0
    said = output_of(capsys, "analyze", *runs.values(), "--out", tmp_path / "report")
    why = "a single run has no scores of unseen languages: `fastmask compare` makes them"
    assert skipped(said) == {
        "overlap (dynamic, between seeds): there is one seed only",
        f"typology: {why}",
    }
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "report").glob("*.csv")}
    done = {"unit": "use"}
    assert {done.get(of, of) for of in (stem.split("-")[0].split("_")[0] for stem in tables)} == ANALYSES.keys() - {
        "typology"
    }
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert why in text.replace("&#34;", '"')
    word = task_class(CASES[name].task).example_word
    assert f"at most 120 test {word} of each language" in text
    assert f"{word.capitalize()} of the train split" in text

    own, full = scores_of(runs["dynamic"], "own"), scores_of(runs["dynamic"], "full")
    cross = tables["cross-dynamic"].pivot(index="language", columns="subnetwork", values="value")
    assert {of: cross.loc[of, of] for of in LANGUAGES} == pytest.approx(own, rel=1e-6)
    assert cross["full"].to_dict() == pytest.approx(full, rel=1e-6)
    advantage = tables["cross-dynamic_languages"].set_index("language")["advantage"]
    others = {of: np.mean([cross.loc[of, other] for other in LANGUAGES if other != of]) for of in LANGUAGES}
    assert advantage.to_dict() == pytest.approx({of: sign * (own[of] - others[of]) for of in LANGUAGES}, abs=1e-4)

    lesion = tables["specificity-dynamic_seeds"].pivot(index="language", columns="subnetwork", values="score")
    assert lesion["nothing"].to_dict() == pytest.approx(full, rel=1e-6)
    loss = tables["specificity-dynamic"].set_index(["language", "off"])["loss"]
    for of in LANGUAGES:
        assert loss[of, "random"] == pytest.approx(sign * (lesion.loc[of, "nothing"] - lesion.loc[of, "random"]))

    gain = tables["effect"].set_index("language")["difference"].to_dict()
    theirs = scores_of(runs["full"], "full")
    assert gain == pytest.approx({of: sign * (own[of] - theirs[of]) for of in LANGUAGES})
    assert len(tables["ablation-dynamic"]) == len(LANGUAGES) * 2 * 2  # two layers of two heads
    assert np.isfinite(tables["ablation-dynamic"][["change", "worth", "score"]]).all(axis=None)
    examples = tables["conflict-dynamic_languages"].set_index("language")["examples"]
    assert set(examples) == {SIZES["train"]}
    cosines = tables["conflict-dynamic"].query("scope != 'shared'")["cosine"]  # some languages may share nothing
    assert (cosines.abs() <= 1).all()


def compared(name: str, place: Path, folder: Path, train: str, unseen: str, **changes: Any) -> Plan:
    """A comparison of `full` and `static`, done."""
    config = config_of(name, place, folder / "run", steps=4, discover_at=0.5, checkpoint_every=0, **changes)
    own = ("data", "languages", "out")
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in RESERVED and k not in own}
    asked = {"train": train, "unseen": unseen, "seeds": 1, "shots": 3, "choose": "best", "support_sets": 1}
    arms = {"full": {"method": "full"}, "static": {}}
    plan = Plan(folder / "compare", str(place / "data"), CompareConfig(**asked, adapt_steps=1), training, arms)
    plan.open()
    for job in plan.jobs:
        do(plan, job)
    write_report(plan)
    return plan


@pytest.mark.parametrize("name", TASKS)
def test_analyses_of_a_comparison(name: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without trees, and with languages that nobody knows, there is no typology: a line for each measure says so."""
    plan = compared(name, tiny(name), tmp_path, "aa", "bb,cc,dd")
    said = output_of(capsys, "analyze", plan.out, "--what", "effect,typology,overlap,use,cross,specificity,conflict")
    alone = "there is one language, whose subnetwork can be exchanged with no other"
    conflict = "gradients conflict between two languages or more, and there is aa"
    kept = "a cell of a comparison keeps no checkpoint: `fastmask train --keep-checkpoints 0` keeps all"
    assert skipped(said) == {
        "overlap (static): there is one language and one seed, and nothing to overlap with",
        "use (static): there is one language, which shares its units with nobody",
        f"conflict (full): {conflict}",
        f"conflict (static): {conflict}",
        f"conflict (along checkpoints): {kept}",
        f"cross: {alone}",
        f"specificity: {alone}",
        "typology (by head direction): no example of aa, bb, cc, dd has a tree whose dependents could be counted",
        "typology (by URIEL): URIEL has no language 'bb' (expected ISO 639 codes it has)",
    }
    text = (plan.out / "analysis" / "report.html").read_text(encoding="utf-8")
    assert "no example of aa, bb, cc, dd has a tree" in re.sub(r"<[^>]+>", "", text)


@pytest.mark.slow
def test_typology_of_tags_in_treebanks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tagging on treebanks has trees to tell by which languages are near."""
    write_treebanks(tmp_path / "data", sentences={"train": 12, "dev": 2, "test": 6})
    tiny_encoder(tmp_path / "model", "".join(path.read_text() for path in (tmp_path / "data").glob("UD_*/*.conllu")))
    plan = compared("tagging", tmp_path, tmp_path, "qaa,qab", "qad,qag,qah")
    said = output_of(capsys, "analyze", plan.out, "--what", "typology")
    assert {line.partition(":")[0] for line in skipped(said)} == {"typology (by URIEL)"}
    table = pd.read_csv(plan.out / "analysis" / "typology-static-head-direction.csv")
    assert set(table["language"]) == {"qad", "qag", "qah"}
    assert table["similarity"].between(0, 1).all()
    assert set(table["nearest"]) <= {"qaa", "qab"}
