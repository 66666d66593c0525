"""Rows that nobody measured, for tests of what is done with rows."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Machine, Row, Setting, Spread

MACHINE = Machine("a processor, with a comma (model 2)", "2.13.0", "3.11", "0.1.0", "torch", "abc", "2026-11-20")
FULL = 1.6  # speed of our dense over PyTorch's


def made_row(implementation: str = "fastmask", speed: float = 2.0, spread: float = 0.02, **changes: Any) -> Row:
    """A row of the encoder at 50% with quartiles `spread` (relative) around `speed`, over PyTorch's dense."""
    of_setting = {name: changes.pop(name) for name in list(changes) if name in Setting.__dataclass_fields__}
    setting = Setting(**{"case": "encoder"} | of_setting)

    def around(middle: float) -> Spread:
        return Spread(*(float(f"{middle * factor:.6g}") for factor in (1, 1 - spread, 1 + spread)))  # as files hold

    values: dict[str, Any] = {
        "part": "forward+backward", "ms": around(100 / speed), "over_dense": around(speed),
        "over_full": around(speed / FULL), "ideal": 1.0 if implementation in ("dense", "full") else 2.0,
        "kept_mib": None, "peak_mib": None, "masks_mib": 0.25, "tokens_per_s": 1e3 * speed, "rounds": 9,
        "processes": 1, "predicted_ms": None, "checked": None, "note": "",
    }  # fmt: skip
    return Row(setting, implementation=implementation, machine=MACHINE, **(values | changes))


def three(speed: float = 2.0, **changes: Any) -> list[Row]:
    """Both dense rows and ours at one setting."""
    return [made_row("dense", 1.0, 0.0, **changes), made_row("full", FULL, **changes), made_row(speed=speed, **changes)]
