"""The files that a report reads and writes."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from fastmask.files import FileError
from fastmask.reports import Options, _replace_files
from fastmask.reports.runs import studies_of, task_at
from fastmask.training import run_folder


def test_files_of_the_report_before_are_removed(tmp_path):
    """Of a folder with a report only what the report left is replaced or removed, and nothing outside it."""
    (tmp_path / "precious").write_text("old")
    folder = tmp_path / "report"
    _replace_files(folder, {"report.html": b"page", "a.csv": b"1"})
    (folder / "notes.txt").touch()
    (folder / "contents.json").write_text(json.dumps(["../precious", "a.csv", "report.html"]))
    _replace_files(folder, {"report.html": b"new", "b.csv": b"2"})
    assert sorted(os.listdir(folder)) == ["b.csv", "contents.json", "notes.txt", "report.html"]
    assert (folder / "report.html").read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "old"


def test_weights_of_a_checkpoint(small_run, tmp_path):
    """Damaged weights, or those of another model, are an error that names the file."""
    checkpoint = tmp_path / "step-00000006"
    ((run,),) = (study.runs for study in studies_of([small_run]))
    shutil.copytree(run_folder.folder_of(small_run, 6), checkpoint)
    assert task_at(run, checkpoint, Options(device="cpu"))[1] is not None
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(FileError, match=r"model\.safetensors: is not a safetensors file, or is truncated"):
        task_at(run, checkpoint, Options(device="cpu"))
    shutil.copy(small_run / "model" / "parser.safetensors", weights)
    with pytest.raises(RuntimeError, match="Missing key"):
        task_at(run, checkpoint, Options(device="cpu"))
