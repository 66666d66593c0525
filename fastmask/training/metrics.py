"""What a run reports while it trains: a JSONL file, TensorBoard where asked, and a progress bar."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastmask.files import named_errors, write_text

__all__ = ["METRICS_FILE", "MetricsLog", "TrainingProgress"]

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


class TrainingProgress:
    """A progress bar with loss, dev LAS and words per second; silent if not `enabled`."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        """Make a bar over `total` steps of which `done` are done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from fastmask.terminal import LiteralConsole

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · dev LAS {task.fields[las]} · {task.fields[rate]} words/s"),
            TimeRemainingColumn(),
            console=LiteralConsole(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("full network", total=total, completed=done, loss="-", las="-", rate="-")

    def __enter__(self) -> TrainingProgress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def phase(self, name: str) -> None:
        """Say what is being trained or done."""
        self._bar.update(self._task, description=name)

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Show the step and what of loss, LAS and speed the record holds."""
        shown = {"loss": ("loss", "{:.3f}"), "dev_las": ("las", "{:.1f}"), "words_per_second": ("rate", "{:,.0f}")}
        values: dict[str, Any] = {name: form.format(record[k]) for k, (name, form) in shown.items() if k in record}
        self._bar.update(self._task, completed=step, **values)


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return (path/to/number, number) for every number in nested records, "step" left out."""
    numbers: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            numbers.append((prefix + name, float(value)))
    return numbers
