"""What must hold of every task: all methods train it, all commands work on it, and nothing depends on the batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from covering import covering
from tiny_tasks import CASES, LABELS, LANGUAGES, SIZES, UNSEEN, config_of, rows_of, write_rows
from typed_command import failure_of, output_of

import fastmask as fm
from fastmask.cli import main
from fastmask.compare.plan import RESERVED, CompareConfig, Plan, Runner, do
from fastmask.compare.report import write_report
from fastmask.tasks import task_class
from fastmask.tasks.task import Task
from fastmask.training.loop import TrainResult, train
from fastmask.training.run_folder import load_run

METHODS = [
    *((method, "none") for method in ("full", "static", "dynamic", "random", "shuffled", "shared")),
    ("static", "fomaml"),
    ("full", "reptile"),
]


def built(name: str, place: Path, out: Path, **changes: Any) -> tuple[Task, Any, Any]:
    """A new task, its data and its settings."""
    config = config_of(name, place, out, **changes)
    data = config.task_class.load(config.data, config.languages, config.task_settings)
    return config.task_class.build(config, data), data, config


def finished(name: str, place: Path, out: Path, **changes: Any) -> TrainResult:
    """A run."""
    return train(*built(name, place, out, **changes), progress=False)


def same_weights(first: Any, second: Any) -> None:
    """Every weight of two models is the same to the bit."""
    others = second.state_dict()
    assert others.keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, others[name]), name


def double(task: Task) -> Task:
    """The same in float64 and evaluation mode."""
    task.model.double().eval()
    return task


@pytest.mark.parametrize(
    ("name", "chosen"), covering(["tagging", "translation"], {"-".join(chosen): chosen for chosen in METHODS})
)
def test_every_method_trains_it(name, chosen, tiny, tmp_path):
    """Every method of the loop works for every kind of model, and gives scores."""
    method, meta = chosen
    result = finished(name, tiny(name), tmp_path / "run", method=method, meta=meta, checkpoint_every=0, discover_at=0.5)
    metric = result.task.metric
    assert metric in result.history[-1]["dev"]["aa"]
    assert (result.subnetworks is None) == (method == "full")
    assert load_run(tmp_path / "run").task.name == CASES[name].task


@pytest.mark.parametrize("name", ["tagging", "masked", "translation"])
def test_a_killed_run_ends_as_an_unbroken_one(name, tiny, tmp_path):
    """Masking, dropout and the order of examples depend on seed and step only; the saved model is the trained one."""
    whole = finished(name, tiny(name), tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(step: int) -> None:
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train(*built(name, tiny(name), tmp_path / "killed"), on_step=kill, progress=False)
    resumed = finished(name, tiny(name), tmp_path / "killed", resume=True)
    same_weights(whole.task.model, resumed.task.model)
    assert resumed.history[-1] == whole.history[-1]


@pytest.mark.parametrize("name", CASES)
def test_a_saved_task_is_the_same(name, tiny, tmp_path):
    """What was saved is what is opened, attached or not, and transformers can read the folder."""
    place = tiny(name)
    task = built(name, place, tmp_path / "run")[0]
    task.model.eval()
    fm.attach(task.encoder, fm.Subnetworks.random(task.encoder, LANGUAGES, 0.5, seed=1, units="both"))
    (tmp_path / "saved").mkdir()
    task.save(tmp_path / "saved")
    fm.detach(task.encoder)
    opened = type(task).open(tmp_path / "saved")
    same_weights(task.model, opened.model)
    rows = rows_of(CASES[name], "aa", "test")
    examples = task.examples(rows)
    assert opened.predict(opened.examples(rows)) == task.predict(examples)
    assert opened.digest(opened.examples(rows)) == task.digest(examples)
    assert opened.options == task.options
    auto = getattr(transformers, task.auto_class(str(place / "model"), task.options))
    same_weights(task.model, auto.from_pretrained(tmp_path / "saved"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("aa1")["input_ids"]


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_literal_one(name, tiny, tmp_path):
    """The mean loss and each example's own are what the logits say, in float64."""
    task = double(built(name, tiny(name), tmp_path / "run")[0])
    examples = task.training_examples(rows_of(CASES[name], "aa", "train"), "aa").select(list(range(5)))
    batch = task.collate(examples)
    with torch.no_grad():
        found, logits, labels = task.loss(batch), task.logits(batch), batch["labels"]
    if name == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    B = len(labels)
    each: list[list[float]] = [[] for _ in range(B)]
    for b in range(B):
        places = [()] if labels.ndim == 1 else [(t,) for t in range(labels.shape[1])]
        for place in places:
            label = int(labels[(b, *place)])
            if label != -100:
                scores = logits[(b, *place)].tolist()
                top = max(scores)
                total = sum(torch.tensor([s - top for s in scores], dtype=torch.float64).exp().tolist())
                each[b].append(-(scores[label] - top) + torch.tensor(total, dtype=torch.float64).log().item())
    every = [value for part in each for value in part]
    assert found.weight == len(every) > 0
    assert found.mean.item() == pytest.approx(sum(every) / len(every), rel=2e-6)  # logits are taken in float32
    assert found.each.tolist() == pytest.approx([sum(part) / len(part) for part in each], rel=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_is_its_languages_one_by_one(name, tiny, tmp_path):
    """Examples in a mixed batch give what they give alone, in their language and without padding."""
    task = double(built(name, tiny(name), tmp_path / "run")[0])
    fm.attach(task.encoder, fm.Subnetworks.random(task.encoder, LANGUAGES, 0.5, seed=1, units="both"))
    parts = [
        task.training_examples(rows_of(CASES[name], language, "train"), language).select([0, 1, 2])
        for language in LANGUAGES
    ]
    joined = type(parts[0]).join(parts).select([0, 3, 6, 1, 4, 7, 2, 5, 8])
    with torch.no_grad():
        mixed = task.loss(task.collate(joined, torch.tensor([0, 1, 2] * 3))).each
        for number, (language, part) in enumerate(zip(LANGUAGES, parts, strict=True)):
            with task.reading(language):
                alone = task.loss(task.collate(part)).each
            torch.testing.assert_close(mixed[number::3], alone, rtol=2e-6, atol=1e-7)
    with task.reading(None), torch.no_grad():
        assert not torch.allclose(task.loss(task.collate(parts[0])).each, mixed[::3], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["tagging", "pairs", "masked", "translation"])
def test_commands(name, tiny, tmp_path, capsys):
    """evaluate, predict, discover and adapt work on a run of the task."""
    place, case, run = tiny(name), CASES[name], tmp_path / "run"
    finished(name, place, run, checkpoint_every=0)
    cls = task_class(case.task)

    said = output_of(capsys, "evaluate", run, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [row["language"] for row in scores] == list(LANGUAGES)
    assert all(cls.metric in row["full"] and cls.metric in row["own"] for row in scores)
    assert "mean of 3" in said

    rows = [{k: v for k, v in row.items() if k not in LABELS} for row in rows_of(case, "aa", "test")]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert "6 " in output_of(capsys, "predict", run, source, tmp_path / "out.jsonl", "--language", "aa")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "prediction"} for line in lines] == rows
    loaded = load_run(run)
    with loaded.task.reading("aa"):
        assert [line["prediction"] for line in lines] == loaded.task.predict(loaded.task.examples(rows))

    masks = tmp_path / "masks.safetensors"
    output_of(capsys, "discover", run, "--density", "0.5", "--masks", masks, "--draws", "2")
    assert fm.Subnetworks.load(masks).languages == LANGUAGES

    support = write_rows(tmp_path / "support.jsonl", rows_of(case, UNSEEN, "train")[:5])
    adapted = tmp_path / "adapted"
    output_of(
        capsys, "adapt", run, "--language", UNSEEN, "--support", support, "--data", place / "data", "--steps", "2",
        "--choose", "best", "--out", adapted,
    )  # fmt: skip
    assert load_run(adapted).subnetworks.languages == (*LANGUAGES, UNSEEN)
    assert cls.open(adapted / "model").name == case.task
    if name == "tagging":
        _hostile(capsys, run, place, support, tmp_path)
    if name != "masked":
        blank = write_rows(tmp_path / "blank.jsonl", rows)
        given = ["--language", UNSEEN, "--support", blank, "--choose", "best", "--out", tmp_path / "none"]
        said = output_of(capsys, "adapt", run, *given, code=1)
        assert f"language {UNSEEN!r} has no support {cls.example_word} with labels" in said
        assert not (tmp_path / "none").exists()


def _hostile(capsys, run, place, support, tmp_path):
    """What else a person may give the commands."""
    case = CASES["tagging"]
    other = write_rows(
        tmp_path / "AA" / "test.jsonl", [{**row, "language": "AA"} for row in rows_of(case, "aa", "test")]
    )
    output_of(capsys, "evaluate", run, "--data", other, "--languages", "aa", "--json", tmp_path / "AA.json")
    (row,) = json.loads((tmp_path / "AA.json").read_text())
    assert row["own"] is not None  # under another name, too

    bad = write_rows(tmp_path / "bad.jsonl", [{"words": ["aa1"]}, {"words": None}])
    assert f"{bad}, row 2: " in output_of(capsys, "predict", run, bad, tmp_path / "no.jsonl", code=1)

    def adapt(*given, code=1):
        out = ["--out", tmp_path / "again"]
        return output_of(capsys, "adapt", run, "--language", UNSEEN, *given, *out, code=code)

    with_trees = tmp_path / "trees.conllu"
    with_trees.write_text("1\tdd1\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_\n2\tdd2\t_\tVERB\t_\t_\t0\troot\t_\t_\n\n")
    assert "has no trees to tell what is near" in adapt("--support", with_trees, "--similarity", "head-direction")
    given = ["--support", support, "--choose", "best"]
    assert "similarity is 'head-direction'" in adapt(*given, "--similarity", "head-direction")
    assert "lr is -1.0 (expected at least 0)" in adapt(*given, "--lr", "-1")
    assert "--lr needs support examples" in adapt("--choose", "union", "--lr", "0.1")
    mixed = write_rows(
        tmp_path / "mixed.jsonl", [row for of in ("aa", UNSEEN) for row in rows_of(case, of, "train")[:5]]
    )
    said = adapt("--support", mixed, "--test", place / "data" / "test.jsonl", "--choose", "best", code=0)
    assert f"on {SIZES['test']} sentences" in said
    record = json.loads((tmp_path / "again" / "results.json").read_text())["adaptations"][-1]
    assert len(record["sent_ids"]) == 5  # of its own language
    assert record["scores"][0]["examples"] == SIZES["test"]


@pytest.mark.parametrize(("name", "called"), [("masked", "perplexity"), ("spans", "F1")])
def test_compare(name, called, tiny, tmp_path):
    """Methods can be compared, by the task's own score; rules of choosing that it does not support are refused."""
    place = tiny(name)
    config = config_of(name, place, tmp_path / "run", steps=4, discover_at=0.5, checkpoint_every=0)
    own = ("data", "languages", "out")
    training = {k: v for k, v in dataclasses.asdict(config).items() if k not in RESERVED and k not in own}
    asked = {"train": "aa,bb", "unseen": UNSEEN, "seeds": 1, "shots": 3}
    arms = {"full": {"method": "full"}, "static": {}}
    asked |= {"support_sets": 1, "adapt_steps": 1}
    nearest = Plan(tmp_path / "nearest", str(place / "data"), CompareConfig(**asked), training, arms)
    with pytest.raises(ValueError, match="cannot tell which language is nearest"):
        Runner(nearest).check()
    plan = Plan(tmp_path / "compare", str(place / "data"), CompareConfig(**asked, choose="best"), training, arms)
    plan.open()
    Runner(plan).check()
    for job in plan.jobs:
        do(plan, job)
    write_report(plan)
    assert f"{called}, " in (plan.out / "summary.md").read_text()
    found = pd.read_csv(plan.out / "results.csv")
    assert set(found[found["condition"] == "adapted"]["language"]) == {UNSEEN}


@pytest.mark.parametrize("label", [None, "never seen"])
def test_splits_without_labels_are_left_out(label, tiny, tmp_path, capsys):
    """A language whose dev or test rows have no labels trains like any other, and is not scored."""
    place, data = tiny("classification"), tmp_path / "data"
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (place / "data" / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["label"] = label if split != "train" and row["language"] == "bb" else str(row["label"])
        write_rows(data / f"{split}.jsonl", rows)
    settings = config_of("classification", place, tmp_path / "run", data=str(data), tau=0.9, density=None, eval_every=3)
    settings.save(tmp_path / "settings.yaml")
    assert main(["train", "--config", str(tmp_path / "settings.yaml")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for split in ("dev", "test"):
        assert f"no {split} examples of bb have labels that the model knows: they are not scored" in said
    found = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert [row["language"] for row in found] == ["aa", "cc"]
    comparison = {"train": "aa,bb", "unseen": UNSEEN, "shots": 2, "test_sentences": 4}
    plan = Plan(tmp_path / "compare", str(data), CompareConfig(**comparison, seeds=1), {
        "task": "classification", "model": str(place / "model"), "steps": 2, "threads": 1,
    }, {"full": {"method": "full"}})  # fmt: skip
    plan.open()
    with pytest.raises(ValueError, match="no test examples of bb have labels"):
        Runner(plan).check()


def test_what_a_task_cannot_do_is_said_first(tiny, tmp_path, capsys):
    """A model that is none for the task, a missing column or an unknown language is refused before training."""
    place = tiny("classification")
    asked = ["train", "--task", "classification", "--out", tmp_path / "run", "--data", place / "data"]
    assert "only parsing has" in failure_of(capsys, *asked, "--languages", "aa")
    asked += ["--model", place / "model"]
    assert "unknown column 'txt'; did you mean 'text'" in failure_of(capsys, *asked, "--text-column", "txt")
    assert "unknown language 'ab'; did you mean" in failure_of(capsys, *asked, "--languages", "ab")
    assert "unknown column 'lang'; did you mean 'language'" in failure_of(capsys, *asked, "--language-column", "lang")
    assert not (tmp_path / "run").exists()
