"""JSON lines with predictions: the same lines and one more field, whole or not at all."""

from __future__ import annotations

import json
import os

import pytest

from fastmask.files import FileError
from fastmask.tasks import predicting
from fastmask.tasks.predicting import predicted_lines


class Lengths:
    """A task that says how long a text is; it fails on one."""

    def __init__(self):
        self.chunks = []

    def examples(self, rows):
        self.chunks.append(len(rows))
        return rows

    def predict(self, rows):
        if any(row["text"] == "fail" for row in rows):
            raise RuntimeError("failed")
        return [len(row["text"]) for row in rows]


def test_lines_come_back_with_predictions(tmp_path, monkeypatch):
    """Each line comes back in its place with its prediction, and the file is never in memory as a whole."""
    monkeypatch.setattr(predicting, "CHUNK", 2)
    rows = [{"text": "ä" * n, "more": {"n": n}} for n in range(5)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    task = Lengths()
    assert predicted_lines(task, source, source) == 5  # into the file that is read
    assert task.chunks == [2, 2, 1]
    found = [json.loads(line) for line in source.read_text().splitlines()]
    assert found == [{**row, "prediction": n} for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"text": "a"}\n{"text":\n', r"in\.jsonl:2: is not JSON"),
        (b'{"text": "a"}\n[1]\n', r"in\.jsonl:2: is '\[1\]' \(expected a JSON object"),
        (b'{"text": "\xff"}\n', r"in\.jsonl:1: is not JSON"),
        (b"\n", r"in\.jsonl: has no line"),
    ],
)
def test_what_is_no_line_is_named(text, said, tmp_path):
    """The error names the line, and no output is left."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text)
    target.write_text("before")
    with pytest.raises(FileError, match=said):
        predicted_lines(Lengths(), source, target)
    assert target.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    """After a failure the file is what it was."""
    monkeypatch.setattr(predicting, "CHUNK", 1)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n{"text": "fail"}\n')
    with pytest.raises(RuntimeError, match="failed"):
        predicted_lines(Lengths(), source, target)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]


def test_pipes():
    """Pipes are read and written as they come."""
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    with open(write_in, "wb") as stream:
        stream.write(b'{"text": "abc"}\n')
    assert predicted_lines(Lengths(), f"/dev/fd/{read_in}", f"/dev/fd/{write_out}") == 1
    os.close(write_out)
    os.close(read_in)
    with open(read_out, "rb") as stream:
        assert json.load(stream) == {"text": "abc", "prediction": 3}
