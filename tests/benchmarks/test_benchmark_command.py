"""`python -m benchmarks` as a person types it, at toy sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_rows import made_row, pair

from benchmarks import command, pictures
from benchmarks import row as rows_file
from benchmarks.cases import CASES
from benchmarks.command import main

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--shape", "toy", "--layers", "1", "--tokens", "4", "--batch", "4", "--languages", "2", "--seconds", "0"]
TOY += ["--threads", "1", "--device", "cpu"]


@pytest.fixture
def toy(tmp_path, capsys):
    """Run the command at toy sizes; returns (exit code, rows, what was printed)."""

    def run(*arguments: str) -> tuple[int, list[rows_file.Row], str]:
        csv = tmp_path / "rows.csv"
        code = main([*arguments, *TOY, *([] if "--csv" in arguments else ["--csv", str(csv)])])
        said = capsys.readouterr()
        return code, rows_file.read(csv) if csv.is_file() else [], said.out + said.err

    return run


@pytest.mark.parametrize("case", CASES)
def test_every_case_from_end_to_end(case, toy):
    """A case dies of a typo when somebody measures it for the first time."""
    more = {"step": ["--present", "2"], "episode": ["--present", "2"]}.get(case, [])
    code, rows, said = toy(case, *more)
    assert code == 0, said
    assert {row.implementation for row in rows} >= {CASES[case].implementations[0], "fastmask"}
    assert {row.part for row in rows} == set(CASES[case].parts)
    for row in rows:
        assert row.case == case
        assert row.rounds >= 3
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.date
        assert row.torch
        if row.implementation == row.baseline:
            assert (row.ratio, row.ideal) == (1, 1)
    assert "fastmask" in said


def test_a_sweep_is_a_product(toy):
    """Settings are dropped, or what cannot be is measured under another name."""
    code, rows, said = toy("op", "--density", "1,0.5", "--unit", "neurons,weights", "--present", "1,3", "--parts", "dW")
    assert code == 0, said
    ours = [(row.unit, row.density, row.present, row.part) for row in rows if row.implementation == "fastmask"]
    assert ours == [(unit, density, 1, "dW") for unit in ("neurons", "weights") for density in (1.0, 0.5)]
    assert "left out: present is 3 (expected at most the languages that masks are held for, 2)" in said


def test_implementations_and_peaks(toy):
    """What was not asked for is measured, or what was is not."""
    code, rows, said = toy("encoder", "--implementations", "loop", "--peaks")
    assert code == 0, said
    assert [row.implementation for row in rows] == ["dense", "loop"]
    assert all(row.peak_mib and row.saved_mib and row.masks_mib for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encodr"], "unknown plan or case 'encodr'; did you mean 'encoder'"),
        (["op", "--unit", "neuron"], "unknown unit 'neuron'; did you mean 'neurons'"),
        (["op", "--unit", "both"], "unknown unit of the case 'op' 'both'"),
        (["op", "--shape", "bert"], "unknown shape 'bert'; did you mean 'bert-base'"),
        (["op", "--dtype", "float16"], "unknown dtype 'float16'; did you mean"),
        (["op", "--density", "1.5"], "density is 1.5 (expected above 0 and at most 1)"),
        (["op", "--density", "0.5,0"], "density is 0 (expected above 0 and at most 1)"),
        (["op", "--density", "half"], "--density half: 'half' is not a number"),
        (["op", "--tokens", "1,,2"], "--tokens 1,,2: '' is not a whole number"),
        (["op", "--present", "9", "--languages", "8"], "present is 9 (expected at most the languages"),
        (["op", "--present", "8", "--languages", "8"], "present is 8 (expected at most the examples of the batch, 4)"),
        (["op", "--unit", "blocks64"], "blocks64 do not divide a weight of 64 x 32 (shape toy)"),
        (["op", "--implementations", "dence"], "did you mean 'dense'"),
        (["op", "--parts", "backward"], "unknown part of the case 'op' 'backward'; did you mean 'forward+backward'"),
        (["episode", "--compile"], "the case 'episode' has no compiled form (those that have: op, layer"),
        (["episode", "--dtype", "bfloat16"], "the case 'episode' runs in float32"),
        (["step", "--present", "1"], "training mixes all languages: present is 1 (expected 2"),
        (["quick", "op"], "'quick' is a plan and stands alone"),
        (["quick"], "the plan 'quick' has settings of its own"),
        (["quick", "--from", "rows.csv"], "--from measures nothing"),
        (["op", "--resume", "--csv", ""], "--resume needs --csv"),
        (["op", "--threads", "two"], "--threads two: 'two' is not a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(arguments, message, capsys, monkeypatch, tmp_path):
    """A mistake is found after an hour of measuring, or ends in a traceback."""
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("something was measured"))
    given = [a for a in arguments if a not in ("--csv", "")]
    names = {a for a in given if a.startswith("--")}
    defaults = [x for name, value in zip(TOY[::2], TOY[1::2], strict=True) if name not in names for x in (name, value)]
    assert main([*given, *defaults]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_little_memory_is_refused(capsys, monkeypatch):
    """A machine dies of a setting that does not fit into it."""
    monkeypatch.setattr("benchmarks.running.available_bytes", lambda device: 2**30)
    assert main(["op", "--shape", "7b", "--unit", "weights", "--languages", "100", "--device", "cpu"]) == 2
    assert "GiB and 1.0 GiB are free" in capsys.readouterr().err


def test_no_compiler(capsys, monkeypatch):
    """`torch.compile` fails deep inside with a page of text."""
    monkeypatch.setattr("benchmarks.compiling.shutil.which", lambda name: None)
    assert main(["op", "--compile", *TOY]) == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten(toy, tmp_path):
    """Hours of measurements are lost by typing a command twice."""
    csv = tmp_path / "rows.csv"
    rows_file.write(csv, pair())
    code, rows, said = toy("op", "--parts", "forward")
    assert code == 2
    assert "is there already: add --resume" in said
    assert rows == pair()


def test_resume_measures_what_is_missing(toy):
    """A killed sweep begins anew, or leaves something out."""
    _, first, _ = toy("op", "--density", "1,0.5", "--parts", "forward", "--implementations", "dense,fastmask")
    more = ("op", "--density", "1,0.5,0.25", "--parts", "forward", "--implementations", "dense,fastmask", "--resume")
    code, rows, said = toy(*more)
    assert code == 0, said
    assert rows[:4] == first
    assert [row.density for row in rows] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_one_process_for_each_number_of_threads(tmp_path, monkeypatch):
    """All rows are measured with the threads of the first ones."""
    csv = tmp_path / "rows.csv"
    argv = ["op", *TOY, "--parts", "forward", "--implementations", "dense"]
    argv[argv.index("--threads") + 1] = "1,2"
    monkeypatch.chdir(ROOT)  # where the processes find `benchmarks`
    assert main([*argv, "--csv", str(csv)]) == 0
    assert [row.threads for row in rows_file.read(csv)] == [1, 2]


def test_one_wrong_implementation_loses_no_other_measurement(toy, monkeypatch):
    """A sweep of hours dies of one setting, or ends well although something is wrong."""
    right = CASES["op"].check

    def check(self):  # type: ignore[no-untyped-def]
        if self.setting.density == 0.5:
            raise RuntimeError("it is wrong: nothing is timed")
        right(self)

    monkeypatch.setattr(CASES["op"], "check", check)
    code, rows, said = toy("op", "--density", "1,0.5,0.25", "--parts", "forward")
    assert code == 1
    assert "FAILED: it is wrong" in said
    assert {row.density for row in rows} == {1.0, 0.25}


def test_list(capsys):
    """Nobody finds out what can be measured."""
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    for name in ("quick", "targets", "growth", "full", "encoder", "discovery", "blocks32", "xlmr-large"):
        assert name in said


# ---- what is done with stored rows


def test_compare_flags_a_regression_and_nothing_else(tmp_path, capsys):
    """A slower library is not noticed, or noise is taken for one."""
    before, now = tmp_path / "before.csv", tmp_path / "now.csv"
    noisy = {"density": 0.9, "spread": 0.2}  # 8% less, but the quartiles overlap
    rows_file.write(
        before, [*pair(), *pair(density=0.25, ratio=4.0), *pair(density=0.75, ratio=1.3), *pair(1.3, **noisy)]
    )
    rows_file.write(
        now, [*pair(1.5), *pair(density=0.25, ratio=3.9), *pair(density=0.1, ratio=8.0), *pair(1.2, **noisy)]
    )
    assert main(["--from", str(now), "--compare", str(before)]) == 1
    said = capsys.readouterr().out.split("against")[1]
    assert [word for word in ("regression", "improvement", "missing", "new") if said.count(word) == 1] == [
        "regression",
        "missing",
        "new",
    ]
    assert "3 measurements in both runs, 2 of them unchanged within noise" in said
    assert main(["--from", str(now), "--compare", str(now)]) == 0


def test_readme(tmp_path, capsys):
    """The README's table drifts away from what was measured, or the text around it is lost."""
    csv, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    rows_file.write(csv, [*pair(1.88), made_row("multiply", 0.97), *pair(3.6, density=0.25)])
    readme.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n| what |")
    assert text.endswith("<!-- benchmarks:end -->\nafter\n")
    assert "old" not in text
    assert "encoder bert-base, heads + neurons at 50%, one language, 8 x 128 | 1.88x (1.84-1.92) | 2.00x" in text
    assert "multiply 0.97x" in text
    assert "0.96 of ideal, **short**" in text  # 1.88 of 2
    assert "speed 1.9x, **short**" in text
    assert "speed 3.5x" in text
    assert "a processor, with a comma, 2 threads, PyTorch 2.13.0, 2026-11-20" in text
    before = readme.read_text()
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 0
    assert readme.read_text() == before  # and again the same


@pytest.mark.parametrize("text", ["no marks", "<!-- benchmarks:end --><!-- benchmarks:begin -->"])
def test_readme_without_marks(text, tmp_path, capsys):
    """The table is written nowhere, or over the whole file."""
    csv, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    rows_file.write(csv, pair())
    readme.write_text(text)
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 2
    assert "benchmarks:begin" in capsys.readouterr().err
    assert readme.read_text() == text


def test_pictures(tmp_path, capsys):
    """Pictures are not drawn, or of other rows."""
    csv, folder = tmp_path / "rows.csv", tmp_path / "pictures"
    rows = [
        row
        for present in (1, 8, 32)
        for density in (1.0, 0.5, 0.25)
        for row in pair(
            0.9 / density, density=density, present=present, languages=present, batch=32, ideal=1 / density,
            saved_mib=100 * density,
        )
    ]  # fmt: skip
    rows_file.write(csv, rows)
    assert main(["--from", str(csv), "--pictures", str(folder)]) == 0
    kinds = sorted(path.name.split("-encoder")[0] for path in folder.iterdir())
    assert kinds == ["break-even-present", *["density"] * 3, *["growth-present"] * 3, *["memory"] * 3]
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())
    rows_file.write(csv, pair())
    assert main(["--from", str(csv), "--pictures", str(folder)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_a_curve_has_one_point_for_each_size():
    """A curve over the languages of a batch doubles back through batches of other sizes."""
    rows = [row for batch, held in ((8, 8), (1, 1), (8, 100)) for row in pair(batch=batch, languages=held, present=1)]
    drawn = pictures._one_of_each(rows, "present")
    assert sorted((row.implementation, row.batch, row.languages) for row in drawn) == [
        ("dense", 1, 1), ("fastmask", 1, 1),
    ]  # fmt: skip


def test_break_even_is_printed(tmp_path, capsys):
    """A sweep over densities does not say from where on masks pay, or says it of another implementation."""
    csv = tmp_path / "rows.csv"
    rows = [row for density, ratio in ((1.0, 0.8), (0.8, 1.0), (0.5, 1.6)) for row in pair(ratio, density=density)]
    rows += [made_row("gating", 0.9, density=density) for density in (1.0, 0.8, 0.5)]
    rows_file.write(csv, rows)
    assert main(["--from", str(csv)]) == 0
    said = capsys.readouterr().out
    assert "one language, 8 x 128, forward+backward: fastmask faster than dense from 80% down" in said
    assert "gating faster than dense nowhere to its end" in said
