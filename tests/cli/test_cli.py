"""The `fastmask` command, as a person types it: a tiny run, everything one does with it, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from argparse import Namespace

import pytest
import torch
from finished_run import make_run
from processes import start_process
from typed_command import output_of

import fastmask as fm
from fastmask.cli import main
from fastmask.cli.options import which_data
from fastmask.cli.train import _config
from fastmask.files import MANIFEST, files_in, read_metadata, write_manifest
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.data.synthetic import SEEN
from fastmask.training.config import TrainConfig

TINY = ["--languages", "qaa,qac", "--batch-size", "8", "--score-sentences", "16", "--dev-sentences", "8"]
TINY += ["--eval-every", "0", "--threads", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def tiny(encoder):
    """The options of the smallest of runs."""
    return [*TINY, *encoder]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, tiny):
    """A finished run of a few steps with static subnetworks."""
    out = tmp_path_factory.mktemp("runs") / "static"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "6", "--density", "0.4", *tiny]) == 0
    return out


def test_train_leaves_everything_it_names(run):
    """A run has its metrics, model, masks and table."""
    results = json.loads((run / "results.json").read_text())
    assert [row["language"] for row in results["test"]] == ["qaa", "qac"]
    for row in results["test"]:
        assert row.keys() == {"language", "part", "examples", "words", "full", "own"}
        assert 0 <= row["full"]["las"] <= row["full"]["uas"] <= 100
    assert results["training_words_per_second"].keys() == {"full_network", "subnetworks"}
    masks = fm.Subnetworks.load(run / "masks.safetensors")
    assert masks.languages == ("qaa", "qac")
    assert masks.heads.sum((1, 2)).tolist() == [round(0.4 * 8)] * 2
    assert masks.neurons[0].numel() == 64
    assert (run / "metrics.jsonl").stat().st_size > 0


def test_evaluate_repeats_the_scores_of_the_run(run, data, capsys, tmp_path):
    """A run that is loaded scores what it scored when it was trained."""
    output_of(capsys, "evaluate", run, "--data", data, "--json", tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())
    trained = json.loads((run / "results.json").read_text())["test"]
    for row, expected in zip(rows, trained, strict=True):
        for name in ("full", "own", "part", "words"):
            assert row[name] == pytest.approx(expected[name])


def test_evaluate_a_language_without_a_subnetwork(run, data, capsys):
    """An unseen language is scored with the full network, and the table says that it has no subnetwork."""
    table = output_of(capsys, "evaluate", run, "--data", data, "--languages", "qaa,qah", "--split", "dev")
    assert "qah (no subnetwork)" in table
    assert "on the dev sets" in table


def test_predict_changes_two_columns_only(run, data, capsys, tmp_path):
    """Comments, multiword tokens and all other columns are kept."""
    source = next(data.glob("UD_*/qac_toy-ud-test.conllu"))
    target = tmp_path / "out.conllu"
    said = output_of(capsys, "predict", run, source, target, "--language", "qac")
    assert "12 sentences written" in said
    before, after = source.read_text().splitlines(), target.read_text().splitlines()
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        if "\t" in old and "-" not in old.split("\t")[0]:
            a, b = old.split("\t"), new.split("\t")
            assert a[:6] + a[8:] == b[:6] + b[8:]
        else:
            assert old == new


def test_discover_then_train_with_the_masks(run, data, tiny, capsys, tmp_path):
    """A masks file from `discover` can be shown and trained with, and says how it was made."""
    masks = tmp_path / "masks.safetensors"
    options = ["--units", "heads", "--density", "0.5", "--draws", "2", "--score-sentences", "8"]
    table = output_of(capsys, "discover", run, "--masks", masks, *options)
    assert "heads of 8" in table
    subnets = fm.Subnetworks.load(masks)
    assert subnets.neurons is None
    assert subnets.heads.sum((1, 2)).tolist() == [4, 4]  # asked for half: a vote of two draws alone would leave less
    found_by = {"score": "gradient", "units": "heads", "density": 0.5, "score_sentences": 8}
    made_from = json.loads(read_metadata(masks)["made_from"])
    assert made_from == {"runs": [str(run)], "vote": "most", "draws": 2, **found_by}
    line = (
        r"agreement of heads \(mean Jaccard\): draws of one language (\S+), of two languages (\S+), by chance (\S+)\n"
    )
    agreement = re.search(line, table)
    assert agreement is not None
    assert all(0 < float(share) <= 1 for share in agreement.groups())
    assert "qaa" in output_of(capsys, "masks", masks)
    for method in ("random", "shared"):
        out = tmp_path / method
        arguments = ["--data", data, "--out", out, "--steps", "4", "--method", method, "--masks", masks, *tiny]
        # The languages, unless others are named, are those of the masks.
        arguments = [item for item in arguments if item not in ("--languages", "qaa,qac")]
        output_of(capsys, "train", *arguments)
        control = fm.Subnetworks.load(out / "masks.safetensors")
        assert control.languages == ("qaa", "qac")
        if method == "random":
            assert control.heads.sum(-1).tolist() == subnets.heads.sum(-1).tolist()
        else:
            assert control.heads[0].equal(control.heads[1])


def test_discover_joins_monolingual_runs(data, tiny, capsys, tmp_path):
    """Masks of runs on one language each must be joined in one file, each language's found in its own run's model."""
    runs = {}
    for name in ("qac", "qaa"):
        runs[name] = tmp_path / name
        arguments = ["--data", data, "--out", runs[name], "--steps", "2", "--method", "full", *tiny]
        output_of(capsys, "train", *arguments, "--languages", name)
    options = ["--density", "0.5", "--score-sentences", "8", "--units", "heads"]
    table = output_of(capsys, "discover", *runs.values(), "--masks", tmp_path / "m", *options)
    joined = fm.Subnetworks.load(tmp_path / "m")
    assert joined.languages == ("qac", "qaa")
    assert "agreement of heads (mean Jaccard): of two languages" in table
    for name, folder in runs.items():
        output_of(capsys, "discover", folder, "--masks", tmp_path / name / "m", *options)
        assert joined.select([name]) == fm.Subnetworks.load(tmp_path / name / "m")
    made_from = json.loads(read_metadata(tmp_path / "m")["made_from"])
    assert (made_from["vote"], made_from["draws"]) == (None, 1)


def test_discover_at_a_density(run, data, capsys, tmp_path):
    """With a density as many units are kept as were asked for; a vote that is asked for counts."""
    options = ["--density", "0.25", "--draws", "3", "--score-sentences", "4", "--units", "heads"]
    for vote, live in (([], [2]), (["--combine", "intersection"], [2]), (["--combine", "union"], range(2, 7))):
        output_of(capsys, "discover", run, "--data", data, "--masks", tmp_path / "m", *options, *vote)
        assert set(fm.Subnetworks.load(tmp_path / "m").heads.sum((1, 2)).tolist()) <= set(live)
        made_from = json.loads(read_metadata(tmp_path / "m")["made_from"])
        assert made_from["vote"] == (vote[-1] if vote else "most")


@pytest.fixture(scope="module")
def half_without_dev(tmp_path_factory, data):
    """The treebanks, without the dev file of qac."""
    folder = tmp_path_factory.mktemp("nodev") / "ud"
    shutil.copytree(data, folder)
    for path in folder.glob("UD_*/qac_*-dev.conllu"):
        path.unlink()
    return folder


def test_discover_without_dev_data(run, half_without_dev, capsys, tmp_path):
    """Every number must be called what it is: without dev data there is no LAS, but a loss."""
    options = ["--tau", "0.9", "--draws", "2", "--score-sentences", "8", "--units", "heads"]
    arguments = ["discover", run, "--data", half_without_dev, "--masks", tmp_path / "m", *options]
    assert main([str(argument) for argument in arguments]) == 0
    said, shown = capsys.readouterr().err, None
    for line in said.splitlines():
        words = line.split()
        if words[1:2] == ["round"]:
            assert ("dev LAS" in line, "loss on the scoring examples" in line) == (
                words[0] == "qaa",
                words[0] == "qac",
            )
            if words[0] == "qac":
                shown = shown or line
    assert shown is not None
    assert shown.endswith("(no dev score to go by; the loss may rise by 0.105)")
    assert 2 < float(re.search(r"examples (\d+\.\d+)", shown)[1]) < 10  # a cross entropy, hardly trained
    made_from = json.loads(read_metadata(tmp_path / "m")["made_from"])
    assert (made_from["vote"], made_from["tau"]) == ("majority", 0.9)
    assert "density" not in made_from  # that of the run is not what was asked for


def test_train_without_dev_data(half_without_dev, tiny, capsys, tmp_path):
    """A run must not call a loss LAS either."""
    arguments = ["--data", half_without_dev, "--out", tmp_path / "r", "--steps", "2", "--units", "heads", *tiny]
    assert main(["train", *map(str, arguments)]) == 0
    said = capsys.readouterr().err
    assert "  qac round 0: 8 heads  loss on the scoring examples " in said
    assert not [line for line in said.splitlines() if "qac" in line and "LAS" in line]


def test_discover_what_cannot_be_combined(run, data, capsys, tmp_path):
    """Runs of other settings must be refused before anything is computed."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    settings = (other / "config.yaml").read_text()
    names = ["config.yaml", "masks.safetensors", *(f"model/{name}" for name in files_in(other / "model"))]

    def trained_with(old, new):
        (other / "config.yaml").write_text(settings.replace(old, new))
        write_manifest(other / MANIFEST, names)

    trained_with("density: 0.4", "density: 0.3")
    arguments = ["discover", run, other, "--data", data, "--masks", tmp_path / "m"]
    assert "density is 0.4 in " in output_of(capsys, *arguments, code=1)
    said = output_of(capsys, "discover", run, "--masks", tmp_path / "m", "--tau", "0.9", "--density", "0.5", code=1)
    assert "--tau and --density are both given" in said
    assert not (tmp_path / "m").exists()


def test_full_method_has_no_subnetworks(data, tiny, capsys, tmp_path):
    """A run of the full network leaves no masks, and is scored without them."""
    arguments = ["--data", data, "--out", tmp_path / "full", "--steps", "3", "--method", "full"]
    table = output_of(capsys, "train", *arguments, *tiny)
    assert not (tmp_path / "full" / "masks.safetensors").exists()
    assert "mean of 2" in table
    output_of(capsys, "evaluate", tmp_path / "full", "--data", data)


def test_options_that_would_not_count(run, data, capsys, tmp_path):
    """Of two options only one of which counts, none is ignored; an option counts more than a file."""
    start = ["train", "--data", data, "--out", tmp_path / "out", "--steps", "3"]
    for method in ("full", "vector"):
        said = output_of(capsys, *start, "--method", method, "--masks", run / "masks.safetensors", code=1)
        assert f"--masks is given, and method '{method}' trains no subnetworks" in said
    assert "--tau and --density are both given" in output_of(capsys, *start, "--tau", "0.9", "--density", "0.5", code=1)
    for given in (["--density", "0.1"], ["--units", "heads"], ["--score", "entropy"]):
        said = output_of(capsys, *start, "--masks", run / "masks.safetensors", *given, code=1)
        assert f"--masks and {given[0]} are both given" in said
    typo = ["train", "--out", tmp_path / "out", "--resume"]
    assert f"{tmp_path / 'out'} holds no run" in output_of(capsys, *typo, code=1)
    assert not (tmp_path / "out").exists()
    file = tmp_path / "config.yaml"
    file.write_text("density: 0.5\nsteps: 3\n")
    options = Namespace(config=file, **{"setting:tau": 0.9})
    assert (_config(options).density, _config(options).tau) == (None, 0.9)


def test_the_demonstration_is_as_its_help_says():
    """Without data there are 450 steps of 64 sentences, unless told otherwise; with data, the defaults of the page."""
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(TrainConfig)}
    for given, steps, size in (({}, 450, 64), ({"steps": 7}, 7, 64), ({"batch_size": 8}, 450, 8)):
        config = _config(Namespace(config=None, **{f"setting:{name}": value for name, value in given.items()}))
        assert (config.steps, config.batch_size) == (steps, size)
    assert "450 in the demonstration" in help_of["steps"]
    assert "64 in the demonstration" in help_of["batch_size"]
    config = _config(Namespace(config=None, **{"setting:data": "UD"}))
    assert (config.steps, config.batch_size) == (1500, 32)


def test_discover_in_encoders_from_scratch(small_run, small_data, capsys, tmp_path):
    """Heads of two encoders trained from scratch with different seeds have nothing to do with each other."""
    other = make_run(tmp_path / "other", small_data, method="full", seed=1, steps=2)
    said = output_of(capsys, "discover", small_run, other, "--masks", tmp_path / "m.safetensors", code=1)
    assert "did not start from the same weights" in said


def test_an_encoder_on_disk(data, capsys, tmp_path):
    """`--model DIR` is loaded, gets masks, and is loaded back with them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    text = "".join(path.read_text() for path in data.glob("UD_*/*-train.conllu"))
    letters = sorted({letter for letter in text if letter.isalpha()})
    pieces = {
        piece: i for i, piece in enumerate(["<pad>", "<unk>", "<s>", "</s>", *letters, *("##" + c for c in letters)])
    }
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "encoder")
    config = XLMRobertaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=300,
        pad_token_id=0,
    )
    XLMRobertaModel(config).save_pretrained(tmp_path / "encoder")
    arguments = ["--data", data, "--model", tmp_path / "encoder", "--density", "0.5", "--steps", "3", *TINY]
    output_of(capsys, "train", *arguments, "--out", tmp_path / "run")
    subnets = fm.Subnetworks.load(tmp_path / "run" / "masks.safetensors")
    assert subnets.heads.shape == (2, 2, 4)
    assert "qaa" in output_of(capsys, "evaluate", tmp_path / "run", "--data", data)


def test_settings_from_a_file_and_overrides(data, capsys, tmp_path):
    """Settings may come from a YAML file; what is given on the command line beats it."""
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {data}\nlanguages: [qaa, qac]\nmethod: full\nsteps: 2\nbatch_size: 4\nthreads: 1\n")
    output_of(capsys, "train", "--config", config, "--out", tmp_path / "run", "--steps", "3")
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert (settings["steps"], settings["batch_size"], settings["method"]) == (3, 4, "full")


def test_killed_and_resumed_ends_the_same(run, data, tiny, tmp_path):
    """A killed run resumes where it stopped and ends with the masks and scores of an unbroken one."""
    out = tmp_path / "killed"
    command = ["train", "--data", str(data), "--out", str(out)]
    command += ["--steps", "6", "--density", "0.4", "--checkpoint-every", "1", *tiny]
    process = start_process(main, command)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert main(["train", "--out", str(out), "--resume"]) == 0  # with the settings the run was started with
    for name in ("masks.safetensors",):
        assert fm.Subnetworks.load(out / name) == fm.Subnetworks.load(run / name)
    ended, unbroken = (json.loads((folder / "results.json").read_text())["test"] for folder in (out, run))
    for row, expected in zip(ended, unbroken, strict=True):
        assert {k: v for k, v in row.items() if "per_second" not in k} == {
            k: v for k, v in expected.items() if "per_second" not in k
        }


class TestErrors:
    """Exit code 1, one message that says what is wrong, no traceback, nothing lost."""

    def test_out_holds_another_run(self, run, data, tiny, capsys):
        before = (run / "results.json").read_bytes()
        said = output_of(capsys, "train", "--data", data, "--out", run, "--steps", "3", *tiny, code=1)
        assert "which holds a run" in said
        assert (run / "results.json").read_bytes() == before

    def test_resume_with_other_settings(self, run, data, tiny, capsys):
        said = output_of(capsys, "train", "--data", data, "--out", run, "--steps", "9", "--resume", *tiny, code=1)
        assert "steps was 6 and is 9" in said

    def test_no_data(self, capsys, tmp_path):
        said = output_of(capsys, "train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", code=1)
        assert f"--data is {tmp_path / 'nowhere'}: there is no such folder or file" in said
        assert not (tmp_path / "run").exists()

    def test_unknown_language(self, data, capsys, tmp_path):
        arguments = ["--data", data, "--languages", "qaa,qax", "--out", tmp_path / "run"]
        assert "did you mean" in output_of(capsys, "train", *arguments, code=1)

    def test_malformed_treebank(self, data, capsys, tmp_path):
        bank = tmp_path / "ud" / "UD_Broken-Toy"
        bank.mkdir(parents=True)
        source = next(data.glob("UD_*/qaa_toy-ud-train.conllu")).read_text().splitlines()
        number = next(i for i, line in enumerate(source) if line.startswith("2\t"))
        source[number] = source[number].rsplit("\t", 1)[0]
        (bank / "qaa_toy-ud-train.conllu").write_text("\n".join(source) + "\n\n")
        said = output_of(capsys, "train", "--data", tmp_path / "ud", "--out", tmp_path / "run", code=1)
        assert f"qaa_toy-ud-train.conllu:{number + 1}:" in said

    def test_no_gpu(self, data, capsys, tmp_path):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        said = output_of(capsys, "train", "--data", data, "--out", tmp_path / "run", "--device", "cuda", *TINY, code=1)
        assert "finds no GPU here" in said

    def test_not_a_run(self, capsys, tmp_path):
        assert "there is no such folder" in output_of(capsys, "evaluate", tmp_path / "nowhere", code=1)
        assert "is not a run" in output_of(capsys, "evaluate", tmp_path, code=1)

    def test_masks_of_another_model(self, data, tiny, capsys, tmp_path):
        from transformers import BertConfig

        config = BertConfig(num_hidden_layers=3, num_attention_heads=4, hidden_size=16, intermediate_size=8)
        fm.Subnetworks.random(config, ["qaa", "qac"], 0.5, 0).save(tmp_path / "masks.safetensors")
        arguments = ["--data", data, "--out", tmp_path / "run", "--masks", tmp_path / "masks.safetensors"]
        said = output_of(capsys, "train", *arguments, "--steps", "3", *tiny, code=1)
        assert "masks are for 3 layers of 4 heads, this BertModel has 2 layers of 4 heads" in said

    def test_truncated_masks(self, run, capsys, tmp_path):
        broken = tmp_path / "masks.safetensors"
        broken.write_bytes((run / "masks.safetensors").read_bytes()[:-20])
        assert "is not a safetensors file, or is truncated" in output_of(capsys, "masks", broken, code=1)

    def test_predict_with_an_unknown_language(self, run, data, capsys, tmp_path):
        source = next(data.glob("UD_*/qac_toy-ud-test.conllu"))
        said = output_of(capsys, "predict", run, source, tmp_path / "out", "--language", "qab", code=1)
        assert "unknown language 'qab'; did you mean" in said
        assert not (tmp_path / "out").exists()

    def test_wrong_usage(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--method", "sttic"])
        assert stopped.value.code == 2
        assert "invalid choice: 'sttic'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "wrong"),
        [
            (["evaluate", "runs/x", "--splt=dev"], "--splt=dev (did you mean --split?)"),
            (["discover", "runs/x", "--draw-seeds", "3"], "--draw-seeds (did you mean --draws?)"),
            (["train", "--encoder-rate", "1e-4"], "--encoder-rate (did you mean --encoder-lr?)"),
            (["masks", "runs/x", "runs/y"], "runs/y"),
        ],
    )
    def test_an_argument_that_no_option_takes(self, arguments, wrong, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"fastmask {arguments[0]}: error: unrecognized argument: {wrong}"

    def test_debug_shows_the_traceback(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            main(["evaluate", str(tmp_path / "nowhere"), "--debug"])


def test_an_embedded_run_goes_on_with_the_languages_it_was_trained_on(tmp_path):
    """`discover` on an embedded run looks for subnetworks of the languages it was trained on, not of all."""
    options = Namespace(data=None, languages=None)
    folder, languages = which_data(TrainConfig(), str(tmp_path), options)
    assert folder == str(tmp_path / "data")
    assert languages == list(SEEN)
    options = Namespace(data="elsewhere", languages=None)
    assert which_data(TrainConfig(), str(tmp_path), options) == ("elsewhere", list(SEEN))
    masks = Subnetworks(["qaf", "qac"], heads=torch.ones(2, 1, 2, dtype=torch.bool))
    masks.save(tmp_path / "masks.safetensors")
    assert which_data(TrainConfig(), str(tmp_path), options) == ("elsewhere", ["qaf", "qac"])
