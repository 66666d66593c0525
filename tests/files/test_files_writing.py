"""Writers: a file is there whole or not at all, links and devices stay what they are, and only our own is deleted."""

from __future__ import annotations

import errno
import os
import pty
import stat
import threading

import pytest
from hang import no_hang
from processes import piped, run_into

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
        """A file that only its owner may read is not shown to all when it is written again, not even half written."""
        path, seen = tmp_path / "a", []
        path.touch()
        path.chmod(mode)

        def write(partial):
            partial.write_text("new")
            seen.append(stat.S_IMODE(partial.stat().st_mode))

        files.replace_file(path, write)
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert seen == [mode]

    def test_a_new_file_has_the_permissions_of_any_new_file(self, tmp_path):
        (tmp_path / "plain").touch()
        files.write_text(tmp_path / "a", "x")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_a_writer_that_makes_its_own_file(self, tmp_path):
        """The same holds for a library that writes elsewhere and renames, with permissions of its own."""

        def write(partial):
            (tmp_path / "own").touch(mode=0o600)
            os.replace(tmp_path / "own", partial)

        files.replace_file(tmp_path / "new", write)
        (tmp_path / "plain").touch()
        assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "new").chmod(0o640)
        files.replace_file(tmp_path / "new", write)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640

    def test_the_owner_stays(self, tmp_path):
        """Root, writing a user's file again, leaves it to the user."""
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        (tmp_path / "a").touch()
        os.chown(tmp_path / "a", 12345, 12346)
        files.write_text(tmp_path / "a", "x")
        assert ((tmp_path / "a").stat().st_uid, (tmp_path / "a").stat().st_gid) == (12345, 12346)

    @pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "日" * 85, "\udcff" * 255])
    def test_the_longest_names(self, tmp_path, name):
        """A name of 255 bytes, and one that is not UTF-8, can be written."""
        files.write_text(tmp_path / name, "x")
        assert names(tmp_path) == [name]

    def test_a_writer_that_replaces_itself(self, tmp_path):
        """A writer may call `replace_file` on the path that it is given."""
        (tmp_path / "a").touch(mode=0o600)
        files.replace_file(tmp_path / "a", lambda partial: files.write_text(partial, "x"))
        assert (tmp_path / "a").read_text() == "x"
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
        assert names(tmp_path) == ["a"]

    def test_folders_are_made(self, tmp_path):
        files.write_text(tmp_path / "b" / "c" / "a", "x")
        assert (tmp_path / "b" / "c" / "a").read_text() == "x"

    def test_text_that_no_file_can_hold(self, tmp_path):
        """Half of a letter is refused with the name of the file, and what was there stays."""
        (tmp_path / "a").write_text("old")
        with pytest.raises(files.FileError, match="a: cannot be written"):
            files.write_text(tmp_path / "a", "\ud800")
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_full_disk(self, tmp_path, wrapped):
        """The message names the file, and its old content is kept."""
        (tmp_path / "a").write_text("old")

        def write(partial):
            partial.write_text("half")
            if wrapped:  # as safetensors does
                raise RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(OSError, match="No space left on device; what was there before is still there") as error:
            files.replace_file(tmp_path / "a", write)
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(tmp_path / "a")
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]


class TestLinks:
    """Links of the user are followed; in folders of ours they are replaced."""

    @pytest.fixture
    def link(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_text("old")
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "link").symlink_to("../elsewhere/file")
        return tmp_path / "here" / "link"

    def test_followed(self, link, tmp_path):
        files.write_text(link, "new")
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == "new"
        assert names(tmp_path / "elsewhere") == ["file"]

    def test_to_nothing(self, link, tmp_path):
        """A link to a file that is not there yet makes it, as it does for every program."""
        (tmp_path / "elsewhere" / "file").unlink()
        files.write_text(link, "new")
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == "new"

    def test_not_followed(self, link, tmp_path):
        """In a run folder of somebody else, a link does not lead our files out of it."""
        files.write_text(link, "new", follow=False)
        assert not link.is_symlink()
        assert link.read_text() == "new"
        assert (tmp_path / "elsewhere" / "file").read_text() == "old"

    def test_in_a_circle(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            files.write_text(tmp_path / "a", "x")
        assert (tmp_path / "a").is_symlink()
        files.write_text(tmp_path / "a", "x", follow=False)
        assert (tmp_path / "a").read_text() == "x"


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
        assert names(tmp_path) == ["fifo"]

    def test_a_fifo_in_a_folder_of_ours(self, tmp_path):
        """It is replaced: writing into it would wait for ever."""
        os.mkfifo(tmp_path / "fifo")
        with no_hang(wait=10):
            files.write_text(tmp_path / "fifo", "x", follow=False)
        assert (tmp_path / "fifo").read_text() == "x"

    def test_a_terminal(self):
        """A device stays one, and shows what was written."""
        master, slave = pty.openpty()
        try:
            files.write_text(os.ttyname(slave), "hello\n")
            assert os.read(master, 100) == b"hello\r\n"
            assert stat.S_ISCHR(os.stat(os.ttyname(slave)).st_mode)
        finally:
            os.close(master)
            os.close(slave)

    def test_nothing_comes_of_a_writer_that_fails(self):
        master, slave = pty.openpty()
        try:
            with pytest.raises(RuntimeError, match="stopped"):
                files.replace_file(os.ttyname(slave), fail)
            os.write(slave, b"end")
            assert os.read(master, 100) == b"end"
        finally:
            os.close(master)
            os.close(slave)

    def test_nobody_reads(self):
        """A pipe whose reader is gone is an error that names it."""
        read, write = os.pipe()
        os.close(read)
        try:
            with pytest.raises(BrokenPipeError, match=f"cannot write: Broken pipe: '/dev/fd/{write}'"):
                files.write_text(f"/dev/fd/{write}", "x")
        finally:
            os.close(write)

    def test_a_file_without_a_name(self, tmp_path):
        """An open file that was deleted is written into; nothing of a strange name appears."""
        with open(tmp_path / "a", "w+b") as file:
            (tmp_path / "a").unlink()
            files.write_text(f"/dev/fd/{file.fileno()}", "x")
            file.seek(0)
            assert file.read() == b"x"
        assert names(tmp_path) == []


def write_between(target):
    print("before")
    files.write_text(target, "text\n")
    print("after")


class TestStandardOutput:
    """What goes to standard output comes after what was printed before, wherever that is directed to."""

    def test_a_pipe(self):
        assert piped(write_between, "/dev/stdout") == b"before\ntext\nafter\n"

    @pytest.mark.parametrize("target", ["/dev/stdout", "{}"])
    def test_appended_to_a_file(self, tmp_path, target):
        """``>> log``: what the file had before is not lost."""
        log = tmp_path / "log"
        log.write_text("kept\n")
        with open(log, "ab") as stream:
            run_into(stream.fileno(), write_between, target.format(log))
        assert log.read_text() == "kept\nbefore\ntext\nafter\n"
        assert names(tmp_path) == ["log"]


class TestRefused:
    """What cannot be written to is an error that names it and the reason, before and when it is written."""

    @pytest.fixture(params=["check_writable", "write_text"])
    def refused(self, request):
        def complaint(path, match):
            with pytest.raises((OSError, files.FileError), match=match) as error:
                files.check_writable(path) if request.param == "check_writable" else files.write_text(path, "x")
            assert repr(os.fspath(path)).strip("'") in str(error.value)

        return complaint

    def test_a_folder(self, refused, tmp_path):
        refused(tmp_path, "is a folder")
        assert names(tmp_path) == []

    def test_what_is_named_like_a_folder(self, refused, tmp_path):
        refused(f"{tmp_path}/new/", "names a folder")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("below", ["file/a", "file/a/b"])
    def test_under_a_file(self, refused, tmp_path, below):
        (tmp_path / "file").write_text("old")
        refused(tmp_path / below, "Not a directory")
        assert (tmp_path / "file").read_text() == "old"

    def test_a_link_under_a_file(self, refused, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("file/a")
        refused(tmp_path / "link", "Not a directory")

    def test_a_name_with_a_zero(self, refused, tmp_path):
        with pytest.raises(files.FileError, match="null byte"):
            files.write_text(tmp_path / "a\0b", "x")
        with pytest.raises(files.FileError, match="null byte"):
            files.check_writable(tmp_path / "a\0b")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match="cannot write: File name too long"):
        files.write_text(tmp_path / ("n" * 256), "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["new", "old", "no/such/folder/a", "link", "/dev/null"])
def test_a_target_that_will_do(tmp_path, place):
    """A new file, an existing one, one in a new folder, a link and a device are accepted, and nothing is created."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    files.check_writable(tmp_path / place)
    assert names(tmp_path) == ["link", "old"]


class TestDeleting:
    """Only folders, and only names of our own."""

    def test_a_folder(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        files.remove_tree(tmp_path / "a")
        files.remove_tree(tmp_path / "a")  # it is gone already
        assert names(tmp_path) == []

    def test_a_link(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "b").touch()
        (tmp_path / "link").symlink_to("a")
        with pytest.raises(OSError, match="is a link"):
            files.remove_tree(tmp_path / "link")
        assert (tmp_path / "a" / "b").exists()

    def test_a_file(self, tmp_path):
        """A file is refused under its own name: it was renamed first, and lost so."""
        (tmp_path / "a").write_text("old")
        with pytest.raises(NotADirectoryError, match="is not a folder"):
            files.remove_tree(tmp_path / "a")
        assert (tmp_path / "a").read_text() == "old"

    def test_leftovers(self, tmp_path):
        """What a killed process left goes; every other name, dots or not, stays."""
        ours = [files.partial_name(tmp_path / "a").name, files.partial_name(tmp_path / "b", "old").name]
        others = [".git", ".partial-a", ".old-stuff", "a", ".partial-0123456789AB-a", ".partial-0123456789ab-"]
        (tmp_path / ours[0]).write_text("half")
        (tmp_path / ours[1] / "sub").mkdir(parents=True)
        for name in others:
            (tmp_path / name).mkdir()
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted(others)

    def test_leftovers_that_are_links(self, tmp_path):
        """A link of such a name goes, what it leads to stays; nothing is done through a folder that is a link."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        (tmp_path / "out" / ".old-0123456789ab-x").mkdir()
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / ".old-0123456789ab-y").symlink_to("../out")
        files.remove_leftovers(tmp_path / "in")
        assert names(tmp_path / "in") == []
        (tmp_path / "link").symlink_to("out")
        files.remove_leftovers(tmp_path / "link")
        assert names(tmp_path / "out") == [".old-0123456789ab-x", "precious"]
