"""Runs with something wrong in one of their files: refused with its name, or they answer as before."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch
from finished_run import load_small, small_config, small_task
from mutations import mutants
from typed_command import errors_of
from verdicts import Verdicts

from fastmask.cli import main
from fastmask.files import read_tensors
from fastmask.training.loop import train
from fastmask.training.metrics import MetricsLog

KIND = {".json": "json", ".jsonl": "json", ".yaml": "yaml", ".safetensors": "safetensors"}


def files_of(folder):
    """Every file of a run that is not of its analyses or checkpoints, the larger kinds no more often than others."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parts[0] not in ("checkpoints", "tensorboard", "data")]
    return sorted(path for path in kept if path.name not in (".lock", ".holder"))


class Commands:
    """The commands that read a finished run, and what each of them leaves."""

    def __init__(self, run, data, out):
        self.run, self.data, self.out = run, data, out

    def called(self, *arguments):
        """Run a command; what it printed, or a ValueError with its error."""
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main([str(argument) for argument in arguments])
        if code != 0:
            assert code == 1
            raise ValueError("\n".join(errors_of(errors.getvalue())))
        return printed.getvalue()

    def evaluate(self):
        self.called("evaluate", self.run, "--json", self.out / "scores.json")
        rows = json.loads((self.out / "scores.json").read_text())
        return [{name: value for name, value in row.items() if "per_second" not in name} for row in rows]

    def predict(self):
        source = next(self.data.glob("UD_*/qac_toy-ud-test.conllu"))
        self.called("predict", self.run, source, self.out / "out.conllu", "--language", "qac")
        return (self.out / "out.conllu").read_bytes()

    def masks(self):
        return self.called("masks", self.run / "masks.safetensors")

    def adapt(self):
        support, new = next(self.data.glob("UD_*/qaf_toy-ud-train.conllu")), self.out / "new"
        shutil.rmtree(new, ignore_errors=True)
        options = ["--language", "qaf", "--support", support, "--sentences", 4, "--steps", 1, "--choose", "union"]
        self.called("adapt", self.run, *options, "--out", new)
        record = json.loads((new / "results.json").read_text())
        model = {path.name: read_tensors(path)[0] for path in sorted((new / "model").rglob("*.safetensors"))}
        sums = {name: [float(t.double().abs().sum()) for t in tensors.values()] for name, tensors in model.items()}
        return record["adaptations"], sums


@pytest.fixture(scope="module")
def adapted_run(small_run, small_data, tmp_path_factory):
    """A run that was adapted once: it has every file that a finished run can have."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    support = next(small_data.glob("UD_*/qad_toy-ud-train.conllu"))
    options = ["--language", "qad", "--support", support, "--steps", "1", "--choose", "union", "--out", out]
    assert main(["adapt", str(small_run), *map(str, options)]) == 0
    return out


def test_finished_runs(count, adapted_run, small_data, tmp_path):
    """1,000 damaged runs, each file in turn, through evaluate, predict, masks and adapt."""
    run, verdicts = tmp_path / "run", Verdicts()
    shutil.copytree(adapted_run, run)
    commands = Commands(run, small_data, tmp_path)
    readers = [commands.evaluate, commands.predict, commands.adapt]
    expected = {read.__name__: read() for read in [*readers, commands.masks]}
    files = files_of(run)
    each = -(-count // len(files))
    for file in files:
        original = (run / file).read_bytes()
        mine = [*readers, commands.masks] if file.name == "masks.safetensors" else readers
        for number, (what, content) in enumerate(mutants(original, KIND.get(file.suffix, "bytes"), each, file)):
            read = mine[number % len(mine)]
            (run / file).write_bytes(content)
            verdicts.reading(f"{file} {what} {read.__name__}", read, lambda of=read: expected[of.__name__], file.name)
        (run / file).write_bytes(original)
    verdicts.check(least=count // 8)


test_finished_runs.few = 40


# ---- checkpoints


class Stopped(BaseException):
    """What a signal would do."""


@pytest.fixture(scope="module")
def stopped_run(small_data, tmp_path_factory):
    """A dynamic run that was stopped after step 5, with checkpoints of steps 3 and 4; and how it ends unbroken."""
    folder = tmp_path_factory.mktemp("stopped")
    changes = {"method": "dynamic", "update_every": 1, "update_sentences": 2, "keep_checkpoints": 0}
    datasets = load_small(small_data)

    def go(out, **more):
        config = small_config(out, small_data, **changes, **more)
        return train(small_task(datasets), datasets, config, progress=False)

    expected = outcome(go(folder / "unbroken"))
    add = MetricsLog.add

    def stop(log, record):
        if record["step"] == 5:
            raise Stopped
        return add(log, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "add", stop)
        with pytest.raises(Stopped):
            go(folder / "run")
    return folder / "run", go, expected


def outcome(result):
    """Weights and masks at the end of a run, and its records without their speed."""
    weights = {name: tensor.clone() for name, tensor in result.task.model.state_dict().items()}
    records = [{k: v for k, v in record.items() if "per_second" not in k} for record in result.history]
    return Outcome(weights, result.subnetworks, records)


class Outcome:
    """How a run ended."""

    def __init__(self, weights, subnetworks, records):
        self.weights, self.subnetworks, self.records = weights, subnetworks, records

    def __eq__(self, other):
        return (
            self.subnetworks == other.subnetworks
            and self.records == other.records
            and all(torch.equal(weight, other.weights[name]) for name, weight in self.weights.items())
        )

    __hash__ = None


def test_checkpoints(count, stopped_run, tmp_path):
    """1,000 runs with a damaged file, resumed: they end as the unbroken one does, or name the file or checkpoint."""
    source, go, expected = stopped_run
    run, verdicts = tmp_path / "run", Verdicts()
    kept = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    newest = [path for path in kept if path.parts[0] == "checkpoints" and path.parts[1].endswith("4")]
    others = [path for path in kept if path.parts[0] != "checkpoints" and path.suffix in (".yaml", ".safetensors")]
    files = sorted([*newest, *others])
    assert len(newest) > 3
    each = -(-count // len(files))
    for file in files:
        original = (source / file).read_bytes()
        for what, content in mutants(original, KIND.get(file.suffix, "bytes"), each, file):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(source, run)
            (run / file).write_bytes(content)
            name = file.parts[1] if file.parts[0] == "checkpoints" else file.name
            verdicts.reading(f"{file} {what}", lambda: outcome(go(run, resume=True)), lambda: expected, name)
    verdicts.check(least=0)


test_checkpoints.few = 20


def test_a_stopped_run_goes_on(stopped_run, tmp_path):
    """What the tests above compare with: an undamaged run ends as if it had never been stopped."""
    source, go, expected = stopped_run
    shutil.copytree(source, tmp_path / "run")
    assert outcome(go(tmp_path / "run", resume=True)) == expected
