"""`fastmask adapt`, as a person types it: a new run for a new language, and what goes wrong."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from processes import start_process
from typed_command import output_of

import fastmask as fm
from fastmask.cli import main
from fastmask.cli.adapt import ADAMW_RATE
from fastmask.files import LOCK_FILES
from fastmask.training.run_folder import load_run

TINY = ["--languages", "qaa,qac,qae", "--batch-size", "9", "--score-sentences", "8", "--dev-sentences", "6"]
TINY += ["--eval-every", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def tiny(encoder):
    """The options of the smallest of runs."""
    return [*TINY, *encoder]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, tiny):
    """A finished run of a few steps with subnetworks."""
    out = tmp_path_factory.mktemp("runs") / "static"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "8", "--density", "0.4", *tiny]) == 0
    return out


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, data, tiny):
    """A finished run without subnetworks."""
    out = tmp_path_factory.mktemp("runs") / "full"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "4", "--method", "full", *tiny]) == 0
    return out


@pytest.fixture
def support(data):
    """Forty sentences of an unseen language."""
    return next(data.glob("UD_*/qaf_toy-ud-train.conllu"))


@pytest.fixture
def test_file(data):
    return next(data.glob("UD_*/qaf_toy-ud-test.conllu"))


def record_of(run):
    return json.loads((run / "results.json").read_text())["adaptations"][-1]


def test_a_run_that_is_like_any_other(run, support, test_file, data, capsys, tmp_path):
    """The new run has the language beside the others, and can be evaluated, predicted with and adapted again."""
    out = tmp_path / "qaf"
    options = ["--language", "qaf", "--support", support, "--sentences", "20", "--steps", "3", "--test", test_file]
    table = output_of(capsys, "adapt", run, *options, "--choose", "best", "--out", out)
    assert "which subnetwork for qaf" in table
    assert "chosen" in table
    record = record_of(out)
    assert len(record["sent_ids"]) == len(set(record["sent_ids"])) == 20
    losses = record["choice"]["losses"]
    assert list(losses) == ["qaa", "qac", "qae"]
    chosen = record["choice"]["name"]
    assert losses[chosen] == min(losses.values())
    assert len(record["support_losses"]) == 3
    assert record["support_losses"][2] < record["support_losses"][0]
    before, after = fm.Subnetworks.load(run / "masks.safetensors"), fm.Subnetworks.load(out / "masks.safetensors")
    assert after.languages == ("qaa", "qac", "qae", "qaf")
    assert after.heads[:3].equal(before.heads)
    assert after.heads[3].equal(before.heads[before.index(chosen)])
    assert after.neurons[3].equal(before.neurons[before.index(chosen)])

    # What was scored is what was saved.
    rows = {(row["network"], row["steps"]): row["las"] for row in record["scores"]}
    steps = [0, 0, 3, 3]
    networks = ["full network", f"subnetwork {chosen}", "full network", f"subnetwork {chosen}"]
    assert list(rows) == list(zip(networks, steps, strict=True)), "the control takes the same steps"
    scores = tmp_path / "scores.json"
    output_of(capsys, "evaluate", out, "--data", data, "--languages", "qaf,qaa", "--json", scores)
    found = {row["language"]: row for row in json.loads(scores.read_text())}
    assert found["qaf"]["own"]["las"] == pytest.approx(rows[f"subnetwork {chosen}", 3])
    assert found["qaa"]["own"] is not None
    output_of(capsys, "predict", out, test_file, tmp_path / "out.conllu", "--language", "qaf")

    again = tmp_path / "again"
    more = next(data.glob("UD_*/qab_toy-ud-train.conllu"))
    options = ["--language", "qab", "--support", more, "--sentences", "5", "--steps", "1", "--choose", "nearest"]
    table = output_of(capsys, "adapt", out, *options, "--similarity", "head-direction", "--out", again)
    assert "similarity (head-direction)" in table
    assert list(record_of(again)["choice"]["similarities"]) == ["qaa", "qac", "qae", "qaf"]
    assert fm.Subnetworks.load(again / "masks.safetensors").languages == ("qaa", "qac", "qae", "qaf", "qab")
    said = output_of(capsys, "adapt", again, *options, "--out", tmp_path / "third", code=1)
    assert "'qab', which the run was trained on or adapted to already" in said


def test_only_live_weights_are_adapted(run, support, capsys, tmp_path):
    """The saved model differs from the run's where the chosen language owns a weight, and only there."""
    options = ["--language", "qaf", "--support", support, "--sentences", "8", "--steps", "2"]
    output_of(capsys, "adapt", run, *options, "--out", tmp_path / "x")
    index = fm.Subnetworks.load(run / "masks.safetensors").index(record_of(tmp_path / "x")["choice"]["name"])
    live = fm.Subnetworks.load(run / "masks.safetensors").neurons[index, 0]
    old, new = (
        load_run(folder, attached=False).task.model.state_dict()["encoder.encoder.layer.0.intermediate.dense.weight"]
        for folder in (run, tmp_path / "x")
    )
    assert torch.equal(old[~live], new[~live])
    assert not torch.equal(old[live], new[live])


def test_the_same_twice_and_another_seed(run, support, capsys, tmp_path):
    """The same command gives the same model, and the seed decides which sentences are drawn."""
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ["--sentences", "6", "--seed", seed, "--steps", "2", "--optimizer", "adamw", "--out", tmp_path / name]
        output_of(capsys, "adapt", run, "--language", "qaf", "--support", support, *options)
        runs[name] = record_of(tmp_path / name), (tmp_path / name / "model" / "parser.safetensors").read_bytes()
    assert runs["a"] == runs["b"]
    assert runs["a"][0]["sent_ids"] != runs["c"][0]["sent_ids"]


@pytest.mark.parametrize("how", ["union", "full"])
def test_union_and_full(run, support, capsys, tmp_path, how):
    """The new language has the mask that was adapted."""
    options = ["--choose", how, "--steps", "1", "--sentences", "4", "--out", tmp_path / "out"]
    output_of(capsys, "adapt", run, "--language", "qaf", "--support", support, *options)
    subnets = fm.Subnetworks.load(tmp_path / "out" / "masks.safetensors")
    assert subnets.languages == ("qaa", "qac", "qae", "qaf")
    expected = subnets.neurons[:3].any(0) if how == "union" else torch.ones_like(subnets.neurons[0])
    assert subnets.neurons[3].equal(expected)


def test_a_run_without_subnetworks(full_run, support, test_file, capsys, tmp_path):
    """A full run can be adapted, without subnetworks."""
    options = ["--language", "qaf", "--support", support, "--steps", "2", "--test", test_file]
    output_of(capsys, "adapt", full_run, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "masks.safetensors").exists()
    assert [row["steps"] for row in record_of(tmp_path / "out")["scores"]] == [0, 2]
    output_of(capsys, "predict", tmp_path / "out", test_file, tmp_path / "out.conllu")
    assert "adapted to already" in output_of(
        capsys, "adapt", tmp_path / "out", *options, "--out", tmp_path / "b", code=1
    )
    assert "trained on" in output_of(
        capsys, "adapt", full_run, "--language", "qac", *options[2:], "--out", tmp_path / "b", code=1
    )
    said = output_of(capsys, "adapt", full_run, *options, "--choose", "best", "--out", tmp_path / "b", code=1)
    assert "has no subnetworks (expected full)" in said


def test_a_run_in_episodes_is_adapted_as_it_was_trained(data, tiny, support, capsys, tmp_path):
    """Steps and rates are those of the run's inner loop unless they are given; those of AdamW are AdamW's own."""
    made = [
        "--method",
        "full",
        "--meta",
        "fomaml",
        "--steps",
        "4",
        "--support-sentences",
        "2",
        "--query-sentences",
        "2",
    ]
    made += ["--inner-steps", "3", "--inner-lr", "0.02", "--inner-encoder-lr", "0.004", "--out", str(tmp_path / "meta")]
    assert main(["train", "--data", str(data), *made, *tiny]) == 0
    for number, (options, expected) in enumerate(
        [
            ([], (3, 0.02, 0.004)),
            (["--steps", "1", "--lr", "0.1"], (1, 0.1, 0.004)),
            (["--optimizer", "adamw"], (3, ADAMW_RATE, ADAMW_RATE)),
        ]
    ):
        given = ["--language", "qaf", "--support", support, "--sentences", "4", *options]
        output_of(capsys, "adapt", tmp_path / "meta", *given, "--out", tmp_path / str(number))
        record = record_of(tmp_path / str(number))
        assert (record["steps"], record["head_lr"], record["encoder_lr"]) == expected


def test_zero_shot(run, data, capsys, tmp_path):
    """A language without a sentence takes a subnetwork, and no weight changes."""
    out = tmp_path / "out"
    options = ["--language", "qah", "--data", data, "--out", out]
    assert "choose best, union or full, or use URIEL" in output_of(capsys, "adapt", run, *options, code=1)
    assert "needs support sentences" in output_of(capsys, "adapt", run, *options, "--choose", "best", code=1)
    assert not out.exists()
    output_of(capsys, "adapt", run, *options, "--choose", "union")
    name = "model/parser.safetensors"
    assert (out / name).read_bytes() == (run / name).read_bytes()
    assert fm.Subnetworks.load(out / "masks.safetensors").languages[-1] == "qah"
    options = ["--support", next(data.glob("UD_*/qad_toy-ud-train.conllu")), "--similarity", "head-direction"]
    options += ["--language", "qad", "--choose", "nearest", "--out", tmp_path / "more"]
    assert "qah was added to the run without sentences" in output_of(capsys, "adapt", out, *options, code=1)


def test_killed_while_saving(run, support, tmp_path):
    """Nothing half-written is at --out after a kill, and the next try works."""
    out = tmp_path / "out"
    command = ["adapt", str(run), "--language", "qaf", "--support", str(support)]
    command += ["--steps", "1", "--sentences", "4", "--out", str(out)]
    process = start_process(save_slowly, command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".partial-*-out/model")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.is_alive()
    process.kill()
    process.join()
    assert not [path for path in out.glob("*") if path.name not in LOCK_FILES]
    assert main(command) == 0
    assert os.listdir(tmp_path) == ["out"]


def save_slowly(command):
    """The command, with masks that take their time to be written: a window to kill it in."""
    fm.Subnetworks.save = lambda *arguments: time.sleep(100)
    main(command)


class TestErrors:
    """Exit code 1, one message that says what is wrong, and nothing written."""

    @pytest.fixture
    def complaint(self, run, support, capsys, tmp_path):
        def about(*options, **changes):
            given = {"--language": "qaf", "--support": support, "--out": tmp_path / "out", **changes}
            arguments = [item for pair in given.items() for item in pair]
            said = output_of(capsys, "adapt", run, *arguments, *options, code=1)
            assert not (tmp_path / "out").exists()
            return said

        return about

    def test_what_is_given(self, complaint, support, tmp_path):
        assert "40 sentences (expected 41, as asked)" in complaint("--sentences", "41")
        assert "expected at least 1" in complaint("--sentences", "0")
        assert "expected at least 0" in complaint("--steps", "-1")
        assert "trained on" in complaint(**{"--language": "qac"})
        assert "every test sentence is also a support sentence" in complaint("--test", support)
        assert "unknown language or treebank 'qax'" in complaint("--data", support.parents[1], **{"--language": "qax"})
        assert "choose lower ones" in complaint("--lr", "1e30", "--steps", "3")
        assert "URIEL" in complaint("--choose", "nearest", "--similarity", "uriel")

    def test_out_is_there(self, run, support, capsys):
        said = output_of(capsys, "adapt", run, "--language", "qaf", "--support", support, "--out", run, code=1)
        assert "is there already (expected a new or an empty folder)" in said

    def test_malformed_support(self, complaint, support, tmp_path):
        lines = support.read_text().splitlines()
        number = next(i for i, line in enumerate(lines) if line.startswith("2\t"))
        lines[number] = lines[number].rsplit("\t", 1)[0]
        broken = tmp_path / "broken.conllu"
        broken.write_text("\n".join(lines) + "\n\n")
        assert f"broken.conllu:{number + 1}: 9 columns" in complaint(**{"--support": broken})

    def test_unknown_relations(self, complaint, run, support, capsys, tmp_path):
        changed = tmp_path / "changed.conllu"
        changed.write_text(support.read_text().replace("\tobj\t", "\tobjet\t"))
        assert "relations that the model was not trained on: objet (" in complaint(**{"--support": changed})
        assert "objet looks like obj" in complaint("--unknown-labels", "universal", **{"--support": changed})
        options = ["--support", changed, "--unknown-labels", "ignore", "--steps", "1", "--out", tmp_path / "out"]
        output_of(capsys, "adapt", run, "--language", "qaf", *options)


def test_a_language_of_the_run_under_another_name(full_run, support, capsys, tmp_path):
    """A language that was trained on is not an unseen one, however it is written."""
    options = ["--support", str(support), "--out", str(tmp_path / "out")]
    for name in ("QAA", "qaa"):
        assert main(["adapt", str(full_run), "--language", name, *options]) == 1
        assert "which the run was trained on or adapted to already" in capsys.readouterr().err
