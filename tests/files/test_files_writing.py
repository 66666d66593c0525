"""Writers: a file is there whole or not at all, pipes and devices stay what they are, and only our own is deleted."""

from __future__ import annotations

import errno
import os
import pty
import stat
import threading
import time
from pathlib import Path

import pytest
from hang import no_hang
from processes import FORKSERVER, piped, run_into, start_process

import fastmask.files as files


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def fail(partial):
    partial.write_text("half")
    raise RuntimeError("stopped")


class TestReplacing:
    """`replace_file` in an ordinary folder."""

    def test_whole_or_not_at_all(self, tmp_path):
        """A writer that fails leaves what was there, and nothing of its own."""
        path = tmp_path / "a"
        for before in (None, "old"):
            if before:
                path.write_text(before)
            with pytest.raises(RuntimeError, match="stopped"):
                files.replace_file(path, fail)
            assert names(tmp_path) == (["a"] if before else [])
        files.write_text(path, "new\r\nå")
        assert path.read_bytes() == "new\r\nå".encode()
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
    def test_permissions_stay(self, tmp_path, mode):
        """A file that only its owner may read is not shown to all when it is written again."""
        (tmp_path / "a").touch()
        (tmp_path / "a").chmod(mode)
        files.write_text(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new"
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode

    def test_a_writer_that_makes_its_own_file(self, tmp_path):
        """A library that writes elsewhere and renames, with permissions of its own, changes none of ours."""

        def write(partial):
            (tmp_path / "own").touch(mode=0o600)
            os.replace(tmp_path / "own", partial)

        files.replace_file(tmp_path / "new", write)
        (tmp_path / "plain").touch()
        assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "new").chmod(0o640)
        files.replace_file(tmp_path / "new", write)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640

    def test_a_writer_that_replaces_itself(self, tmp_path):
        """A writer may call `replace_file` on the path that it is given."""
        files.replace_file(tmp_path / "a", lambda partial: files.write_text(partial, "x"))
        assert (tmp_path / "a").read_text() == "x"
        assert names(tmp_path) == ["a"]

    def test_folders_are_made(self, tmp_path):
        files.write_text(tmp_path / "b" / "c" / "a", "x")
        assert (tmp_path / "b" / "c" / "a").read_text() == "x"

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_full_disk(self, tmp_path, wrapped):
        """The message names the file, and its old content is kept."""
        (tmp_path / "a").write_text("old")

        def write(partial):
            partial.write_text("half")
            if wrapped:  # as safetensors does
                raise RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(OSError, match="cannot write: No space left on device") as error:
            files.replace_file(tmp_path / "a", write)
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(tmp_path / "a")
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_an_error_of_what_is_read_is_not_one_of_what_is_written(self, tmp_path):
        """The message must name the file that was at fault."""
        with pytest.raises(FileNotFoundError) as error:
            files.replace_file(tmp_path / "out", lambda partial: partial.write_bytes((tmp_path / "in").read_bytes()))
        assert error.value.filename == str(tmp_path / "in")
        assert "cannot write" not in str(error.value)

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link(self, tmp_path, there):
        """A link is followed: the file that it names is replaced, or made."""
        (tmp_path / "link").symlink_to("file")
        if there:
            (tmp_path / "file").write_text("old")
        files.write_text(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == "new"
        assert names(tmp_path) == ["file", "link"]


class TestStreams:
    """What is not a regular file is written into."""

    def test_a_fifo(self, tmp_path):
        """A reader at the other end gets all of it, from writers that go back in their file, too."""
        os.mkfifo(tmp_path / "fifo")
        got = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
        reader.start()

        def write(partial):
            with open(partial, "wb") as file:
                file.write(b"x" * 200_000)
                file.seek(0)
                file.write(b"first")

        with no_hang():
            files.replace_file(tmp_path / "fifo", write)
        reader.join()
        assert got == [b"first" + b"x" * 199_995]
        assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)

    def test_a_terminal(self):
        """A device stays one, and shows what was written, but nothing of a writer that fails."""
        master, slave = pty.openpty()
        try:
            with pytest.raises(RuntimeError, match="stopped"):
                files.replace_file(os.ttyname(slave), fail)
            files.write_text(os.ttyname(slave), "hello\n")
            assert os.read(master, 100) == b"hello\r\n"
            assert stat.S_ISCHR(os.stat(os.ttyname(slave)).st_mode)
        finally:
            os.close(master)
            os.close(slave)

    def test_standard_output(self, tmp_path):
        """In the order in which it is written; ``>> log`` keeps what was in the log."""
        assert piped(write_between) == b"before\ntext\nafter\n"
        log = tmp_path / "log"
        log.write_text("kept\n")
        with open(log, "ab") as stream:
            run_into(stream.fileno(), write_between)
        assert log.read_text() == "kept\nbefore\ntext\nafter\n"


def write_between():
    print("before")
    files.write_text(files.STDOUT, "text\n")
    print("after")


class TestRefused:
    """What cannot be written to is an error that names it and the reason, before and when it is written."""

    @pytest.mark.parametrize("write", [files.check_writable, lambda path: files.write_text(path, "x")])
    def test_places(self, write, tmp_path):
        (tmp_path / "file").write_text("old")
        (tmp_path / "folder").mkdir()
        for place in ("folder", "file/a", "file/a/b", "n" * 300):
            with pytest.raises(OSError, match=place.split("/")[0]):
                write(tmp_path / place)
        assert (tmp_path / "file").read_text() == "old"
        assert names(tmp_path) == ["file", "folder"]

    @pytest.mark.parametrize("place", ["new", "old", "no/such/folder/a", "link", "/dev/null", files.STDOUT])
    def test_a_place_that_will_do(self, tmp_path, place):
        """A new file, an existing one, one in a new folder, a link and a device are accepted, and nothing is made."""
        (tmp_path / "old").write_text("old")
        (tmp_path / "link").symlink_to("old")
        files.check_writable(tmp_path / place if place[0] != "/" else place)
        assert names(tmp_path) == ["link", "old"]


class TestDeleting:
    """Only folders that are named, and only names of our own."""

    def test_a_folder(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        files.remove_tree(tmp_path / "a")
        files.remove_tree(tmp_path / "a")  # it is gone already
        assert names(tmp_path) == []

    def test_leftovers(self, tmp_path):
        """What a killed process left goes; every other name, dots or not, stays."""
        ours = [files.partial_name(tmp_path / "a").name, files.partial_name(tmp_path / "b", "old").name]
        others = [".git", ".partial-a", ".old-stuff", "a", ".partial-0123456789AB-a", ".partial-0123456789ab-"]
        (tmp_path / ours[0]).write_text("half")
        (tmp_path / ours[1] / "sub").mkdir(parents=True)
        for name in others:
            (tmp_path / name).mkdir()
        files.remove_leftovers(tmp_path, of="c")
        assert names(tmp_path) == sorted([*ours, *others])
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted(others)


def hold(folder, mine):
    with files.held(folder):
        mine.set()
        time.sleep(600)


def test_a_folder_that_is_held(tmp_path: Path):
    """A folder that another process holds is refused with that process's number, and free when it has ended."""
    mine = FORKSERVER.Event()
    other = start_process(hold, tmp_path, mine)
    assert mine.wait(300)
    for wait in (0.0, 0.2):
        match = f"is in use by process {other.pid} on .*, since 20"
        with pytest.raises(files.HeldError, match=match), files.held(tmp_path, wait):
            pass
    other.kill()
    other.join()
    with files.held(tmp_path):
        pass
    with files.held(tmp_path):  # and it lets go
        pass
