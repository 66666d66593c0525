"""`python -m benchmarks` as a person types it, at toy sizes; and what it makes of stored rows."""

from __future__ import annotations

import stat
from dataclasses import replace

import pytest
from made_rows import FULL, made_row, three

from benchmarks import __main__ as command
from benchmarks import row as rows_file
from benchmarks import tables
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.row import Job, Setting, Spread
from benchmarks.targets import Target

TOY = ["--shape", "toy", "--layers", "1", "--tokens", "4", "--batch", "4", "--languages", "2", "--seconds", "0"]
TOY += ["--threads", "1"]
JOB = Job(Setting("encoder"))
DENSE = ("dense",)


@pytest.fixture
def toy(tmp_path, capsys):
    """Run the command at toy sizes; returns (exit code, rows, what was printed)."""

    def run(*arguments: str) -> tuple[int, list[rows_file.Row], str]:
        csv = tmp_path / "rows.csv"
        code = main([*arguments, *TOY, "--csv", str(csv)])
        said = capsys.readouterr()
        return code, rows_file.read(csv) if csv.is_file() else [], said.out + said.err

    return run


@pytest.mark.parametrize("case", CASES)
def test_every_case_from_end_to_end(case, toy):
    """A case dies of a typo when somebody measures it for the first time."""
    code, rows, said = toy(case, "--present", "2", "--peaks")
    assert code == 0, said
    assert {row.implementation for row in rows} >= {"dense", "full", "fastmask"}
    assert {row.part for row in rows} == set(CASES[case].parts)
    for row in rows:
        assert row.setting.case == case
        assert row.rounds >= 2
        assert 0 < row.ms.low <= row.ms.middle <= row.ms.high
        base = {"dense": row.over_dense, "full": row.over_full}.get(row.implementation)
        assert base is None or base == (1, 1, 1)
        assert row.over_full.low <= row.over_full.middle <= row.over_full.high
        assert row.peak_mib > 0
        assert row.machine.processor
    assert "our dense: the whole network through fastmask" in said


def test_a_sweep_is_a_product(toy):
    """Settings are dropped, or measured under another name."""
    code, rows, said = toy("op", "--density", "1,0.5", "--unit", "neurons,weights", "--parts", "dW",
                           "--implementations", "fastmask")  # fmt: skip
    assert code == 0, said
    ours = [(row.setting.unit, row.setting.density) for row in rows if row.implementation == "fastmask"]
    assert sorted(ours) == [(unit, density) for unit in ("neurons", "weights") for density in (0.5, 1.0)]
    assert {(row.part, row.implementation) for row in rows} == {("dW", name) for name in ("dense", "full", "fastmask")}


def test_processes(toy):
    """Three processes are one, or their range is lost."""
    code, rows, said = toy("op", "--parts", "forward", "--implementations", "fastmask", "--processes", "2")
    assert code == 0, said
    assert [row.processes for row in rows] == [2, 2, 2]
    assert "Medians of 2 processes" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encodr"], "unknown plan or case 'encodr'; did you mean 'encoder'"),
        (["op", "--unit", "neuron"], "unknown unit 'neuron'; did you mean 'neurons'"),
        (["op", "--unit", "both"], "unknown unit of the case 'op' 'both'"),
        (["op", "--density", "1.5"], "density is 1.5 (expected above 0 and at most 1)"),
        (["op", "--density", "half"], "--density: 'half' is not a number"),
        (["op", "--present", "9", "--languages", "8"], "present is 9 (expected at most the languages"),
        (["op", "--present", "8", "--languages", "8"], "present is 8 (expected at most the examples, 4)"),
        (["op", "--unit", "blocks64"], "blocks64 do not divide a weight of (64, 32) (shape toy)"),
        (["op", "--implementations", "looop"], "did you mean 'loop'"),
        (["op", "--parts", "backward"], "unknown part of the case 'op' 'backward'; did you mean 'forward+backward'"),
        (["episode", "--compile"], "the case 'episode' has no compiled form"),
        (["quick"], "the plan 'quick' has settings of its own"),
        (["op", "--processes", "0"], "--processes 0: expected at least 1"),
        (["op", "--csv", __file__], "is there already: name another file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(arguments, message, capsys, monkeypatch):
    """A mistake is found after an hour of measuring, or ends in a traceback."""
    monkeypatch.setattr(command, "measure_in", lambda *_: pytest.fail("something was measured"))
    defaults = [x for pair in zip(TOY[::2], TOY[1::2], strict=True) if pair[0] not in arguments for x in pair]
    assert main([*arguments, *defaults]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- what is done with stored rows


def test_compare(tmp_path, capsys):
    """A regression does not fail the command, or what did not change is shown."""
    before, now = tmp_path / "before.csv", tmp_path / "now.csv"
    rows_file.write(before, [*three(), *three(4.0, density=0.25), *three(1.3, density=0.75)])
    rows_file.write(now, [*three(1.5), *three(4.0, density=0.25), *three(8.0, density=0.1)])
    assert main(["--from", str(now), "--compare", str(before)]) == 1
    said = capsys.readouterr().out.split("against")[1]
    assert [said.count(word) for word in ("slower", "faster", "missing", "new")] == [1, 0, 2, 2]
    assert "4 measurements in both runs, 3 of them unchanged within noise" in said
    assert main(["--from", str(now), "--compare", str(now)]) == 0


def test_readme(tmp_path):
    """The README's table is what was measured; the text around it stays, and a link to a file stays one."""
    csv, readme, real = tmp_path / "rows.csv", tmp_path / "README.md", tmp_path / "real.md"
    one, mixed = three(2.97, kept_mib=100.0), three(2.4, present=8, batch=16)
    rows_file.write(csv, [*one[:2], replace(one[2], kept_mib=51.0), *mixed, made_row("multiply", 0.97)])
    real.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    real.chmod(0o600)
    readme.symlink_to("real.md")
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 0
    assert readme.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n| half of")
    assert text.endswith("<!-- benchmarks:end -->\nafter\n")
    ours = "| 1.86x (1.82-1.89) | 2.97x (2.91-3.03) | 2.00x | 0.51x |"
    assert f"| four BERT-base layers, one language, 8 x 128 tokens {ours}" in text
    assert "| the same, 8 languages in one batch, 16 x 128 tokens | 1.50x" in text
    assert "a processor, with a comma (model 2), PyTorch 2.13.0, 2026-11-20" in text
    rows_file.write(csv, one)
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 2  # the second line is missing
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["no marks", "<!-- benchmarks:end --><!-- benchmarks:begin -->"])
def test_readme_without_marks(text, tmp_path, capsys):
    """The table is written nowhere, or over the whole file."""
    csv, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    rows_file.write(csv, [*three(), *three(present=8, batch=16)])
    readme.write_text(text)
    assert main(["--from", str(csv), "--update-readme", str(readme)]) == 2
    assert "benchmarks:begin" in capsys.readouterr().err
    assert readme.read_text() == text


def test_pictures(tmp_path, capsys):
    """Pictures are not drawn, or of other rows."""
    csv, folder = tmp_path / "rows.csv", tmp_path / "pictures"
    rows = [
        row
        for present in (1, 8)
        for density in (1.0, 0.5, 0.25)
        for row in three(0.9 / density, density=density, present=present, batch=16)
    ]
    rows_file.write(csv, rows)
    assert main(["--from", str(csv), "--pictures", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["encoder-bert-base-both-forward+backward-128-float32.png"]
    ours = [row for row in rows if row.implementation == "fastmask"]
    lines = {key: [row.setting.density for row in own] for key, own in tables.lines_of(ours).items()}
    assert lines == {(present, 16): [0.25, 0.5, 1.0] for present in (1, 8)}
    rows_file.write(csv, three())
    assert main(["--from", str(csv), "--pictures", str(folder)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


# ---- targets


@pytest.mark.parametrize(
    ("metric", "bound", "against", "value", "reached"),
    [
        ("over dense", 1.8, DENSE, 1.8, True),
        ("over full", 1.2, DENSE, 1.8 / FULL, False),
        ("share", 0.56, DENSE, 0.5625, True),
        ("share", 0.57, DENSE, 0.5625, False),
        ("kept", 0.5, DENSE, 0.5, True),
        ("peak", 0.7, DENSE, 0.75, False),
        ("speed", 1.25, ("loop", "gating"), 1.2, False),  # the faster of the two
        ("peak", 1.0, ("loop", "gating"), 1.5, False),  # the leaner
        ("speed", 1.0, ("compact",), None, None),
    ],
)
def test_readings(metric, bound, against, value, reached):
    """Short is printed as a pass, a ratio is read upside down, or we are held against the slower rival."""
    dense, full, ours = three(1.8, kept_mib=8.0, peak_mib=8.0)
    ours = replace(ours, kept_mib=4.0, peak_mib=6.0)
    rivals = [made_row("loop", 1.0, peak_mib=9.0), made_row("gating", 1.5, peak_mib=4.0)]
    target = Target(JOB, metric, bound, against=against)
    assert target.asks(ours)
    assert not target.asks(full)
    found, verdict = target.verdict([dense, full, ours, *rivals])
    assert found == (None if value is None else pytest.approx(value))
    assert verdict == {True: "pass", False: "SHORT", None: "not measured"}[reached]


def test_targets_of_a_stored_run(tmp_path, capsys, monkeypatch):
    """A missed target does not fail the command, or one that was not measured counts as reached."""
    csv = tmp_path / "rows.csv"
    rows_file.write(csv, three(2.0))
    said = {}
    for bound in (1.9, 2.1):
        monkeypatch.setattr(command, "TARGETS", [Target(JOB, "over dense", bound)])
        code = main(["targets", "--from", str(csv)])
        said[code] = capsys.readouterr().out
    assert "pass" in said[0]
    assert "SHORT" in said[1]
    monkeypatch.setattr(command, "TARGETS", [Target(Job(Setting("encoder", density=0.1)), "over dense", 1.0)])
    assert main(["targets", "--from", str(csv)]) == 1
    assert "not measured" in capsys.readouterr().out


def test_a_spread_is_shown_where_it_is_known():
    """A number without quartiles looks as if it had some."""
    assert (str(Spread(2.0, 2.0, 2.0)), str(Spread(2.0, 1.9, 2.1))) == ("2.00x", "2.00x (1.90-2.10)")
