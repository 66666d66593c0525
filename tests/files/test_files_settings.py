"""The YAML of settings: names and values and no more, read in moments whatever it holds."""

from __future__ import annotations

import datetime

import pytest
import yaml
from hang import no_hang
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fastmask.files as files


def read(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="utf-8")
    with no_hang():
        return files.read_yaml(path)


BILLION = "".join(f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: &a [x]\n" + BILLION, "aliases are not allowed"),
        ("a: &a [*a]", "aliases are not allowed"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "aliases are not allowed"),
        ("<<: {a: 1}", "a name that is not text"),
        ("a: !!python/object/apply:os.system ['touch here']", "tags are not allowed"),
        ("!!python/name:os.system", "tags are not allowed"),
        ("a: !!bool perhaps", "tags are not allowed"),
        ("a: !!timestamp perhaps", "tags are not allowed"),
        ("a: !!int ٣", "tags are not allowed"),
        ("a: !!set {b, c}", "tags are not allowed"),
        ("a: !mine b", "tags are not allowed"),
        ("a: 1:30", "'1:30' is no decimal number"),
        ("a: " + "1" + ":1" * 30_000, "is no decimal number"),
        ("a: " + "1" + ":1" * 300 + ":1.5", "is no decimal number"),
        ("a: 010", "'010' is no decimal number"),
        ("a: 0x10", "is no decimal number"),
        ("a: 1_000", "is no decimal number"),
        ("a: " + "9" * 60_000, "is no decimal number"),
        ("a: 1_0.5", "is no decimal number"),
        ("[" * 60_000, "nested more than 20 deep"),
        ("- " * 30_000, "nested more than 20 deep"),
        ("? " * 30_000, "nested more than 20 deep"),
        ("{a: " * 15_000, "nested more than 20 deep"),
        ("a: 1\nb: 2\na: 3", "a.yaml:3: is not YAML that fastmask reads: 'a' stands twice"),
        ("no: 1", "a name that is not text"),
        ("1: 1", "a name that is not text"),
        ("[a]: 1", "a name that is not text"),
        ("a: [1", "is not YAML that fastmask reads"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: 'x", "is not YAML that fastmask reads"),
        ("a: \x01", "is not YAML that fastmask reads: unacceptable character"),
        ("- a", "Input should be a valid dictionary"),
        ("a", "Input should be a valid dictionary"),
        ("#" * 70_000, "has more than 65536 bytes"),
    ],
)
def test_refused(tmp_path, content, problem):
    """Tags, aliases, merge keys, nesting, numbers of other bases, names twice: an error that names the file."""
    with pytest.raises(files.FileError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'a.yaml'}:")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# nothing", {}),
        ("a: 3", {"a": 3}),
        ("a: -3", {"a": -3}),
        ("a: 1.5e-3", {"a": 0.0015}),
        ("a: .5", {"a": 0.5}),
        ("a: -.inf", {"a": float("-inf")}),
        ("a: 2024-01-05", {"a": "2024-01-05"}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: ['1:30', x]", {"a": ["1:30", "x"]}),
        ("'no': 1", {"no": 1}),
        ("a: &b [x]", {"a": ["x"]}),
        ("a: {b: [[c]]}", {"a": {"b": [["c"]]}}),
    ],
)
def test_accepted(tmp_path, content, expected):
    """What people write; a date is text, as a run's folder may be called so."""
    assert read(tmp_path, content) == expected


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
    assert read(tmp_path, text) == {"a": "2024-01-05", "b": "2024-01-05"}
