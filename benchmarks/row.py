"""`Row`: one implementation of one part of a case, measured on one machine, as one line of a tidy CSV file."""

from __future__ import annotations

import csv
import io
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

import fastmask
from benchmarks.setting import Setting
from fastmask.files import write_text
from fastmask.processor import processor
from fastmask.torch_path.gemm import by_onednn

__all__ = ["ROOT", "Machine", "Row", "Spread", "read", "this_machine", "write"]

ROOT = Path(__file__).resolve().parents[1]
NOISY = 0.10  # of the median: where the quartiles of a ratio lie farther apart, it says too little


class Spread(NamedTuple):
    """A median and the quartiles over rounds; where those are not known, the median again.

    Of several processes: the median of their medians, the least and the most of them.
    """

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles, which lie within what was seen."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        """As tables show a speed."""
        spread = "" if self.low == self.high else f" ({self.low:.2f}-{self.high:.2f})"
        return f"{self.middle:.2f}x{spread}"


@dataclass(frozen=True)
class Machine:
    """Where a number comes from; empty text for what is not known.

    `products` is what fastmask multiplied float32 matrices with on a CPU: "torch", or "onednn" where that is faster; on
    a GPU Triton's version. `commit` ends with a plus where files differ from it.
    """

    processor: str
    torch: str
    python: str
    fastmask: str
    products: str
    commit: str
    date: str


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
        speed = self.over_dense
        return speed is not None and speed.high - speed.low > NOISY * speed.middle


def this_machine(device: str) -> Machine:
    """What runs here, on "cpu" or "cuda"."""
    if device == "cpu":
        name, products = processor(), "onednn" if by_onednn(torch.zeros(1)) else "torch"
    else:
        import triton

        name, products = torch.cuda.get_device_name(device), f"triton {triton.__version__}"
    versions = (torch.__version__, platform.python_version(), fastmask.__version__)
    return Machine(name, *versions, products, _commit(), date.today().isoformat())


def _commit() -> str:
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- as a file

SPREADS = {name: (name, f"{name}_low", f"{name}_high") for name in ("ms", "over_dense", "over_full")}


def _columns(kind: type) -> dict[str, Any]:
    """The columns of a dataclass, those inside of it included, and what their cells hold."""
    found: dict[str, Any] = {}
    for name, own in get_type_hints(kind).items():
        if is_dataclass(own):
            found |= _columns(own)  # type: ignore[arg-type]
        else:
            found |= dict.fromkeys(SPREADS[name], float | None) if name in SPREADS else {name: own}
    return found


COLUMNS = _columns(Row)


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, replacing the whole at once."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        values = vars(row) | vars(row.setting) | vars(row.machine)
        for name, columns in SPREADS.items():
            values |= dict(zip(columns, values[name] or (None, None, None), strict=True))
        writer.writerow({name: _text(value) for name, value in values.items()})
    write_text(path, out.getvalue())


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message says what is wrong with it.
    """
    header, *lines = [*csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline=""))] or [[]]
    if header != [*COLUMNS]:
        wrong = next((name for name in COLUMNS if name not in header), "more than there should be")
        raise ValueError(f"{path} is not a file of benchmark rows: it has no column {wrong!r}")
    found: list[Row] = []
    for number, cells in enumerate(lines, 2):
        try:
            found.append(_row(dict(zip(COLUMNS, cells, strict=True))))
        except (ValueError, KeyError) as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return found


def _row(cells: Mapping[str, str]) -> Row:
    values = {name: _parsed(name, text) for name, text in cells.items()}
    for name, columns in SPREADS.items():
        middle, low, high = (values.pop(column) for column in columns)
        values[name] = middle and Spread(middle, low or middle, high or middle)
    for name, kind in (("setting", Setting), ("machine", Machine)):
        values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
    return Row(**values)


def _parsed(name: str, text: str) -> Any:
    kind, *optional = get_args(COLUMNS[name]) or [COLUMNS[name]]
    if optional and not text:
        return None
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is {text!r} (expected {'True or False' if kind is bool else 'a number'})") from None
