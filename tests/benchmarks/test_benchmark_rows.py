"""Rows on disk: what is read is what was measured, also after a kill."""

from __future__ import annotations

import pytest
from made_rows import made_row, pair

from benchmarks import row as rows_file
from benchmarks.row import setting_of
from benchmarks.setting import Setting


def test_round_trip(tmp_path):
    """A value comes back as another one, or as text."""
    rows = [*pair(), made_row(note='a "quoted" note, with a comma', saved_mib=1.5, compiled=True, noisy=True)]
    rows.append(made_row("data", ideal=None, share=None, masks_mib=None))
    path = tmp_path / "new" / "rows.csv"
    rows_file.append(path, rows[:2])
    rows_file.append(path, rows[2:])
    assert rows_file.read(path) == rows
    rows_file.write(path, rows[:1])
    assert rows_file.read(path) == rows[:1]
    assert [other.name for other in path.parent.iterdir()] == ["rows.csv"]  # nothing half-written beside it


def test_a_torn_last_line_is_left_out_and_replaced(tmp_path):
    """A run killed while it writes leaves a file that nobody can read or go on with."""
    path = tmp_path / "rows.csv"
    rows_file.append(path, pair())
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40])
    assert rows_file.read(path) == pair()
    rows_file.append(path, [made_row("loop")])
    assert rows_file.read(path) == [*pair(), made_row("loop")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("ratio_low", "ratio_down"), "has no column 'ratio_low'"),
        (lambda text: text.replace("true", "yes").replace("false", "no"), "expected true or false"),
        (lambda text: text.replace(",8,128,", ",8,many,"), "tokens is 'many' .expected a whole number"),
        (lambda text: text.replace("encoder", "encoder,more"), "cells .expected"),
        (lambda text: "", "has no column 'case'"),
    ],
)
def test_another_file_is_refused(change, message, tmp_path):
    """A file of something else is taken for measurements."""
    path = tmp_path / "rows.csv"
    rows_file.append(path, pair())
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        rows_file.read(path)


def test_setting_of_a_row():
    """Rows of one setting are taken for those of another."""
    setting = Setting("encoder", threads=2)
    assert setting_of(made_row()) == setting
    assert hash(setting_of(made_row())) == hash(setting)
    assert setting_of(made_row(density=0.25)) != setting
