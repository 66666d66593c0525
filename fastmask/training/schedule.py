"""The learning rate as a function of the step, so that there is no schedule state to save or to get wrong."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "learning_rate_factor"]

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(step: int, steps: int, warmup: int, kind: str = "cosine", floor: float = 0.0) -> float:
    """Return the factor of the peak learning rate at `step` (0 is the first step).

    It climbs over `warmup` steps to 1, falls to `floor` at `steps`, and stays there: a cosine that is not held at its
    end climbs again.

    Raises:
        ValueError: `kind` is not one of `SCHEDULES`.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule is {kind!r} (expected one of {', '.join(SCHEDULES)})")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return floor + (1 - floor) * falling
