"""The files of a report in a folder that somebody else may have made."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from fastmask.files import FileError
from fastmask.reports.folders import studies_of
from fastmask.reports.loading import task_at
from fastmask.reports.making import make_report
from fastmask.reports.sections import Options
from fastmask.reports.writing import check_folder, write_files
from fastmask.training import checkpoints


@pytest.fixture
def folder(tmp_path):
    """A folder with a report, and a file outside it."""
    (tmp_path / "precious").write_text("old")
    write_files(tmp_path / "report", {"report.html": b"page", "a.csv": b"1"})
    return tmp_path / "report"


@pytest.mark.parametrize("name", ["report.html", "a.csv", "contents.json", "b.csv"])
def test_links_lead_nowhere(folder, name):
    """Links in the folder are replaced: what they lead to stays, whether it is there or not."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../precious")
    if name == "contents.json":
        (folder.parent / "precious").write_text("[]")
    before = (folder.parent / "precious").read_text()
    write_files(folder, {"report.html": b"new", "a.csv": b"2", "b.csv": b"3"})
    assert (folder.parent / "precious").read_text() == before
    assert not (folder / name).is_symlink()
    assert (folder / "report.html").read_bytes() == b"new"


def test_only_names_of_reports_are_deleted(folder):
    """A list of contents cannot have other files deleted, in the folder or outside it."""
    others = [".", "..", "", "../precious", str(folder.parent / "precious"), "config.yaml", ".bashrc", "sub/a.csv"]
    (folder / "config.yaml").touch()
    (folder / ".bashrc").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "a.csv").touch()
    (folder / "gone.csv").touch()
    (folder / "contents.json").write_text(json.dumps([*others, "gone.csv", "a.csv"]))
    write_files(folder, {"report.html": b"new"})
    assert sorted(os.listdir(folder)) == [".bashrc", "config.yaml", "contents.json", "report.html", "sub"]
    assert os.listdir(folder / "sub") == ["a.csv"]
    assert (folder.parent / "precious").read_text() == "old"


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", "3", '"a.csv"', "[" * 100_000, "\x00"])
def test_damaged_contents(folder, content):
    """A damaged list of contents is an error that names it, before anything is computed or written."""
    (folder / "contents.json").write_text(content)
    before = sorted(os.listdir(folder))
    with pytest.raises(FileError, match=r"contents\.json: "):
        check_folder(folder)
    with pytest.raises(FileError, match=r"contents\.json: "):
        write_files(folder, {"report.html": b"new"})
    assert sorted(os.listdir(folder)) == before
    assert (folder / "report.html").read_bytes() == b"page"


def test_the_report_of_a_run_stays_in_it(small_run, tmp_path):
    """A run whose folder of the report is a link elsewhere is refused, unless the user names the place."""
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "analysis").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="analysis is a link"):
        make_report([tmp_path / "run"], ["overlap"])
    assert os.listdir(tmp_path / "elsewhere") == []


def test_weights_of_a_checkpoint(small_run, tmp_path):
    """Damaged weights, or those of another model, are an error that names the file."""
    checkpoint = tmp_path / "step-00000006"
    ((run,),) = (study.runs for study in studies_of([small_run]))
    shutil.copytree(checkpoints.folder_of(small_run, 6), checkpoint)
    assert task_at(run, checkpoint, Options(device="cpu"))[1] is not None
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(FileError, match=r"model\.safetensors: is not a safetensors file, or is truncated"):
        task_at(run, checkpoint, Options(device="cpu"))
    shutil.copy(small_run / "model" / "parser.safetensors", weights)
    with pytest.raises(FileError, match=r"model\.safetensors: .*Missing key"):
        task_at(run, checkpoint, Options(device="cpu"))
