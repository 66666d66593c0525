"""Writing into what is open already, and seeing before any work whether something can be written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from processes import piped, run_into

from fastmask.files import check_writable, descriptor_of, replace_file, write_text


def write_between(name: str) -> None:
    print("printed")
    write_text(name, "written\n")
    print("after")


# Links, and a folder that nothing can be put into: a fault must not cost the machine its /dev/stdout.
@pytest.mark.parametrize(
    ("name", "linked"),
    [("/proc/self/fd/1", False), ("/proc/self/fd/1", True), ("/dev/fd/1", True), ("/dev/stdout", True)],
)
def test_what_is_open_is_written_into_and_never_replaced(tmp_path: Path, name: str, linked: bool) -> None:
    """A shell's >> keeps what was in the file, in the order it was written, and a link to standard output stays one."""
    if linked:
        (tmp_path / "link").symlink_to(name)
        name = str(tmp_path / "link")
    target = tmp_path / "log"
    target.write_text("before\n")
    with open(target, "a") as file:
        inode = os.fstat(file.fileno()).st_ino
        run_into(file.fileno(), write_between, name)
    assert target.read_text() == "before\nprinted\nwritten\nafter\n"
    assert target.stat().st_ino == inode
    assert piped(write_between, name) == b"printed\nwritten\nafter\n"


def test_names_of_open_files(tmp_path: Path) -> None:
    """Only names and links of open files have a number, whatever is at the end of a link."""
    names = {"here": "/dev/stdout", "there": "here", "loop": "loop", "file": "x", "gone": "nowhere/x"}
    for name, target in names.items():
        (tmp_path / name).symlink_to(target)
    found = {name: descriptor_of(tmp_path / name) for name in names}
    assert found == {"here": 1, "there": 1, "loop": None, "file": None, "gone": None}
    assert [descriptor_of(name) for name in ("/dev/stdin", "/dev/stderr", "/dev/fd/63", "/dev/null")] == [
        0,
        2,
        63,
        None,
    ]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    """What only its owner may read must not become readable for all."""
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_error_of_what_is_read_is_not_one_of_what_is_written(tmp_path: Path) -> None:
    """The message must name the file that was at fault."""

    def write(path: Path) -> None:
        path.write_bytes((tmp_path / "input").read_bytes())

    with pytest.raises(FileNotFoundError) as error:
        replace_file(tmp_path / "output", write)
    assert error.value.filename == str(tmp_path / "input")
    assert "cannot write" not in str(error.value)
    (tmp_path / "input").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        replace_file(tmp_path / "input" / "output", write)
    assert error.value.filename == str(tmp_path / "input")
    assert "cannot write" not in str(error.value)
    assert not list((tmp_path / "input").iterdir())


def test_what_can_be_written_is_known_before(tmp_path: Path) -> None:
    """A place that takes no file must be named at the start, and nothing be left of the trial."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("elsewhere")
    for good in ("new", "file", "missing/folders/new", "dangling"):
        check_writable(tmp_path / good)
    for good in ("/dev/null", "/dev/stdout", "/dev/fd/1"):
        check_writable(good)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]
    for bad in (tmp_path, tmp_path / "file" / "x", "/proc/x", tmp_path / "file" / "y" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match="cannot write") as error:
            check_writable(bad)
        assert error.value.filename == str(bad)
