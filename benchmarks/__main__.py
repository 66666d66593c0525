"""`python -m benchmarks`: the rows of the README's table; exits non-zero where a target is missed."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastmask
from benchmarks.encoder import Encoder
from benchmarks.layer import WeightMaskedLayer
from benchmarks.measure import compare, saved_bytes


@dataclass(frozen=True)
class Result:
    """One row: `value` is held against `target`, from above if `at_least`."""

    what: str
    value: float
    low: float | None
    high: float | None
    ideal: float | None
    target: float
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def encoder_speed(what: str, batch: int, density: float, languages: int, target: float) -> Callable[[float], Result]:
    """Speed of training the encoder relative to dense."""

    def measure(seconds: float) -> Result:
        encoder = Encoder(batch, 128, density, languages)
        encoder.check()
        ratio = compare(*encoder.sides(), seconds)
        detail = f"{ratio.baseline_ms:.0f} -> {ratio.ours_ms:.0f} ms, {ratio.pairs} pairs"
        return Result(what, ratio.median, ratio.low, ratio.high, encoder.ideal(), target, True, detail)

    return measure


def weight_mask_time(seconds: float) -> Result:
    """Time of a layer with a mask over single weights relative to dense."""
    layer = WeightMaskedLayer(tokens=1024)
    layer.check()
    dense, masked = layer.sides()
    ratio = compare(masked, dense, seconds)  # as time, not as speed
    detail = f"{ratio.ours_ms:.1f} -> {ratio.baseline_ms:.1f} ms, {ratio.pairs} pairs"
    what = "weight mask 50%, one language, 1024 tokens, 768 -> 3072: time"
    return Result(what, ratio.median, ratio.low, ratio.high, 1.0, 1.12, False, detail)


def activation_memory(seconds: float) -> Result:
    """Bytes that the encoder keeps for its backward pass relative to dense; exact, whatever `seconds`."""
    encoder = Encoder(8, 128, 0.5, languages=1)
    masks = [t for m in encoder.masked.modules() if hasattr(m, "mask") for t in (m.mask.index, m.mask.extents)]
    known = [*encoder.dense.parameters(), *encoder.masked.parameters(), *masks, encoder.x]
    dense, masked = (saved_bytes(run, known) for run in (encoder.run_dense, encoder.run_masked))
    detail = f"{dense / 2**20:.0f} -> {masked / 2**20:.0f} MiB saved for backward"
    what = "encoder, heads + neurons 50%, one language: activation memory"
    return Result(what, masked / dense, None, None, 0.5, 0.62, False, detail)


ROWS: list[Callable[[float], Result]] = [
    encoder_speed("encoder, heads + neurons 50%, one language: speed", 8, 0.5, 1, 1.90),
    encoder_speed("encoder, heads + neurons 25%, one language: speed", 8, 0.25, 1, 3.5),
    encoder_speed("encoder, heads + neurons 50%, 8 languages mixed: speed", 16, 0.5, 8, 1.55),
    weight_mask_time,
    activation_memory,
]


def machine() -> str:
    """Name processor, threads and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return (
        f"{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"fastmask {fastmask.__version__}, {date.today().isoformat()}"
    )


def main() -> int:
    """Measure, print, and compare with the targets."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=25, help="time for each row (default: 25)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    table = Table(title="subnetworks against dense; forward + backward, float32; medians of pairwise ratios", width=150)
    for name in ("what", "measured", "quartiles", "ideal", "target", "", "detail"):
        table.add_column(name, justify="left" if name in ("what", "detail") else "right")
    results = []
    for row in ROWS:
        result = row(options.seconds)
        results.append(result)
        quartiles = "exact" if result.low is None else f"{result.low:.2f}-{result.high:.2f}"
        sign = ">=" if result.at_least else "<="
        table.add_row(
            result.what,
            f"{result.value:.3f}x",
            quartiles,
            "" if result.ideal is None else f"{result.ideal:.2f}x",
            f"{sign} {result.target:.2f}x",
            "ok" if result.reached else "SHORT",
            result.detail,
        )
        print(f"{result.what}: {result.value:.3f}x", file=sys.stderr)
    Console(width=150).print(table)
    print(machine())
    if options.json:
        rows = [asdict(result) | {"reached": result.reached} for result in results]
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.reached for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
