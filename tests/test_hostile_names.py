"""Names that are markup to something come out as they are, wherever they are shown, and lead nowhere else.

Pictures of single analyses are in `analysis/test_analysis_figures.py`, and a whole page in
`reports/test_report_page.py`.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from whole_results import whole_result

import fastmask as fm
from fastmask.analysis import drawing
from fastmask.analysis.result import Result
from fastmask.cli import adapt, main
from fastmask.cli.masks import print_masks
from fastmask.cli.pictures import head_use
from fastmask.cli.report import Row, print_scores, round_printer
from fastmask.compare import pictures
from fastmask.compare.plan import CONDITIONS, CompareConfig, Plan, arms_of
from fastmask.compare.report import print_tables, write_report
from fastmask.compare.results import write_result
from fastmask.compare.tables import scores_table
from fastmask.discovery import Quality, Round
from fastmask.literal import fenced, markdown_table, printable, say
from fastmask.tasks.parsing.task import Parsing
from fastmask.terminal import LiteralConsole, console_of
from fastmask.unseen import Choice

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["[/b]", "[red]x", ":warning:", r"$\frac$", "$x_1$", r"\$", "_en", "<i>&", "a|b", "../up", "=1+1", "*x* `y`"]
CONTROL = "e\x1b[31mn\x07\x85\u202e\udc80"
WRITTEN = r"e\x1b[31mn\x07\x85\u202e\udc80"


def cells_of(table):
    """The cells of a table as it was printed, by row."""
    lines = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if re.match("[│┃]", line.strip())]
    return [[cell.strip() for cell in line] for line in lines]


def masks(names=NAMES, units=("heads", "neurons")):
    generator = torch.Generator().manual_seed(0)
    sizes = {"heads": 4, "neurons": 16}
    parts = {kind: torch.rand(len(names), 2, size, generator=generator) < 0.6 for kind, size in sizes.items()}
    return fm.Subnetworks(names, **{kind: parts[kind] for kind in units})


# ---- terminals


@pytest.mark.parametrize("is_terminal", [False, True])
def test_console(is_terminal):
    """Lines, titles, headers and cells are printed letter for letter, on a terminal and in a file."""
    from rich.table import Table

    file = io.StringIO()
    file.isatty = lambda: is_terminal
    console = console_of(file)
    assert isinstance(console, LiteralConsole)
    for name in NAMES:
        console.print(name, highlight=False)
        table = Table(title=name)
        table.add_column(name)
        table.add_row(name)
        console.print(table)
    shown = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # the console's own colours
    for name in NAMES:
        assert len(re.findall(rf"(?<![\w$\\]){re.escape(name)}(?![\w$])", plain)) >= 4, name


def test_commands_are_no_commands_to_the_terminal(capsys):
    """Escape codes, turned text and what cannot be encoded must be written out."""
    assert printable(CONTROL) == WRITTEN
    assert printable("Ελληνικά فارسی 日本語 नेपाली\tx\n\u200c") == "Ελληνικά فارسی 日本語 नेपाली\tx\n\u200c"
    file = io.StringIO()
    console_of(file).print(CONTROL)
    say(CONTROL, file)
    assert file.getvalue() == f"{WRITTEN}\n{WRITTEN}\n"
    assert main(["masks", f"no-such-{CONTROL}"]) == 1
    assert f"no-such-{WRITTEN}" in capsys.readouterr().err


def test_tables_of_the_commands(capsys):
    """The tables and lines that commands print must show every name."""
    file = io.StringIO()
    print_masks(masks(units=("heads",)), file)
    assert [row[0] for row in cells_of(file.getvalue())][1:] == NAMES
    file = io.StringIO()
    print_scores([Row(name, None, 1, {"las": 50.0}, 100.0) for name in NAMES], Parsing, file)
    assert [row[0] for row in cells_of(file.getvalue())][1 : 1 + len(NAMES)] == NAMES
    file = io.StringIO()
    for name in NAMES:
        round_printer(file, 0.95, "las")(Round(name, 1, 3, None, Quality(loss=1.0), True))
    assert [line.split(" round")[0].strip() for line in file.getvalue().splitlines()] == NAMES
    losses = {name: float(place) for place, name in enumerate(NAMES)}
    adapt._print_choice(Choice(NAMES[0], 0, losses=losses), "[/x]", None)
    shown = capsys.readouterr().out
    assert "which subnetwork for [/x]" in shown
    assert [row[0] for row in cells_of(shown)][1:] == NAMES


def test_masks_file_of_a_stranger(tmp_path, capsys):
    """`fastmask masks` must show and draw whatever names a file holds, and what its maker wrote into it."""
    masks().save(tmp_path / "m", {"made_from": f"[/b] {CONTROL[:3]}"})
    assert main(["masks", str(tmp_path / "m"), "--picture", str(tmp_path / "p.svg")]) == 0
    shown = capsys.readouterr().out
    assert r"made from [/b] e\x1b[" in shown
    assert [row[0] for row in cells_of(shown)][1:] == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "p.svg"]
    for name in ("e\x1b", "a\nb"):
        with pytest.raises(ValueError, match=r"without control characters, given \['[ae]\\(x1b|nb)'\]"):
            masks([name, "x"])


HOSTILE = "e\x1b[31mn\x07\u202e"


def said_of(capsys, *arguments, code=0):
    """What a command printed, in which nothing may be a command to the terminal."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    said = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said), said
    return said


def test_folders_of_a_stranger(tmp_path, small_run, small_data, capsys):
    """`train`, `predict` and `compare` print the names of what they read and write without escape codes."""
    folder = tmp_path / HOSTILE
    written = re.escape(printable(HOSTILE))
    said = said_of(capsys, "train", "--out", folder / "embedded", "--density", "0.0001", code=1)
    assert re.search(rf"no --data given: .*{written}/embedded", said)
    source = next(small_data.glob("UD_*/qaa_toy-ud-test.conllu"))
    said = said_of(capsys, "predict", small_run, source, folder / "out.conllu")
    assert re.search(rf"3 sentences written to .*{written}/out\.conllu", said)
    options = {"train": "qaa,qac", "unseen": "qad", "seeds": 1, "shots": 2}
    arms = arms_of(["full"], ["none"])
    plan = Plan(folder / "compared", str(small_data), CompareConfig(**options), {}, arms)
    plan.open()
    scored = {"language": "qad", "score": 50.0, "choice": "full", "subnetwork": "full"}
    for job in plan.jobs:
        write_result(plan, job, whole_result([{"condition": condition, **scored} for condition in CONDITIONS]))
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    given += ["--methods", "full", "--metas", "none"]
    said = said_of(capsys, "compare", "--data", small_data, "--out", plan.out, "--workers", "1", *given)
    assert re.search(rf"comparison: .*{written}/compared", said)


def test_lines_of_the_commands():
    """No module may print what is not its own words but through `say`."""
    for path in sorted((ROOT / "fastmask").rglob("*.py")):
        if path.name != "literal.py":
            assert not re.search(r'(?<![\w.])print\((?!")', path.read_text(encoding="utf-8")), path


def test_one_console_and_one_figure():
    """No module may make a console that reads markup, or a figure that reads mathematics."""
    for folder in ("fastmask", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            made = re.search(r"(?<!Literal)Console\(", text.replace("class LiteralConsole(Console)", ""))
            assert made is None, path
            assert path.name == "terminal.py" or "rich.console" not in text, path
            assert "plt." not in text, path
            figures = re.search(r"(?<!Literal)Figure\(", text.replace("class LiteralFigure(Figure)", ""))
            assert figures is None, path


# ---- pictures


@pytest.fixture
def drawn(monkeypatch):
    """The texts that pictures show, as they were laid out: (text, whether it was taken for mathematics)."""
    found = []
    draw = Text.draw

    def recorded(text, renderer):
        if text.get_visible() and text.get_text():
            found.append(text._preprocess_math(text.get_text()))
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    return found


def literal(found, names=NAMES):
    """Whether every name was drawn, letter for letter."""
    assert not [text for text, kind in found if kind]
    assert set(names) <= {text for text, _ in found}


def test_picture_of_masks(drawn, tmp_path):
    """The picture of a masks file must show every name."""
    head_use(masks(), tmp_path / "p.png")
    literal(drawn)


def test_pictures_of_a_comparison(drawn, tmp_path):
    """The pictures of a comparison must show every language."""
    scores = scores_table(
        {
            (0, method): {
                "scores": [{"condition": "seen", "language": name, "score": 50.0 + at} for at, name in enumerate(NAMES)]
            }
            for method in ("full", "static")
        }
    )
    plan = Plan(tmp_path, "", CompareConfig(train="a", unseen="b"), {}, arms_of(["full", "static"], ["none"]))
    pictures.draw_gains(plan, scores, "full", "seen", "LAS", tmp_path / "g.png")
    literal(drawn)
    pictures.draw_means(plan, scores, "LAS", tmp_path / "m.png")
    assert not [text for text, kind in drawn if kind]


def test_names_of_families_in_the_legend(drawn):
    """A family whose name starts with an underscore must stand in the legend, too."""
    names = [f"l{number}" for number in range(len(NAMES))]
    families = {name: ("_family", "$x$")[at % 2] for at, name in enumerate(names)}
    fm.analysis.overlap(masks(names), families=families).pictures()
    literal(drawn, ["_family", "$x$", *names])


def test_points_with_names(drawn):
    """Names beside points are measured before anything is drawn, and must be taken as they are there, too."""
    figure = drawing.new_figure(5, 4)
    axis = figure.subplots()
    axis.plot(range(len(NAMES)), range(len(NAMES)), "o")
    drawing.label_points(axis, range(len(NAMES)), range(len(NAMES)), NAMES)
    figure.savefig(io.BytesIO(), format="png")
    literal(drawn)


# ---- Markdown, CSV and files


def test_markdown():
    """A name must neither end its cell nor format anything, and a block of code must end where it should."""
    lines = markdown_table(["name", "x"], [[name, "1"] for name in [*NAMES, "two\nlines"]])
    assert lines[1] == "| --- | --- |"
    for line, name in zip(lines[2:], [*NAMES, "two lines"], strict=True):
        cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
        assert len(cells) == 4, line
        assert re.sub(r"\\(.)", r"\1", cells[1].strip()) == name
        assert not re.search(r"(?<!\\)(?:\\\\)*[*_`<\[]", cells[1])
    assert fenced("a ``` b") == ["````", "a ``` b", "````"]


def test_a_comparison_writes_its_files_and_nothing_else(tmp_path, capsys):
    """All files of a comparison must be in its folder, and its tables must hold together, whatever the names."""
    arms = arms_of(["full", "static"], ["none", "fomaml"])
    plan = Plan(tmp_path / "out", "", CompareConfig(train="a", unseen="b", seeds=1), {}, arms)
    for job in plan.cells:
        rows = [
            {"condition": condition, "language": name, "score": 50.0, "choice": choice, "subnetwork": choice}
            for condition in CONDITIONS
            for name, choice in zip(NAMES, reversed(NAMES), strict=True)
        ]
        write_result(plan, job, whole_result(rows))
    files = write_report(plan, "fastmask compare ``` | --out '[/b]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert all(path.parent == plan.out for path in files)
    text = (plan.out / "summary.md").read_text()
    assert "\n````\nfastmask compare ``` | --out '[/b]'\n````\n" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table.splitlines()}
        assert len(widths) == 1, table
    scores = pd.read_csv(plan.out / "results.csv")
    assert list(scores.language[: len(NAMES)]) == NAMES
    print_tables(plan, LiteralConsole(width=400))
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)


def test_csv_is_read_as_it_was_written(tmp_path):
    """Names in a table must come back letter for letter: CSV is data, and nothing is added to it."""
    odd = [*NAMES, 'q"uote', "com,ma", "tw\no", " space "]
    table = pd.DataFrame({"language": odd, "value": np.arange(len(odd))})
    Result("it", table, "", lambda: drawing.new_figure(1, 1)).save(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "it.csv"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
