"""What is in `examples/` runs as it stands; `test_docs` runs what pages show."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_script

import fastmask as fm
from fastmask.cli import main
from fastmask.tasks.data.synthetic import write_treebanks
from tests.compare.tiny_encoder import tiny_encoder

ROOT = Path(__file__).resolve().parent.parent


ON_DATA = ("plain_loop.py", "trainer.py")
ELSEWHERE = ("own_task.py", "sparse_language.py")
ALONE = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in (*ON_DATA, *ELSEWHERE))


@pytest.mark.parametrize("name", ALONE)
def test_examples_run(name, tmp_path):
    """Every example script runs."""
    run_script(ROOT / "examples" / name, tmp_path)


@pytest.mark.parametrize("name", ON_DATA)
def test_examples_on_data_run(name, tmp_path):
    """An example on small treebanks and a tiny encoder ends as on real ones, with the masks of an unseen language."""
    write_treebanks(tmp_path / "ud", sentences={"train": 12, "dev": 2, "test": 24})
    text = "".join(path.read_text() for path in (tmp_path / "ud").glob("UD_*/*.conllu"))
    tiny_encoder(tmp_path / "encoder", text)
    options = ["--languages", "qaa,qac", "--unseen", "qad", "--steps", "4", "--out", "saved"]
    run_script(ROOT / "examples" / name, tmp_path, str(tmp_path / "ud"), str(tmp_path / "encoder"), *options)
    saved = fm.Subnetworks.load(tmp_path / "saved")
    assert saved.languages == ("qaa", "qac", "qad")
    assert any(saved.select(["qad"]).rename({"qad": name}) == saved.select([name]) for name in ("qaa", "qac"))
    assert fm.from_pretrained(tmp_path / "saved").config.num_labels > 1


def test_a_language_more_by_changing_little(tmp_path):
    """Every way to adapt a finished run ends with scores, and changes fewer bytes than all parameters."""
    write_treebanks(tmp_path / "ud", sentences={"train": 12, "dev": 2, "test": 6})
    common = ["--method", "full", "--steps", "4", "--eval-every", "0", "--threads", "1"]
    assert (
        main(["train", "--data", str(tmp_path / "ud"), "--languages", "qaa", *common, "--out", str(tmp_path / "run")])
        == 0
    )
    options = ["--languages", "qad", "--sentences", "6", "--steps", "2", "--seeds", "1", "--test", "4"]
    run_script(
        ROOT / "examples" / "sparse_language.py", tmp_path, str(tmp_path / "run"), str(tmp_path / "ud"), *options
    )
    rows = list(csv.DictReader((tmp_path / "sparse.csv").open()))
    size = {row["way"]: int(row["bytes"]) for row in rows}
    assert list(size) == ["none", "all", "weights", "units", "random", "norms", "lora"]
    assert size["none"] == 0 < size["norms"] < size["weights"] < size["all"]
    assert size["norms"] < size["units"] == size["random"] < size["all"]
    assert 0.5 < size["lora"] / (0.05 * 4 * 4 * (4 * 256**2 + 2 * 256 * 1024)) < 1.5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--sentences", "6,13"], "qad has 12 training sentences (expected 13 or more)"),
        (["--sentences", "6", "--ways", "bias"], "there is no way called bias (expected some of none, all, "),
        (["--sentences", "6", "--rates", "lor=1"], "there is no way called lor (expected some of none, all, "),
    ],
)
def test_a_language_more_needs_what_it_is_asked_for(tmp_path, options, error):
    """Too few sentences, and ways that do not exist, are said before anything is read of the run."""
    write_treebanks(tmp_path / "ud", sentences={"train": 12, "dev": 2, "test": 6})
    command = [sys.executable, ROOT / "examples" / "sparse_language.py", tmp_path / "no-run", tmp_path / "ud"]
    done = subprocess.run([*command, "--languages", "qad", *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert error in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tagger", "sparse_decoder"])
def test_notebooks_run(name, tmp_path, monkeypatch):
    """The cells of a notebook run from top to bottom, here on artificial treebanks and a tiny encoder."""
    write_treebanks(tmp_path / "ud", sentences={"train": 4, "dev": 2, "test": 2})
    text = "".join(path.read_text() for path in (tmp_path / "ud").glob("UD_*/*.conllu"))
    tiny_encoder(tmp_path / "encoder", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTMASK_UD_DIR", raising=False)
    monkeypatch.setenv("FASTMASK_ENCODER", str(tmp_path / "encoder"))
    monkeypatch.setenv("FASTMASK_STEPS", "4")
    notebook = json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text())
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
