"""`Row`: one measurement as one line of a tidy CSV file, with everything that is needed to read it later."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from benchmarks.setting import Setting
from fastmask.files import write_text

__all__ = ["Row", "append", "read", "setting_of", "write"]


@dataclass(frozen=True)
class Row:
    """One implementation of one part of a case at one setting; what was not measured is None, an empty cell.

    Attributes:
        case, part, implementation: what ran.
        baseline: the implementation that ratios are taken to.
        compiled, shape, layers, batch, tokens, languages, present, unit, density, dtype, threads, device: the setting;
            `languages` are those that masks are held for, `present` those of the batch.
        median_ms, low_ms, high_ms: median and quartiles of one run.
        ratio, ratio_low, ratio_high: the baseline's time over this one's, round by round: above 1 is faster.
        ideal: what the ratio would be if time followed the FLOPs; None where an implementation is not after that.
        share: ratio / ideal.
        examples_per_s: throughput, from the median.
        saved_mib: what a forward pass keeps for its backward pass, without parameters and masks.
        peak_mib: the most that a run holds at once beyond what is there before it.
        masks_mib: the masks of all languages.
        rounds: runs of each implementation.
        noisy: whether the quartiles of the ratio lie too far apart to conclude.
        note: what else there is to say.
        processor, torch, triton, python, fastmask, commit, date: where the numbers come from.
        products: what fastmask multiplied float32 matrices with on a CPU, "torch" or "onednn".
    """

    case: str
    part: str
    implementation: str
    baseline: str
    compiled: bool
    shape: str
    layers: int
    batch: int
    tokens: int
    languages: int
    present: int
    unit: str
    density: float
    dtype: str
    threads: int
    device: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ideal: float | None
    share: float | None
    examples_per_s: float
    saved_mib: float | None
    peak_mib: float | None
    masks_mib: float | None
    rounds: int
    noisy: bool
    note: str
    processor: str
    torch: str
    triton: str
    python: str
    fastmask: str
    products: str
    commit: str
    date: str

    def key(self) -> tuple[Any, ...]:
        """What two runs must have in common to be compared: case, part, implementation and setting."""
        return (self.part, self.implementation, setting_of(self))


COLUMNS = [field.name for field in fields(Row)]
_TYPES = get_type_hints(Row)


def setting_of(row: Row) -> Setting:
    """The setting that a row was measured at."""
    return Setting.stored(vars(row))


def append(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Add rows to a CSV file, all or (if the process dies while it writes) less than a line too much; see `read`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = not target.is_file() or target.stat().st_size == 0
    if not new:
        _drop_torn_line(target)
    with target.open("a", encoding="utf-8", newline="") as file:
        file.write(_text(rows, header=new))
        file.flush()
        os.fsync(file.fileno())


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, replacing the whole at once."""
    write_text(path, _text(list(rows), header=True))


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Read what `append` or `write` wrote; a last line that a killed process left half written is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message says what is wrong with it.
    """
    text = Path(path).read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]
    lines = csv.reader(io.StringIO(text, newline=""))
    header = next(lines, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path} is not a file of benchmark rows: it has no column {missing[0]!r}")
    found = []
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise ValueError(f"line {number} of {path} has {len(cells)} cells (expected {len(header)})")
        named = dict(zip(header, cells, strict=True))
        try:
            found.append(Row(**{name: _parsed(name, named[name]) for name in COLUMNS}))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return found


def _text(rows: Sequence[Row], header: bool) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_written(getattr(row, name)) for name in COLUMNS])
    return out.getvalue()


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")


def _parsed(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if type(None) in get_args(kind):
        return float(text) if text else None
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name} is {text!r} (expected true or false)")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} (expected {'a number' if kind is float else 'a whole number'})") from None


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line's end."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
