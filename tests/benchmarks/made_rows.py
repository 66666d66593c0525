"""Rows that nobody measured, for tests of what is done with rows."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Row


def made_row(implementation: str = "fastmask", ratio: float = 2.0, spread: float = 0.02, **changes: Any) -> Row:
    """A row of the encoder at 50% with quartiles `spread` (relative) around `ratio`."""
    values: dict[str, Any] = {
        "case": "encoder", "part": "forward+backward", "implementation": implementation, "baseline": "dense",
        "compiled": False, "shape": "bert-base", "layers": 4, "batch": 8, "tokens": 128, "languages": 8, "present": 1,
        "unit": "both", "density": 0.5, "dtype": "float32", "threads": 2, "device": "cpu", "median_ms": 100 / ratio,
        "low_ms": 99 / ratio, "high_ms": 101 / ratio, "ratio": ratio, "ratio_low": ratio * (1 - spread),
        "ratio_high": ratio * (1 + spread), "ideal": 2.0, "share": ratio / 2.0, "examples_per_s": 80.0 * ratio,
        "saved_mib": None, "peak_mib": None, "masks_mib": 0.25, "rounds": 9, "noisy": False, "note": "",
        "processor": "a processor, with a comma", "torch": "2.13.0", "triton": "", "python": "3.11",
        "fastmask": "0.1.0", "products": "torch", "commit": "abc", "date": "2026-11-20",
    }  # fmt: skip
    return Row(**(values | changes))


def pair(ratio: float = 2.0, **changes: Any) -> list[Row]:
    """A baseline and our row at one setting."""
    base = changes | {"ideal": 1.0, "share": 1.0, "spread": 0.0}
    return [made_row("dense", 1.0, **base), made_row("fastmask", ratio, **changes)]
