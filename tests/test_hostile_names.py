"""Names that are markup to something come out as they are, wherever they are shown, and lead nowhere else.

Pictures of single analyses are in `analysis/test_analysis_figures.py`, and a whole page in
`reports/test_report_page.py`.
"""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from whole_results import whole_result

import fastmask as fm
from fastmask.analysis import drawing
from fastmask.analysis.result import Result
from fastmask.cli import adapt, main, report
from fastmask.cli.compare import print_tables
from fastmask.cli.discover import print_masks
from fastmask.cli.report import Row, console_of, print_scores, round_printer
from fastmask.compare.plan import CONDITIONS, CompareConfig, Plan, arms_of, write_result
from fastmask.compare.report import markdown_table, write_report
from fastmask.discovery import Round
from fastmask.tasks.parsing.task import Parsing
from fastmask.unseen import Choice

NAMES = ["[/b]", "[red]x", ":warning:", "_en", "<i>&", "a|b", "../up", "=1+1", "*x* `y`"]


def cells_of(table):
    """The cells of a table as it was printed, by row."""
    lines = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if re.match("[│┃]", line.strip())]
    return [[cell.strip() for cell in line] for line in lines]


def masks(names=NAMES):
    generator = torch.Generator().manual_seed(0)
    return fm.Subnetworks(names, heads=torch.rand(len(names), 2, 4, generator=generator) < 0.6)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_console(is_terminal):
    """Lines, titles, headers and cells are printed letter for letter, on a terminal and in a file."""
    from rich.table import Table

    file = io.StringIO()
    file.isatty = lambda: is_terminal
    console = console_of(file)
    for name in NAMES:
        console.print(name)
        table = Table(title=name)
        table.add_column(name)
        table.add_row(name)
        console.print(table)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # the console's own colours
    for name in NAMES:
        assert len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", plain)) >= 4, name


def test_tables_of_the_commands(capsys):
    """The tables and lines that commands print must show every name."""
    file = io.StringIO()
    print_masks(masks(), file)
    assert [row[0] for row in cells_of(file.getvalue())][1:] == NAMES
    file = io.StringIO()
    print_scores([Row(name, None, 1, 1, {"las": 50.0}) for name in NAMES], Parsing, file)
    assert [row[0] for row in cells_of(file.getvalue())][1 : 1 + len(NAMES)] == NAMES
    file = io.StringIO()
    for name in NAMES:
        round_printer(file, 0.95, "las")(Round(name, 1, {"heads": 3}, 1.0, True, True))
    assert [line.split(" round")[0].strip() for line in file.getvalue().splitlines()] == NAMES
    losses = {name: float(place) for place, name in enumerate(NAMES)}
    adapt.print_choice(Choice(0, NAMES[0], losses=losses), "[/x]", None)
    shown = capsys.readouterr().out
    assert "which subnetwork for [/x]" in shown
    assert [row[0] for row in cells_of(shown)][1:] == NAMES
    assert [row[2] for row in cells_of(shown)][1:] == ["chosen", *[""] * (len(NAMES) - 1)]


def test_masks_file_of_a_stranger(tmp_path, capsys):
    """`fastmask masks` must show whatever names a file holds; those with control characters are refused."""
    masks().save(tmp_path / "m", {"made_from": "[/b]"})
    assert main(["masks", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "made from [/b]" in shown
    assert [row[0] for row in cells_of(shown)][1:] == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    for name in ("e\x1b", "a\nb"):
        with pytest.raises(ValueError, match=r"without control characters, given \['[ae]\\(x1b|nb)'\]"):
            masks([name, "x"])


def test_markdown():
    """A name must neither end its cell nor format anything."""
    lines = markdown_table(["name", "x"], [[name, "1"] for name in NAMES])
    assert lines[1] == "| --- | --- |"
    for line, name in zip(lines[2:], NAMES, strict=True):
        cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
        assert len(cells) == 4, line
        assert re.sub(r"\\(.)", r"\1", cells[1].strip()) == name
        assert not re.search(r"(?<!\\)(?:\\\\)*[*_`<\[]", cells[1])


def test_a_comparison_writes_its_files_and_nothing_else(tmp_path, capsys, monkeypatch):
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
    files = write_report(plan, "fastmask compare --out '[/b]'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert all(path.parent == plan.out for path in files)
    text = (plan.out / "summary.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table.splitlines()}
        assert len(widths) == 1, table
    scores = pd.read_csv(plan.out / "results.csv")
    assert list(scores.language[: len(NAMES)]) == NAMES
    monkeypatch.setattr(report, "WIDTH", 400)
    print_tables(plan, sys.stdout)
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)


def test_csv_is_read_as_it_was_written(tmp_path):
    """Names in a table must come back letter for letter: CSV is data, and nothing is added to it."""
    odd = [*NAMES, 'q"uote', "com,ma", "tw\no", " space "]
    table = pd.DataFrame({"language": odd, "value": np.arange(len(odd))})
    Result("it", table, "", lambda: drawing.new_figure(1, 1)).save(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "it.csv"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
