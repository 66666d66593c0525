"""What a run reports while it trains: means over steps, a JSONL file, TensorBoard where asked, and its progress."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fastmask.files import named_errors, write_text

__all__ = ["METRICS_FILE", "MetricsLog", "TrainingProgress", "Window"]

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The records of a run: kept in `history`, which goes into checkpoints, and written to ``metrics.jsonl``.

    A record has "step" and numbers; the field "words_per_second" is the only one that a repeated run may change.
    """

    def __init__(
        self, run: str | os.PathLike[str], history: list[dict[str, Any]], tensorboard: bool, enabled: bool = True
    ) -> None:
        """Start the file with `history` (of the checkpoint that is resumed): later records of a killed run go.

        Args:
            run: folder of the run.
            history: the records so far.
            tensorboard: also write TensorBoard files; needs the extra ``tensorboard``.
            enabled: False on all processes but the main one: the history is kept, nothing is written.
        """
        self.history = list(history)
        self._enabled = enabled
        self._writer: Any = None
        if not enabled:
            return
        self._path = Path(run, METRICS_FILE)
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.history))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "tensorboard is on, but TensorBoard is not installed: in a checkout of fastmask, "
                    "pip install -e '.[tensorboard]'"
                ) from error

            last = self.history[-1]["step"] if self.history else 0
            self._writer = SummaryWriter(str(Path(run, "tensorboard")), purge_step=last + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; a number inside nested records is named like ``dev/en/las`` in TensorBoard.

        Raises:
            OSError: the disk is full; the message names the file.
        """
        self.history.append(record)
        if not self._enabled:
            return
        with named_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in _flat(record):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


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


class TrainingProgress:
    """Loss, dev score and words per second: a bar on a terminal, elsewhere a line every so often (nohup, Slurm)."""

    EVERY = 30.0  # seconds between lines

    def __init__(self, total: int, done: int, metric: str, enabled: bool = True) -> None:
        """Show nothing yet; `total` steps, of which `done` are done. Silent if not `enabled`."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from fastmask.terminal import LiteralConsole

        self._console = LiteralConsole(stderr=True)
        on_terminal = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not enabled or not on_terminal,
            speed_estimate_period=600.0,
        )
        self._lines = enabled and not on_terminal
        self._forms = {
            "loss": "loss {:.3f}",
            "dev_score": f"dev {metric} {{:.2f}}",
            "words_per_second": "{:,.0f} words/s",
        }
        self._values: dict[str, str] = {}
        self._said: set[str] = set()
        self._bar.add_task("full network", total=total, completed=done, values="")
        (self._state,) = self._bar.tasks
        self._last = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Leave the bar as it stands; only now is everything known that the line of the last step shows."""
        self._bar.stop()
        if failure is None and self._values and self._done:
            self._line()

    def phase(self, name: str) -> None:
        """Show what is being trained or done; where there is no bar, it is said once."""
        self._bar.update(self._state.id, description=name)
        if self._lines and name not in self._said:
            self._console.print(name, highlight=False)
        self._said.add(name)

    def step(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._state.id, completed=step)
        if not self._done and time.perf_counter() - self._last > self.EVERY:
            self._line()

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Show what of loss, score and speed the record holds."""
        self._values |= {name: form.format(record[name]) for name, form in self._forms.items() if name in record}
        values = " · ".join(self._values[name] for name in self._forms if name in self._values)
        self._bar.update(self._state.id, completed=step, values=values)
        if not self._done and "dev_score" in record:
            self._line()

    @property
    def _done(self) -> bool:
        return self._state.remaining == 0

    def _line(self) -> None:
        """Where there is no bar, say how far it is."""
        self._last = time.perf_counter()
        if self._lines:
            at, left = self._state, self._state.time_remaining
            rest = "done" if self._done else "" if left is None else f"about {left / 60:.0f} min left"
            text = f"step {at.completed:.0f}/{at.total:.0f} ({at.description}): {at.fields['values']}"
            self._console.print(f"{text}, {rest}" if rest else text, highlight=False, soft_wrap=True)


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return (path/to/number, number) for every number in nested records, "step" left out."""
    numbers: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            numbers.append((prefix + name, float(value)))
    return numbers
