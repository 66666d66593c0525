"""`fastmask predict` between other commands: standard input and output, pipes, files that are there, long sentences."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typed_command import output_of

from fastmask.cli import main
from fastmask.tasks.data.conllu import read_sentences

TINY = ["--languages", "qaa,qac", "--batch-size", "8", "--eval-every", "0", "--threads", "1", "--method", "full"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "full"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "2", *TINY]) == 0
    return out


@pytest.fixture(scope="module")
def source(data):
    return next(data.glob("UD_*/qac_toy-ud-test.conllu"))


@pytest.fixture(scope="module")
def expected(run, source, tmp_path_factory):
    """What is written of `source`."""
    target = tmp_path_factory.mktemp("expected") / "out"
    assert main(["predict", str(run), str(source), str(target)]) == 0
    return target.read_bytes()


def shell(run, command: str, **options) -> subprocess.CompletedProcess:
    """Run a line of shell in which `predict` is the command with the run."""
    line = f'set -o pipefail; predict() {{ "{sys.executable}" -m fastmask.cli predict "{run}" "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", line], capture_output=True, **options)


@pytest.mark.parametrize("out", ["-", pytest.param("/proc/self/fd/1", marks=pytest.mark.slow)])  # of /dev/stdout
def test_from_standard_input_to_standard_output(run, source, expected, out):
    """Standard output holds the sentences and nothing else; what is said goes to standard error."""
    done = shell(run, f"cat {source} | predict - {out} | cat")
    assert (done.returncode, done.stdout) == (0, expected)
    assert b"12 sentences written" in done.stderr


def test_redirections_of_a_shell(run, source, expected, tmp_path):
    """A file that a shell has opened is written into: >> keeps what is in it."""
    log = tmp_path / "log"
    log.write_bytes(b"kept\n")
    done = shell(run, f"predict <(cat {source}) - >> {log}")
    assert done.returncode == 0, done.stderr
    assert log.read_bytes() == b"kept\n" + expected


def test_a_reader_that_has_had_enough(run, source, tmp_path):
    """`| head` must not end in a traceback or a message."""
    many = tmp_path / "many"
    many.write_bytes(source.read_bytes() * 400)
    done = shell(run, f"predict {many} - | head -n 1")
    assert done.stdout.count(b"\n") == 1
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_file_is_replaced_whole_or_not_at_all(run, source, capsys, tmp_path):
    """A broken input must leave the output as it was, and nothing beside it."""
    target, broken = tmp_path / "out", tmp_path / "in"
    target.write_text("old")
    broken.write_bytes(source.read_bytes() + b"1\tbroken\n")
    said = output_of(capsys, "predict", run, broken, target, code=1)
    assert f"in:{broken.read_bytes().count(10)}: 2 columns" in said
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


HEADS = {
    "minus one": ("-1", "dep"),
    "own word": ("2", "dep"),
    "too large": ("9", "dep"),
    "empty": ("", ""),
    "text": ("x", "y z"),
}


@pytest.mark.parametrize("given", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(
    "form", ["b", "\u2028", "\x1f", "\x85"], ids=["plain", "line separator", "unit separator", "next line"]
)
def test_no_sentence_is_refused_for_a_head_or_loses_the_file_by_a_form(run, capsys, tmp_path, given, form):
    """HEAD and DEPREL are overwritten whatever they are; any character may be a word."""
    head, deprel = given
    text = f"1\ta\t_\tNOUN\t_\t_\t0\troot\t_\t_\r\n2\t{form}\t_\tX\t_\t_\t{head}\t{deprel}\t_\tA=B\r\n\r\n"
    (tmp_path / "in").write_bytes(text.encode())
    output_of(capsys, "predict", run, tmp_path / "in", tmp_path / "out")
    (sentence,) = read_sentences(tmp_path / "out")
    assert sentence.words == ("a", form)
    assert [label == "root" for label in sentence.deprels] == [head == 0 for head in sentence.heads]
    lines = (tmp_path / "out").read_bytes().decode().split("\r\n")
    assert len(lines) == 4
    assert lines[1].endswith("\t_\tA=B")


def test_a_sentence_longer_than_the_encoder(run, capsys, tmp_path):
    """It is parsed, into one tree, and said to be long; 512 positions is what the small model has."""
    words = "".join(f"{i}\tw{i}\t_\tNOUN" + "\t_" * 6 + "\n" for i in range(1, 1201))
    (tmp_path / "in").write_text(f"# sent_id = long\n{words}\n")
    assert main(["predict", str(run), str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "warning: 1 of 1 sentences do not fit into the encoder's 512 positions" in said
    assert "sentence 1 (long) with 1200 words" in said
    assert len(next(read_sentences(tmp_path / "out")).words) == 1200
