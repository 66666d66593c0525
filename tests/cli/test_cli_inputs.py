"""What a command reads must be there: what is missing is said before anything is loaded, in one way everywhere."""

from __future__ import annotations

import os

import pytest
from options_page import parser_of
from typed_command import failure_of

from fastmask.cli import COMMANDS
from fastmask.cli.options import DATA, FILE, RUN, Input

# The folder is neither a run nor data, and the file holds nothing: whatever was loaded would complain of these.
MISSING = [
    ("train", "--config", "--config {missing} --data {folder} --out {out}"),
    ("train", "--data", "--data {missing} --out {out}"),
    ("train", "--masks", "--masks {missing} --data {folder} --out {out}"),
    ("train", "--model", "--model {missing} --data {folder} --out {out}"),
    ("discover", "RUN", "{folder} {missing} --masks {out}"),
    ("discover", "--data", "{folder} --data {missing} --masks {out}"),
    ("evaluate", "RUN", "{missing} --json {out}"),
    ("evaluate", "--data", "{folder} --data {missing} --json {out}"),
    ("predict", "RUN", "{missing} {file} {out}"),
    ("predict", "INPUT", "{folder} {missing} {out}"),
    ("compare", "--data", "--data {missing} --train en --unseen fo --out {out}"),
    ("compare", "--plan", "--plan {missing} --data {folder} --out {out}"),
    ("compare", "--known", "--known {missing} --data {folder} --out {out}"),
    ("compare", "--model", "--model {missing} --data {folder} --train en --unseen fo --out {out}"),
    ("adapt", "RUN", "{missing} --language fo --out {out}"),
    ("adapt", "--support", "{folder} --support {missing} --language fo --out {out}"),
    ("adapt", "--test", "{folder} --test {missing} --language fo --out {out}"),
    ("adapt", "--data", "{folder} --data {missing} --language fo --out {out}"),
    ("analyze", "RUN", "{folder} {missing} --out {out}"),
    ("analyze", "--data", "{folder} --data {missing} --out {out}"),
    ("masks", "FILE", "{missing}"),
]


@pytest.fixture
def places(tmp_path):
    """Name -> path, of what is there and what is not."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "fo-test.conllu").touch()
    names = {"folder": "folder", "file": "fo-test.conllu", "missing": "fo-test.conlu", "out": "out"}
    return {name: str(tmp_path / of) for name, of in names.items()}


@pytest.mark.parametrize(("command", "option", "arguments"), MISSING)
def test_what_is_missing(command, option, arguments, places, capsys):
    """The message says which option, what was given and what may have been meant, and nothing is written."""
    said = failure_of(capsys, command, *arguments.format(**places).split())
    assert said.startswith(f"fastmask {command}: error: {option} is {places['missing']}: there is no such ")
    assert " (expected " in said
    assert said.endswith(f"; did you mean {places['file']}?")
    assert not os.path.exists(places["out"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_input_is_tested(command):
    """An option that is an `Input` stands among the cases above."""
    actions = parser_of(command)._actions
    inputs = {(action.option_strings or [action.metavar])[0] for action in actions if isinstance(action.type, Input)}
    assert inputs == {option for name, option, _ in MISSING if name == command}


def test_a_folder_for_a_file_and_a_file_for_a_folder(places, capsys):
    """Either is refused by name."""
    said = failure_of(capsys, "predict", places["folder"], places["folder"], places["out"])
    assert said.endswith(f"INPUT is {places['folder']}: that is a folder (expected a file)")
    said = failure_of(capsys, "evaluate", places["file"])
    assert said.endswith(f"RUN is {places['file']}: that is a file (expected the folder of a finished run)")


def test_what_may_not_be_read(places, monkeypatch):
    """A file that its owner has closed is refused by name, too."""
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o444))  # root may read all
    FILE.check("--support", places["file"])
    os.chmod(places["file"], 0)
    with pytest.raises(ValueError, match=r"--support is .*fo-test\.conllu: you may not read it"):
        FILE.check("--support", places["file"])


def test_what_was_meant(tmp_path, monkeypatch):
    """The nearest name is looked for in the first folder on the way that is there; nothing is near to some names."""
    (tmp_path / "UD" / "UD_English-EWT").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"; did you mean UD/UD_English-EWT\?$"):
        FILE.check("--support", "UD/UD_Englsh-EWT/en.conllu")
    with pytest.raises(FileNotFoundError, match=r"\(expected the folder of a finished run\)$"):
        RUN.check("RUN", "runs/static")


def test_names_on_the_hub():
    """Data may be a name on the Hub, which is looked up later; a path cannot be one."""
    for name in ("glue", "facebook/xnli"):
        DATA.check("--data", name)
    for path in ("./glue", "/facebook/xnli", "data/facebook/xnli", "~/glue"):
        with pytest.raises(FileNotFoundError, match="there is no such folder or file"):
            DATA.check("--data", path)
