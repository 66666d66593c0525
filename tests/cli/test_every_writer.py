"""Everything that writes a file where the user says, whatever is there already."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pandas as pd
import pytest
from hang import no_hang
from typed_command import failure_of

import fastmask as fm
from benchmarks import row as benchmark_row
from fastmask.analysis import Result
from fastmask.cli import main
from fastmask.training.config import TrainConfig


def command(*arguments):
    """What runs a command on the target, raising what it complains of."""

    def write(run, target):
        where = {"RUN": run, "MASKS": run / "masks.safetensors", "TARGET": target, "TEST": treebank_of(run)}
        # A failure is raised, so that it looks like that of a function.
        assert main([str(where.get(argument, argument)) for argument in [*arguments, "--debug"]]) == 0

    return write


def treebank_of(run):
    return next((run.parent / "data").glob("UD_*/qac_toy-ud-test.conllu"))


def draw():
    from matplotlib.figure import Figure

    return Figure()


def save_result(run, target):
    assert target.suffix == ".csv"
    Result(target.stem, pd.DataFrame({"a": [1]}), "caption", draw).save(target.parent)


def masks_of(run):
    return fm.Subnetworks.load(run / "masks.safetensors")


FIND = ("--density", "0.5", "--score-sentences", "2", "--units", "heads")
COMMANDS = {
    "evaluate --json": ("evaluate", "RUN", "--json", "TARGET"),
    "discover --masks": ("discover", "RUN", *FIND, "--masks", "TARGET"),
    "predict": ("predict", "RUN", "TEST", "TARGET", "--language", "qac"),
}
WRITERS = {
    **{name: command(*arguments) for name, arguments in COMMANDS.items()},
    "Subnetworks.save": lambda run, target: masks_of(run).save(target),
    "TrainConfig.save": lambda run, target: TrainConfig().save(target),
    "Result.save": save_result,
    "benchmark rows": lambda run, target: benchmark_row.write(target, []),
}
NAMES = {"Result.save": "a.csv"}


@pytest.fixture(params=WRITERS)
def writer(request, small_run, tmp_path):
    """Write to a place in an empty folder; the place and what writes there."""
    (tmp_path / "in").mkdir()

    def write(target):
        with no_hang():
            WRITERS[request.param](small_run, Path(target))

    return tmp_path / "in" / NAMES.get(request.param, "a"), write


def names(folder):
    """What is in a folder, but for the pictures that stand beside a table."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.name not in ("a.png", "a.svg") or len(entry.name) < 2
    )


def test_a_new_file(writer):
    """The file is written, and nothing half written is left beside it."""
    target, write = writer
    write(target)
    assert target.is_file()
    assert not [entry for entry in target.parent.iterdir() if entry.name.startswith(".")]


def test_a_file_that_is_there(writer):
    """It is replaced, and keeps its permissions."""
    target, write = writer
    target.write_text("old")
    target.chmod(0o640)
    write(target)
    assert target.read_bytes() != b"old"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_a_link(writer, tmp_path, there):
    """The file that it leads to is replaced, or made, and the link stays."""
    target, write = writer
    if there:
        (tmp_path / "real").write_text("old")
    target.symlink_to(tmp_path / "real")
    write(target)
    assert target.is_symlink()
    assert (tmp_path / "real").is_file()
    assert (tmp_path / "real").read_bytes() not in (b"", b"old")


def test_a_fifo(writer):
    """Whoever reads at the other end gets what a file would get, and the FIFO is still one."""
    target, write = writer
    os.mkfifo(target)
    got = []
    reader = threading.Thread(target=lambda: got.append(target.read_bytes()), daemon=True)
    reader.start()
    write(target)
    reader.join(30)
    assert stat.S_ISFIFO(target.stat().st_mode)
    assert got
    assert len(got[0]) > 0


def test_a_device(writer):
    """A device like /dev/null is still a device."""
    target, write = writer
    try:
        os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        target.write_text("x")
    except PermissionError:
        pytest.skip("only root can make devices, and not everywhere")
    write(target)
    assert stat.S_ISCHR(target.stat().st_mode)


def test_a_folder(writer):
    """A folder of that name is an error that names it, and stays as it is."""
    target, write = writer
    (target / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as error:
        write(target)
    assert str(target) in str(error.value)
    assert names(target) == ["inside"]


def test_in_a_folder_that_is_not_there(writer):
    """It is made."""
    target, write = writer
    write(target.parent / "new" / "folder" / target.name)
    assert (target.parent / "new" / "folder" / target.name).is_file()


def test_under_a_file(writer):
    """A file cannot be a folder: an error that names the place, and the file stays as it is."""
    target, write = writer
    (target.parent / "file").write_text("old")
    with pytest.raises((NotADirectoryError, FileExistsError)) as error:
        write(target.parent / "file" / target.name)
    assert str(target.parent / "file") in str(error.value)
    assert (target.parent / "file").read_text() == "old"


@pytest.mark.parametrize("name", COMMANDS)
class TestCommands:
    """What only commands do."""

    def arguments(self, name, run, target):
        where = {"RUN": run, "MASKS": run / "masks.safetensors", "TARGET": target, "TEST": treebank_of(run)}
        return [str(where.get(argument, argument)) for argument in COMMANDS[name]]

    @pytest.mark.parametrize("place", ["folder", "file/a", "folder/"])
    def test_the_place_is_looked_at_first(self, name, place, small_run, capsys, tmp_path):
        """An error is one line, and comes before the work and what it prints."""
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        failed = failure_of(capsys, *self.arguments(name, small_run, f"{tmp_path}/{place}"))
        assert str(tmp_path / place) in failed
        assert names(tmp_path) == ["file", "folder"]

    def test_standard_output(self, name, small_run, tmp_path, capfdbinary, monkeypatch):
        """``-``: the file goes to standard output, alone and whole."""
        assert main(self.arguments(name, small_run, tmp_path / "file")) == 0
        expected = (tmp_path / "file").read_bytes()
        capfdbinary.readouterr()
        monkeypatch.chdir(tmp_path)  # a file of the name "-" would be here
        assert main(self.arguments(name, small_run, "-")) == 0
        printed = capfdbinary.readouterr().out
        assert names(tmp_path) == ["file"]
        if name == "evaluate --json":  # it holds the time it took
            assert printed.startswith(b"[\n")
            assert printed.endswith(b"]")
            assert printed.count(b"\n") == expected.count(b"\n")
        elif name == "discover --masks":  # the order of its header is that of safetensors
            (tmp_path / "printed").write_bytes(printed)
            assert fm.Subnetworks.load(tmp_path / "printed") == fm.Subnetworks.load(tmp_path / "file")
        else:
            assert printed == expected
