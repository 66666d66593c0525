"""Means of losses and speed since the last line of the metrics."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Window"]


class Window:
    """Adds up what steps report; `line` turns it into one record and begins anew."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {"loss": 0.0, "grad_norm": 0.0, "steps": 0}
        self.restart_clock()

    @property
    def empty(self) -> bool:
        """Whether nothing has been added since the last line."""
        return self._sums["steps"] == 0

    def restart_clock(self) -> None:
        """Leave what happened since the last line out of the speed."""
        self._words, self._since = 0, time.perf_counter()

    def add(self, losses: dict[str, float], grad_norm: float, words: int) -> None:
        """Add one step of the optimiser."""
        for name, value in {**losses, "grad_norm": grad_norm, "steps": 1}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._words += words

    def line(self) -> dict[str, Any]:
        """Return the mean of each loss and of the gradient's norm, and the words per second."""
        rate = self._words / max(time.perf_counter() - self._since, 1e-9)
        steps = self._sums.pop("steps")
        record = {name: total / steps for name, total in self._sums.items()}
        self._sums = {"loss": 0.0, "grad_norm": 0.0, "steps": 0}
        self.restart_clock()
        return {**record, "words_per_second": round(rate, 1)}

    def state_dict(self) -> dict[str, float]:
        """The sums; JSON."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from them; the clock starts now."""
        self._sums = dict(state)
        self.restart_clock()
