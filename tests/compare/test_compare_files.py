"""The files of a comparison's folder: checked when they are read, and written nowhere else."""

from __future__ import annotations

import pytest
from hang import no_hang

from fastmask.compare.plan import CompareConfig, Plan, write_result
from fastmask.compare.report import load_results
from fastmask.files import FileError

SCORE = {
    "language": "qaa", "condition": "seen", "choice": "own", "subnetwork": "qaa", "support_set": None, "steps": 0,
    "score": 50.0, "scores": {"las": 50.0, "uas": 60.0}, "words": 9,
}  # fmt: skip
RESULT = {
    "seconds": 1.0, "resumed": False, "training_seconds": 1.0, "scoring_seconds": 1, "outer_steps": 4,
    "gradient_passes": 4, "sentences": 8, "words_per_second": 10.5,
    "density": {"heads": 0.5}, "scores": [SCORE], "day": "2026-01-31", "made_by": "a test",
}  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    """A comparison of one cell, opened."""
    config = CompareConfig(train="qaa,qab", unseen="qad", seeds=1)
    plan = Plan(tmp_path / "out", "data", config, {"steps": 70, "lr": 1e-5}, {"full": {"method": "full"}})
    plan.open()
    return plan


def test_settings_come_back(plan):
    """What was opened is what is stored, and opens again."""
    assert Plan.stored(plan.out, "data") == plan
    plan.open()


def test_other_data(plan):
    """Cells of other data would be another comparison's: what was read when it was begun must be there still."""
    plan.open({"training data of qaa": "1", "test data of qaa": "2"})
    plan.open({"training data of qaa": "1", "test data of qaa": "2"})
    with pytest.raises(ValueError, match="begun with other data: test data of qaa changed since"):
        plan.open({"training data of qaa": "1", "test data of qaa": "3"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "comparison: Field required"),
        ("comparison: {}", "training: Field required"),
        ("comparison: {}\ntraining: {}", "arms: Field required"),
        ("comparison: {}\ntraining: {}\narms: {}", "arms is empty"),
        ("comparison: {}\ntraining: {}\narms: {a: {}}\nmore: 1", "more: Extra inputs"),
        ("comparison: {}\ntraining: {}\narms: {a/b: {}}", "an arm is called 'a/b'"),
        ("comparison: {}\ntraining: {}\narms: {start: {}}", "an arm is called 'start'"),
        ("comparison: {}\ntraining: {}\narms: {a: {seed: 1}}", "arm a: seed is a setting of single runs"),
        ("comparison: {}\ntraining: {}\narms: {a: {task: lm}}", "arm a: task must be the same"),
        ("comparison: {}\ntraining: {}\narms: {a: {densty: 0.5}}", "arm a: unknown setting 'densty'"),
        ("comparison: {}\ntraining: {}\narms: {a: {}}\ndate: today", "date: String should match"),
        (
            "comparison: {}\ntraining: {}\narms: {a: {}}\nhypotheses: {H: {arm: a, over: b, condition: seen}}",
            "hypothesis H: unknown arm 'b'",
        ),
        (
            "comparison: {}\ntraining: {}\narms: {a: {}}\nhypotheses: {H: {arm: a, over: a, condition: some}}",
            "hypotheses.H.condition: Input should be",
        ),
        ("comparison: []\ntraining: {}", "comparison: Input should be a valid dictionary"),
        ("comparison: {seeds: three}\ntraining: {}\narms: {a: {}}", "seeds is 'three' (expected a whole number)"),
        ("comparison: {seeds: 1000000000}\ntraining: {}\narms: {a: {}}", "seeds is 1000000000"),
        ("comparison: {seed: 3}\ntraining: {}\narms: {a: {}}", "unknown setting 'seed'"),
        ("comparison: {}\ntraining: {seed: 3}\narms: {a: {}}", "seed is a setting of single runs"),
        ("comparison: {}\ntraining: {stepz: 3}\narms: {a: {}}", "unknown setting 'stepz'"),
        ("comparison: {}\ntraining: {steps: 1.5}\narms: {a: {}}", "steps is 1.5 (expected a whole number)"),
    ],
)
def test_damaged_settings(plan, text, problem):
    """Every error of a stored comparison names its file, on opening it again, too."""
    file = plan.out / "compare.yaml"
    file.write_text(text)
    for read in (lambda: Plan.stored(plan.out), plan.open):
        with pytest.raises(ValueError if "unknown setting" not in problem else KeyError) as error, no_hang():
            read()
        assert str(error.value).startswith(f"{file}:")
        assert problem in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_results_that_are_no_record(plan, content):
    cell = plan.cells[0]
    write_result(plan, cell, RESULT)
    (plan.folder(cell) / "result.json").write_text(content)
    with pytest.raises(FileError, match=r"result\.json: "), no_hang():
        load_results(plan)
