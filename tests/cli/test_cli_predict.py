"""`fastmask predict` between other commands: standard input and output, pipes, files that are there, long sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from processes import exit_code, start_command
from typed_command import output_of

from fastmask.cli import main
from fastmask.tasks.data.conllu import read_sentences


@pytest.fixture(scope="module")
def run(small_run):
    return small_run


@pytest.fixture(scope="module")
def source(small_data):
    return next(small_data.glob("UD_*/qac_toy-ud-test.conllu"))


@pytest.fixture(scope="module")
def expected(run, source, tmp_path_factory):
    """What is written of `source`."""
    target = tmp_path_factory.mktemp("expected") / "out"
    assert main(["predict", str(run), str(source), str(target)]) == 0
    return target.read_bytes()


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_from_standard_input_to_standard_output(run, source, expected, tmp_path, out):
    """Standard output holds the sentences and nothing else; messages go to standard error."""
    read, write = os.pipe()
    with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat, (tmp_path / "said").open("wb") as said:
        process = start_command("predict", run, "-", out, stdin=cat.stdout, stdout=write, stderr=said)
    os.close(write)
    with open(read, "rb") as printed:
        assert printed.read() == expected
    assert exit_code(process) == 0
    assert "3 sentences written" in (tmp_path / "said").read_text()


def test_redirections_of_a_shell(run, source, expected, tmp_path):
    """Input may be a pipe with a name; output that a shell has opened by >> keeps what is in it."""
    log, pipe = tmp_path / "log", tmp_path / "pipe"
    log.write_bytes(b"kept\n")
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[source.read_bytes()], daemon=True).start()
    with log.open("ab") as end:
        assert exit_code(start_command("predict", run, pipe, "-", stdout=end)) == 0
    assert log.read_bytes() == b"kept\n" + expected


def test_a_reader_that_has_had_enough(run, source, tmp_path):
    """`| head` must not end in a traceback or a message, nor may what the interpreter does as it ends."""
    many = tmp_path / "many"
    many.write_bytes(source.read_bytes() * 400)
    line = f'set -o pipefail; "{sys.executable}" -m fastmask predict "{run}" {many} - | head -n 1'
    done = subprocess.run(["bash", "-c", line], capture_output=True)
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
    """A sentence longer than the model's 64 positions is parsed into one tree, with a warning."""
    words = "".join(f"{i}\tw{i}\t_\tNOUN" + "\t_" * 6 + "\n" for i in range(1, 301))
    (tmp_path / "in").write_text(f"# sent_id = long\n{words}\n")
    assert main(["predict", str(run), str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "warning: 1 of 1 sentences do not fit into the encoder's 64 positions" in said
    assert "sentence 1 (long) with 300 words" in said
    assert len(next(read_sentences(tmp_path / "out")).words) == 300
