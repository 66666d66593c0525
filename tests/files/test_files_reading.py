"""Readers of text and JSON: errors name the file, and nothing is converted or waited for."""

from __future__ import annotations

import os

import pytest
from hang import no_hang

import fastmask.files as files


class Point(files.Record):
    """A record for these tests."""

    x: int
    names: tuple[str, ...] = ()


def written(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_record_comes_back(tmp_path):
    """JSON of the right types is read, with a byte-order mark as without one."""
    path = written(tmp_path, '\ufeff{"x": 3, "names": ["a", "b"]}')
    assert files.read_json(path, Point) == Point(x=3, names=("a", "b"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"x": 3.0}', "x: Input should be a valid integer, given 3.0"),
        ('{"x": true}', "x: Input should be a valid integer, given True"),
        ('{"x": "3"}', "x: Input should be a valid integer, given '3'"),
        ('{"x": ٣}', "is not JSON"),
        ('{"x": null}', "x: Input should be a valid integer, given None"),
        ("{}", "x: Field required"),
        ('{"x": 3, "y": 4}', "y: Extra inputs are not permitted, given 4"),
        ('{"x": 3, "x": 4}', "'x' stands twice"),
        ("[]", "Input should be an object"),
        ("", "is not JSON"),
        ('{"x": 3', "is not JSON"),
        (b'{"x": "\xff"}', "byte 8 is not UTF-8"),
        ('{"x": ' * 50_000, "recursion limit exceeded"),
        ("[" * 1_000_000, "recursion limit exceeded"),
        ('{"x": ' + "9" * 1_000_000 + "}", "number out of range"),
        ('{"x": 1e' + "9" * 1_000_000 + "}", "Input should be a"),
    ],
)
def test_what_is_no_record(tmp_path, content, problem):
    """Another type, a missing or unknown name, damage, and JSON made to exhaust the reader."""
    path = written(tmp_path, content)
    with pytest.raises(files.FileError) as error, no_hang():
        files.read_json(path, Point)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert len(str(error.value)) < 400


def test_lines(tmp_path):
    """A wrong line of a file of records is named by its number."""
    path = written(tmp_path, '{"x": 1}\n\n{"x": 2}\r\n{"x": "3"}\n')
    found = files.read_json_lines(path, Point)
    assert [next(found).x, next(found).x] == [1, 2]
    with pytest.raises(files.FileError, match=r"a\.json:4: x: Input should be a valid integer"):
        next(found)


def test_messages_are_of_bounded_length():
    """An error message about a file stays short, whatever is in the file."""
    message = str(files.FileError("a", "x" * 10_000 + "end"))
    assert len(message) < 600
    assert message.endswith("end")


def test_a_message_is_one_line_that_no_terminal_obeys(tmp_path):
    """Names in a file cannot clear the screen or forge further lines of output."""
    path = written(tmp_path, r'{"x": 3, "\u001b[2J\nerror: pay": 4}')
    with pytest.raises(files.FileError) as error:
        files.read_json(path, Point)
    assert str(error.value).isprintable()
    assert r"\x1b[2J\nerror: pay: Extra" in str(error.value)


@pytest.mark.parametrize("reader", ["read_json", "read_text", "read_yaml", "sha256_of", "read_tensors", "read_sealed"])
class TestNoFile:
    """Every reader says what is not there, or is not a file, and neither waits for a FIFO nor reads a device."""

    def test_missing(self, tmp_path, reader):
        with pytest.raises(FileNotFoundError, match="no-such-file"):
            getattr(files, reader)(tmp_path / "no-such-file")

    def test_fifo(self, tmp_path, reader):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(files.FileError, match="fifo: is not a regular file"), no_hang(wait=10):
            getattr(files, reader)(tmp_path / "fifo")

    def test_device(self, reader):
        with pytest.raises(files.FileError, match="/dev/zero: is not a regular file"), no_hang(wait=10):
            getattr(files, reader)("/dev/zero")

    def test_folder(self, tmp_path, reader):
        with pytest.raises(files.FileError, match="is a folder"):
            getattr(files, reader)(tmp_path)

    def test_under_a_file(self, tmp_path, reader):
        (tmp_path / "file").touch()
        with pytest.raises(files.FileError, match="file/below: cannot be read: Not a directory"):
            getattr(files, reader)(tmp_path / "file" / "below")

    def test_links_in_a_circle(self, tmp_path, reader):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(files.FileError, match="a: cannot be read: Too many levels"):
            getattr(files, reader)(tmp_path / "a")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
    def test_names_that_no_file_has(self, tmp_path, reader, name):
        with pytest.raises(files.FileError):
            getattr(files, reader)(tmp_path / name)

    def test_a_file_that_ends_a_link_is_read(self, tmp_path, reader):
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "file").write_text("{}")
        if reader in ("read_tensors", "read_sealed"):
            files.write_sealed(tmp_path / "file", {}, {})
        assert getattr(files, reader)(tmp_path / "link") is not None


def test_a_file_of_gigabytes(tmp_path):
    """JSON and YAML beyond what anybody writes are refused unread."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    for reader in (files.read_json, files.read_yaml):
        with pytest.raises(files.FileError, match=r"has more than \d+ bytes"), no_hang():
            reader(path)


def test_sha256(tmp_path):
    """The checksum is that of the file's bytes."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180
    assert files.sha256_of(written(tmp_path, "abc")) == expected
