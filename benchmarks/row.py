"""What is measured, `Setting` and `Job`, and what was found: `Row`, one line of a tidy CSV file."""

from __future__ import annotations

import csv
import io
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

import fastmask
from fastmask.errors import unknown
from fastmask.files import write_text
from fastmask.processor import processor
from fastmask.torch_path.gemm import by_onednn

ROOT = Path(__file__).resolve().parents[1]
NOISY = 0.10  # of the median: where the quartiles of a ratio lie farther apart, it says too little


class Shape(NamedTuple):
    """One Transformer layer: width of the residual stream, neurons, heads."""

    hidden: int
    ffn: int
    heads: int


SHAPES = {
    "toy": Shape(32, 64, 4),  # for tests
    "small": Shape(256, 1024, 8),  # the parser that `fastmask train` makes from scratch
    "minilm": Shape(384, 1536, 12),  # multilingual MiniLM and E5 small
    "bert-base": Shape(768, 3072, 12),
    "xlmr-large": Shape(1024, 4096, 16),
    "7b": Shape(4096, 11008, 32),  # a layer of a decoder of 7 billion parameters
    "square": Shape(4096, 4096, 32),  # one weight that fills a GPU
}
BLOCKS = {"blocks16": 16, "blocks32": 32, "blocks64": 64}  # the side of a block
UNITS = ("both", "heads", "head-inputs", "neurons", "neuron-inputs", *BLOCKS, "weights")
DTYPES = ("float32", "bfloat16", "bfloat16-parameters")


@dataclass(frozen=True)
class Setting:
    """One point of a sweep; raises ValueError or KeyError for a number out of range or an unknown name."""

    case: str  # what runs; a name of `benchmarks.cases.CASES`
    shape: str = "bert-base"  # a name of `SHAPES`
    layers: int = 4  # of the model; one weight has no use for it
    unit: str = "both"  # what lives and dies as one; "both" is heads and neurons, see `cases.op.Op` for one weight
    density: float = 0.5  # share of the units that every language owns
    languages: int = 8  # masks held
    present: int = 1  # languages of the batch, in equal shares, sorted
    batch: int = 8  # examples
    tokens: int = 128  # of each example
    dtype: str = "float32"  # of the products: "bfloat16" by autocast, "bfloat16-parameters" throughout
    compiled: bool = False  # whether every implementation runs under `torch.compile`
    threads: int = 2  # of the CPU
    device: str = "cpu"  # or "cuda"

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("unit", UNITS), ("dtype", DTYPES), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density:g} (expected above 0 and at most 1)")
        for name in ("layers", "languages", "present", "batch", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} (expected at least 1)")
        for name, what in (("languages", "the languages that masks are held for"), ("batch", "the examples")):
            if self.present > getattr(self, name):
                raise ValueError(f"present is {self.present} (expected at most {what}, {getattr(self, name)})")

    @property
    def sizes(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def kind(self) -> str:
        """The kind of `fastmask.Mask` over the unit, of one weight."""
        if self.unit in BLOCKS:
            return "blocks"
        return "weights" if self.unit == "weights" else "columns" if self.unit.endswith("inputs") else "rows"

    @property
    def parameters(self) -> torch.dtype:
        """The dtype of parameters, and of activations outside of autocast."""
        return torch.bfloat16 if self.dtype == "bfloat16-parameters" else torch.float32

    def ids(self) -> torch.Tensor:
        """The languages of the examples, int64 [batch], on the device."""
        return (torch.arange(self.batch) * self.present // self.batch).to(self.device)

    def words(self) -> str:
        """The setting in one line, as tables and errors name it."""
        mixed = "one language" if self.present == 1 else f"{self.present} languages in one batch"
        unit = {"both": "heads + neurons", "weights": "single weights"}.get(self.unit, self.unit)
        return (
            f"{self.case} {self.shape}, {unit} at {self.density:.0%}, {mixed}, {self.batch} x {self.tokens} tokens, "
            f"{self.dtype}{', compiled' if self.compiled else ''}"
        )


@dataclass(frozen=True)
class Job:
    """What of a setting is measured.

    A part may be followed by how it runs: " graph", replayed as a CUDA graph, is the device's time alone, " host-time"
    that until the call returns.
    """

    setting: Setting
    names: tuple[str, ...] = ()  # implementations; none: all that apply
    parts: tuple[str, ...] = ()  # of the case; none: all
    peaks: bool = False  # whether to count the most that each implementation holds at once, which takes a profiled run

    def on(self, threads: int, device: str) -> Job:
        """The same on so many threads of a CPU, or on another device."""
        return replace(self, setting=replace(self.setting, threads=threads, device=device))


class Spread(NamedTuple):
    """A median and the quartiles over rounds (the median again if unknown); of several processes medians and range."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def __str__(self) -> str:
        spread = "" if self.low == self.high else f" ({self.low:.2f}-{self.high:.2f})"
        return f"{self.middle:.2f}x{spread}"


@dataclass(frozen=True)
class Machine:
    """Where a number comes from; empty text for what is not known."""

    processor: str
    torch: str
    python: str
    fastmask: str
    products: str  # what multiplied float32 matrices on a CPU: "torch", or "onednn" where faster; Triton on a GPU
    commit: str  # with a plus where files differ from it
    date: str


@dataclass(frozen=True)
class Row:
    """What was found; what was not measured is None, an empty cell."""

    setting: Setting
    part: str
    implementation: str
    ms: Spread  # of one run
    over_dense: Spread | None  # speed over PyTorch's dense network, of pairs of runs of one round; above 1 is faster
    over_full: Spread | None  # over our dense: the whole network through fastmask, with the same products
    ideal: float  # what `over_full` would be if time followed the FLOPs that masks leave
    kept_mib: float | None  # by a forward pass for its backward pass, without parameters and masks
    peak_mib: float | None  # the most that a run holds at once beyond what is there before it
    masks_mib: float | None  # of all languages
    tokens_per_s: float  # of the languages' batches
    rounds: int  # runs of each implementation, over all processes
    processes: int
    predicted_ms: float | None  # on paper, by `benchmarks.gpu.predicted`
    checked: bool | None  # whether the tests that run on this machine first have passed; None where there are none
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
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        commit = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    versions = torch.__version__, platform.python_version(), fastmask.__version__
    return Machine(name, *versions, products, commit, date.today().isoformat())


SPREADS = {name: (name, f"{name}_low", f"{name}_high") for name in ("ms", "over_dense", "over_full")}
COLUMNS: dict[str, Any] = {}  # of the file, and what their cells hold
for _name, _kind in (get_type_hints(Setting) | get_type_hints(Row) | get_type_hints(Machine)).items():
    if _kind not in (Setting, Machine):
        COLUMNS |= dict.fromkeys(SPREADS[_name], float | None) if _name in SPREADS else {_name: _kind}


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, replacing the whole at once."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        values = vars(row) | vars(row.setting) | vars(row.machine)
        for name, columns in SPREADS.items():
            values |= dict(zip(columns, values[name] or (None, None, None), strict=True))
        writer.writerow({name: f"{own:.6g}" if isinstance(own, float) else own for name, own in values.items()})
    write_text(path, out.getvalue())


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Read what `write` wrote; ValueError says what is wrong with another file."""
    header, *lines = [*csv.reader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline=""))] or [[]]
    if header != [*COLUMNS]:
        wrong = next((name for name in COLUMNS if name not in header), "more than there should be")
        raise ValueError(f"{path} is not a file of benchmark rows: it has no column {wrong!r}")
    found: list[Row] = []
    for number, cells in enumerate(lines, 2):
        try:
            values = {name: _parsed(name, text) for name, text in zip(COLUMNS, cells, strict=True)}
            for name, columns in SPREADS.items():
                middle, low, high = (values.pop(column) for column in columns)
                values[name] = middle and Spread(middle, low or middle, high or middle)
            for name, kind in (("setting", Setting), ("machine", Machine)):
                values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            found.append(Row(**values))
        except (ValueError, KeyError) as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    return found


def _parsed(name: str, text: str) -> Any:
    kind, *optional = get_args(COLUMNS[name]) or [COLUMNS[name]]
    if optional and not text:
        return None
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is {text!r} (expected {'True or False' if kind is bool else 'a number'})") from None
