"""Readers of text, JSON and YAML: errors name the file, nothing is converted, and nothing that is read runs."""

from __future__ import annotations

import datetime

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastmask import files, records


class Point(records.Record):
    """A record for these tests."""

    x: int
    names: tuple[str, ...] = ()


def written(tmp_path, content, name="a.json"):
    path = tmp_path / name
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
        ("[]", "Input should be an object"),
        ("", "is not JSON"),
        ('{"x": 3', "is not JSON"),
        (b'{"x": "\xff"}', "byte 8 is not UTF-8"),
        ('{"x": ' * 50_000, "recursion limit exceeded"),
        ('{"x": ' + "9" * 1_000_000 + "}", "number out of range"),
    ],
)
def test_what_is_no_record(tmp_path, content, problem):
    """Another type, a missing or unknown name, or damage is an error that names the file."""
    path = written(tmp_path, content)
    with pytest.raises(files.FileError) as error:
        files.read_json(path, Point)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", ["read_json", "read_yaml", "sha256_of", "read_tensors", "read_sealed"])
def test_no_file(tmp_path, reader):
    """Every reader names a file that is not there."""
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        getattr(files, reader)(tmp_path / "no-such-file")


def test_sha256(tmp_path):
    """The checksum is that of the file's bytes."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180
    assert files.sha256_of(written(tmp_path, "abc")) == expected


# ---- YAML


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: !!python/object/apply:os.system ['touch here']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: " + "9" * 60_000, "is not YAML"),
        ("[" * 60_000, "is not YAML"),
        ("a: [1", "is not YAML: while parsing"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("a: 'x", "is not YAML"),
        ("a: \x01", "is not YAML: unacceptable character"),
        ("- a", "Input should be a valid dictionary"),
        ("a", "Input should be a valid dictionary"),
        (b"a: \xff", "byte 4 is not UTF-8"),
    ],
)
def test_what_is_no_yaml(tmp_path, content, problem):
    """Code and damage are errors that name the file."""
    path = written(tmp_path, content)
    with pytest.raises(files.FileError) as error:
        files.read_yaml(path)
    assert str(error.value).startswith(f"{path}:")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# nothing", {}),
        ("a: 3", {"a": 3}),
        ("a: 1.5e-3", {"a": 0.0015}),
        ("a: 2024-01-05", {"a": "2024-01-05"}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("'no': 1", {"no": 1}),
        ("a: {b: [[c]]}", {"a": {"b": [["c"]]}}),
    ],
)
def test_what_people_write(tmp_path, content, expected):
    """A date is text, as a run's folder may be called so."""
    assert files.read_yaml(written(tmp_path, content)) == expected


SCALARS = st.one_of(st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), st.text(), st.none())


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=5))
def test_what_yaml_writes_is_read(tmp_path_factory, content):
    """Settings that this package writes come back as they were, types included."""
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    files.write_yaml(path, content)
    back = files.read_yaml(path)
    assert back == content
    assert [type(value) for value in back.values()] == [type(value) for value in content.values()]


def test_letters_stay_letters(tmp_path):
    """Names of any language can be read in the file."""
    files.write_yaml(tmp_path / "a.yaml", {"språk": "日本"})
    assert (tmp_path / "a.yaml").read_text(encoding="utf-8") == "språk: 日本\n"


def test_a_date_that_yaml_writes_is_text(tmp_path):
    """A date in quotation marks and one without are the same text."""
    text = yaml.safe_dump({"a": "2024-01-05", "b": datetime.date(2024, 1, 5)})
    assert files.read_yaml(written(tmp_path, text)) == {"a": "2024-01-05", "b": "2024-01-05"}


def test_what_a_message_repeats_of_a_file():
    """Names with control characters, and headers of any length, stay one line that a terminal can show."""
    message = str(files.FileError("a\x1b[2J", "holds " + "b" * 5000 + "\x7f\n (expected less)"))
    assert message.startswith("a\\x1b[2J: holds bbb")
    assert message.endswith("\\x7f (expected less)")
    assert message.isprintable()
    assert len(message) < 1000
