"""`Row`: one implementation of one part of a case, measured, as one line of a tidy CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from benchmarks.machine import Machine
from benchmarks.measure import NOISY
from benchmarks.setting import Setting
from fastmask.files import write_text

__all__ = ["Row", "Spread", "read", "write"]


class Spread(NamedTuple):
    """A median and, where they are known, the quartiles over rounds.

    Of several processes: the median of their medians, the least and the most of them.
    """

    middle: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """As tables show a speed."""
        spread = "" if self.low is None or self.high is None else f" ({self.low:.2f}-{self.high:.2f})"
        return f"{self.middle:.2f}x{spread}"

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high; the median where they are not known."""
        return (self.middle if self.low is None else self.low, self.middle if self.high is None else self.high)


@dataclass(frozen=True)
class Row:
    """What was found; what was not measured is None, an empty cell.

    Attributes:
        setting, part, implementation: what ran.
        ms: milliseconds of one run.
        over_dense: speed over PyTorch's dense network, of pairs of runs of one round; above 1 is faster.
        over_full: speed over our dense: the whole network through fastmask, with the same products.
        ideal: what `over_full` would be if time followed the FLOPs that masks leave.
        kept_mib: what a forward pass keeps for its backward pass, without parameters and masks.
        peak_mib: the most that a run holds at once beyond what is there before it.
        masks_mib: the masks of all languages.
        tokens_per_s: tokens of the languages' batches that go through.
        rounds, processes: runs of each implementation, over all processes.
        predicted_ms: what a written model says that a run takes (`benchmarks.gpu.predicted`).
        checked: whether the tests that run on this machine first have passed; None where there are none.
        note: what else there is to say.
        machine: where the numbers come from.
    """

    setting: Setting
    part: str
    implementation: str
    ms: Spread
    over_dense: Spread | None
    over_full: Spread | None
    ideal: float
    kept_mib: float | None
    peak_mib: float | None
    masks_mib: float | None
    tokens_per_s: float
    rounds: int
    processes: int
    predicted_ms: float | None
    checked: bool | None
    note: str
    machine: Machine

    @property
    def key(self) -> tuple[Setting, str, str]:
        """What two runs must have in common to be compared."""
        return (self.setting, self.part, self.implementation)

    @property
    def share(self) -> float | None:
        """Share of the ideal that is reached, of our dense."""
        return None if self.over_full is None else self.over_full.middle / self.ideal

    @property
    def noisy(self) -> bool:
        """Whether the speed over dense is spread too widely to conclude."""
        if self.over_dense is None:
            return False
        low, high = self.over_dense.bounds
        return high - low > NOISY * self.over_dense.middle


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, replacing the whole at once."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_cells(row) for row in rows)
    write_text(path, out.getvalue())


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message says what is wrong with it.
    """
    header, *lines = [*csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline=""))] or [[]]
    if header != COLUMNS:
        wrong = next((name for name in COLUMNS if name not in header), "more than there should be")
        raise ValueError(f"{path} is not a file of benchmark rows: it has no column {wrong!r}")
    found: list[Row] = []
    for number, cells in enumerate(lines, 2):
        try:
            found.append(_built(Row, dict(zip(COLUMNS, cells, strict=True))))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return found


def _columns(kind: Any) -> list[str]:
    found = []
    for name, own in get_type_hints(kind).items():
        many = [name, f"{name}_low", f"{name}_high"] if _is_spread(own) else [name]
        found += _columns(own) if is_dataclass(own) else many
    return found


def _is_spread(kind: Any) -> bool:
    return Spread in (kind, *get_args(kind))


COLUMNS = _columns(Row)


def _cells(thing: Any) -> list[str]:
    found = []
    for field in fields(thing):
        value = getattr(thing, field.name)
        if is_dataclass(value):
            found += _cells(value)
        elif isinstance(value, Spread) or f"{field.name}_low" in COLUMNS:
            found += [_text(number) for number in value or (None, None, None)]
        else:
            found.append(_text(value))
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")


def _built(kind: Any, cells: Mapping[str, str]) -> Any:
    values: dict[str, Any] = {}
    for name, own in get_type_hints(kind).items():
        if is_dataclass(own):
            values[name] = _built(own, cells)
        elif _is_spread(own):
            three = [_parsed(column, float | None, cells[column]) for column in (name, f"{name}_low", f"{name}_high")]
            values[name] = None if three[0] is None else Spread(*three)
        else:
            values[name] = _parsed(name, own, cells[name])
    return Setting.stored(values) if kind is Setting else kind(**values)


def _parsed(name: str, kind: Any, text: str) -> Any:
    if bool in (kind, *get_args(kind)) and text in ("True", "False"):
        return text == "True"
    if get_args(kind):  # what may be missing
        if not text:
            return None
        (kind, _) = get_args(kind)
    try:
        return kind(text) if kind is not bool else int("")
    except ValueError:
        raise ValueError(f"{name} is {text!r} (expected {'True or False' if kind is bool else 'a number'})") from None
