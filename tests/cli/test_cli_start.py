"""What is known at the start of a command is judged there, before anything is computed or written."""

from __future__ import annotations

import json
import shutil

import pytest
from typed_command import output_of

from fastmask.cli import main

TINY = ["--batch-size", "6", "--eval-every", "0", "--threads", "1", "--score-sentences", "8", "--dev-sentences", "4"]
LONG = "".join(f"{i}\tw{i}\t_\tNOUN\t_\t_\t{i - 1}\t{'obj' if i > 1 else 'root'}\t_\t_\n" for i in range(1, 601)) + "\n"


@pytest.fixture(scope="module")
def tiny(encoder):
    """The options of the smallest of runs."""
    return [*TINY, *encoder]


@pytest.fixture
def banks(data, tmp_path):
    """A copy of three treebanks, for changes."""
    for code in ("qaa", "qac", "qad"):
        folder = next(data.glob(f"UD_*/{code}_toy-ud-test.conllu")).parent
        shutil.copytree(folder, tmp_path / "ud" / folder.name)
    return tmp_path / "ud"


def file_of(banks, code, split):
    return next(banks.glob(f"UD_*/{code}_toy-ud-{split}.conllu"))


PLACES = ["/proc/nowhere/x", "{tmp}", "{tmp}/file/x"]
COMMANDS = {
    "predict": ["predict", "{data}", "{tmp}/file", "{place}"],
    "evaluate": ["evaluate", "{data}", "--json", "{place}"],
    "discover": ["discover", "{data}", "--masks", "{place}"],
    "train": ["train", "--data", "{data}", "--languages", "no-language", "--out", "{place}"],
    "adapt": ["adapt", "{data}", "--language", "qaf", "--out", "{place}"],
    "compare": ["compare", "--data", "{data}", "--train", "no-language", "--unseen", "qad", "--out", "{place}"],
}


# A folder is where a run can be, and where a file cannot.
CASES = [
    (name, place) for name, words in COMMANDS.items() for place in PLACES if place != "{tmp}" or "--out" not in words
]


@pytest.mark.parametrize(("command", "place"), CASES)
def test_where_nothing_can_be_written(command, place, data, capsys, tmp_path):
    """A place that cannot be written to is refused before the run or the data, which are none here, are looked at."""
    (tmp_path / "file").write_text("x")
    place = place.format(tmp=tmp_path)
    arguments = [part.format(tmp=tmp_path, data=data, place=place) for part in COMMANDS[command]]
    said = output_of(capsys, *arguments, code=1)
    assert place in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_relation_with_white_space(banks, split, capsys, tmp_path):
    """It cannot be written as CoNLL-U, so training must not begin, whatever split it is in."""
    path = file_of(banks, "qac", split)
    text = path.read_text().replace("\tnsubj\t", "\tnsubj x\t")
    path.write_text(text)
    number = next(i for i, line in enumerate(text.split("\n"), start=1) if "nsubj x" in line)
    said = output_of(capsys, "train", "--data", banks, "--out", tmp_path / "run", "--steps", "2", *TINY, code=1)
    assert f"{path.name}:{number}: DEPREL 'nsubj x' holds white space" in said
    assert not (tmp_path / "run").exists()


def test_a_long_sentence_ends_nothing(banks, tiny, capsys, tmp_path):
    """One sentence that is longer than the encoder, in every file, stops no command, and is in every score."""
    words = {}
    for path in banks.glob("UD_*/*.conllu"):
        # Another one in each: a test sentence that is in the support set, too, is left out.
        path.write_text(path.read_text() + LONG.replace("\tw", f"\t{path.stem}-"))
    out, adapted = tmp_path / "run", tmp_path / "adapted"
    languages = ["--languages", "qaa,qac"]
    arguments = ["--data", banks, "--out", out, "--steps", "3", "--density", "0.5", *languages, *tiny]
    arguments[arguments.index("--dev-sentences") + 1] = "0"
    assert main(["train", *map(str, arguments)]) == 0
    said = capsys.readouterr().err
    assert "qaa: 1 of 41 training sentences are left out" in said
    assert said.count("1 of 13 sentences do not fit into the encoder's 300 positions") >= 1  # test
    assert said.count("1 of 11 sentences do not fit") >= 1  # dev
    for row in json.loads((out / "results.json").read_text())["test"]:
        words[row["language"]] = row["words"]
        assert row["words"] > 600
    output_of(capsys, "evaluate", out, "--data", banks, *languages, "--json", tmp_path / "scores")
    assert {row["language"]: row["words"] for row in json.loads((tmp_path / "scores").read_text())} == words
    options = ["--support", file_of(banks, "qad", "dev"), "--test", file_of(banks, "qad", "test"), "--steps", "1"]
    output_of(capsys, "adapt", out, "--language", "qad", "--choose", "best", *options, "--out", adapted)
    record = json.loads((adapted / "results.json").read_text())["adaptations"][0]
    assert len(record["sent_ids"]) == 11  # of all that was given; what was too long for a step has been said
    assert record["scores"][0]["words"] > 600


def test_support_sentences_that_are_all_too_long(banks, data, tiny, capsys, tmp_path):
    """There is nothing to adapt to; that must be said before anything is written."""
    run = tmp_path / "run"
    arguments = ["--data", data, "--out", run, "--steps", "2", "--method", "full", "--languages", "qaa,qac", *tiny]
    output_of(capsys, "train", *arguments)
    (tmp_path / "support").write_text(LONG)
    arguments = ["--language", "qad", "--support", tmp_path / "support", "--out", tmp_path / "out"]
    said = output_of(capsys, "adapt", run, *arguments, code=1)
    assert "none of the 1 support sentences fits into 300 positions" in said
    assert not (tmp_path / "out").exists()


def test_a_comparison_prepares_everything_first(banks, tiny, capsys, tmp_path):
    """A support set without a sentence that fits must be found before the first run is trained."""
    for split in ("train", "dev"):
        file_of(banks, "qad", split).write_text(LONG)
    options = ["--data", banks, "--train", "qaa,qac", "--unseen", "qad", "--shots", "1", "--support-sets", "1"]
    options += ["--seeds", "1", "--methods", "full", "--metas", "none", "--steps", "2", *tiny]
    said = output_of(capsys, "compare", *options, "--out", tmp_path / "out", code=1)
    assert "qad: none of the 1 support sentences fits into 300 positions" in said
    assert not (tmp_path / "out").exists()


def test_discover_reads_the_data_of_all_runs_first(banks, tiny, capsys, tmp_path):
    """What is wrong with the second run's data must not wait for the first run's subnetworks."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        bank = shutil.copytree(banks, tmp_path / f"ud-{run.name}")
        arguments = ["--data", bank, "--out", run, "--steps", "2", "--method", "full", "--languages", "qaa,qac", *tiny]
        output_of(capsys, "train", *arguments)
    shutil.rmtree(tmp_path / "ud-b")
    said = output_of(capsys, "discover", *runs, "--masks", tmp_path / "m", "--density", "0.5", code=1)
    assert f"{tmp_path / 'ud-b'} does not exist" in said
    assert "seed 0" not in said
