"""Settings with something wrong in them: what is read is what the file says, by another reader's account."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import yaml
from mutations import mutants
from verdicts import Verdicts

from fastmask.compare.plan import CompareConfig, Plan
from fastmask.tasks.parsing.task import ParsingSettings
from fastmask.training.config import TrainConfig


def said(kind, text):
    """Name -> value of every setting, from PyYAML's own readers: the texts as written, and what they stand for."""
    texts, values = yaml.load(text, yaml.BaseLoader) or {}, yaml.safe_load(text) or {}
    hints, found = get_type_hints(kind), {item.name: item.default for item in dataclasses.fields(kind)}
    if kind is TrainConfig:  # settings of the task stand whole in a run's
        given, written = values.pop("task_options", None) or {}, texts.get("task_options")
        options = {name: meant(str, value, written[name]) for name, value in given.items()}
        found["task_options"] = dataclasses.asdict(ParsingSettings()) | options
    for name, value in values.items():
        type_ = next((of for of in get_args(hints[name]) if of is not type(None)), hints[name])
        found[name] = meant(type_, value, texts[name])
    return found


def meant(type_: Any, value: Any, text: Any) -> Any:
    """What is meant by a value where a setting of this type is expected."""
    if value is None:
        return None
    if type_ is float:
        return float(text)
    if type_ is str and isinstance(text, list):
        return ",".join("no" if item is False else item for item in value)
    if type_ is str:
        return "no" if value is False else text
    return value


CONFIG = """\
# settings of a run
data: /data/ud
languages: [qaa, 'no', qac]
method: dynamic
out: runs/2024-01-05
model: small
density: 0.5
steps: 300
lr: 3e-4
encoder_lr: 1.0e-05
resume: false
tensorboard: true
threads:
precision: no
"""


def test_training_settings(count, tmp_path):
    """1,000 damaged files: an error that names the file, or what the file says."""
    path, verdicts = tmp_path / "config.yaml", Verdicts()
    TrainConfig(data="/data/ud", languages="qaa,no", masks="a b.safetensors", lr=1e-5).save(path)
    written = path.read_bytes()
    for part, original in (("by hand", CONFIG.encode()), ("as saved", written)):
        for what, content in mutants(original, "yaml", count // 2, part):
            path.write_bytes(content)
            verdicts.reading(
                f"{part} {what}",
                lambda: dataclasses.asdict(TrainConfig.load(path)),
                lambda text=content: said(TrainConfig, text.decode("utf-8-sig")),
                path,
            )
    verdicts.check(least=count // 4)


def test_settings_of_a_comparison(count, tmp_path):
    """The same of ``compare.yaml``, which `fastmask compare` and `fastmask analyze` read."""
    plan = Plan(tmp_path, "data", CompareConfig(train="qaa,qab", unseen="qac"), {"steps": 70, "lr": 1e-5}, {"full": {}})
    plan.open()
    path, verdicts = tmp_path / "compare.yaml", Verdicts()
    original = path.read_bytes()

    def expected(text):
        values = yaml.safe_load(text)
        config = said(CompareConfig, yaml.safe_dump(values["comparison"]).encode())
        defaults = {"question": "", "date": "", "hypotheses": {}, "zone": 0.0}
        return {**defaults, **values, "comparison": config}

    for what, content in mutants(original, "yaml", count, "comparison"):
        path.write_bytes(content)
        verdicts.reading(
            what,
            lambda: Plan.stored(tmp_path).settings,
            lambda text=content: expected(text.decode("utf-8-sig")),
            path,
        )
    verdicts.check(least=count // 4)
