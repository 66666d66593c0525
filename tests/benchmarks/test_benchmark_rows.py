"""Rows on disk, of several processes, and beside those of another run."""

from __future__ import annotations

import pytest
from made_rows import made_row, three

from benchmarks import row as rows_file
from benchmarks.measure import merged
from benchmarks.row import Spread
from benchmarks.tables import verdict


def test_round_trip(tmp_path):
    """A value comes back as another one, or as text."""
    rows = [*three(), made_row(note='a "quoted" note, with a comma', kept_mib=1.5, compiled=True, processes=3)]
    rows.append(made_row("multiply", over_dense=None, over_full=Spread(1.25, 1.25, 1.25), masks_mib=None))
    path = tmp_path / "new" / "rows.csv"
    rows_file.write(path, rows)
    assert rows_file.read(path) == rows
    assert rows_file.read(path)[-1].setting == rows[-1].setting
    assert [other.name for other in path.parent.iterdir()] == ["rows.csv"]  # nothing half-written beside it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("over_full_low", "over_all"), "has no column 'over_full_low'"),
        (lambda text: text.replace("False", "no"), "line 2 .*compiled is 'no' .expected True or False"),
        (lambda text: text.replace(",8,128,", ",8,many,"), "tokens is 'many' .expected a number"),
        (lambda text: text.replace("encoder", "encoder,more"), "line 2"),
        (lambda text: "", "has no column 'case'"),
    ],
)
def test_another_file_is_refused(change, message, tmp_path):
    """A file of something else is taken for measurements."""
    path = tmp_path / "rows.csv"
    rows_file.write(path, three())
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        rows_file.read(path)


def test_several_processes_are_merged():
    """One process's quartiles are shown for the range over processes, or a mean for the median."""
    runs = [[made_row("dense", 1.0, 0.0), made_row(speed=speed)] for speed in (2.0, 3.2, 2.5)]
    dense, ours = merged(runs)
    assert (dense.implementation, ours.implementation) == ("dense", "fastmask")
    assert ours.over_dense == Spread(2.5, 2.0, 3.2)
    assert ours.over_full == Spread(2.5 / 1.6, 2.0 / 1.6, 3.2 / 1.6)
    assert (ours.processes, ours.rounds) == (3, 27)
    assert ours.share == pytest.approx(2.5 / 1.6 / 2)
    assert ours.noisy
    assert not runs[0][1].noisy


def test_a_file_may_know_no_quartiles(tmp_path):
    """A stored median without quartiles is read as it is, and shown without a range."""
    path = tmp_path / "rows.csv"
    rows_file.write(path, three())
    one, *others = path.read_text().splitlines()
    path.write_text("\n".join([one, *(line.replace(",1.96,2.04,", ",,,") for line in others)]))
    assert rows_file.read(path)[-1].over_dense == (2, 2, 2)
    assert str(rows_file.read(path)[-1].over_dense) == "2.00x"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (Spread(2.0, 1.96, 2.04), Spread(1.5, 1.47, 1.53), "slower"),
        (Spread(2.0, 1.96, 2.04), Spread(2.6, 2.55, 2.65), "faster"),
        (Spread(2.0, 2.0, 2.0), Spread(1.95, 1.95, 1.95), ""),  # by less than 3%
        (Spread(2.0, 1.6, 2.4), Spread(1.8, 1.44, 2.16), ""),  # the quartiles overlap
        (Spread(2.0, 1.96, 2.04), None, "missing"),
        (None, Spread(2.0, 1.96, 2.04), "new"),
    ],
)
def test_verdict(before, now, expected):
    """A slower library is not noticed, or noise is taken for one."""
    assert verdict(before, now) == expected
