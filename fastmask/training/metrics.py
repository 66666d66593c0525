"""What a run reports while it trains: means over steps, a JSONL file, TensorBoard where asked, and its progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastmask.files import StrPath, write_errors, write_text
from fastmask.settings import flat

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The records of a run: kept in `history`, which goes into checkpoints, and written to ``metrics.jsonl``.

    A record has "step" and numbers; the field "words_per_second" is the only one that a repeated run may change.
    `sums` are those of what steps reported since the last line, by name, and of "steps"; empty if there were none.
    """

    def __init__(
        self, run: StrPath, history: Iterable[Any], sums: Mapping[str, float], tensorboard: bool, enabled: bool = True
    ) -> None:
        """Start the file with `history`, that of the checkpoint that is resumed; only one process is `enabled` to."""
        self.history, self.sums = list(history), dict(sums)
        self._path = Path(run, METRICS_FILE) if enabled else None
        self._writer: Any = None
        self.restart_clock()
        if self._path is not None:
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.history))
        if enabled and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard is on, but not installed: pip install tensorboard") from error

            last = self.history[-1]["step"] if self.history else 0
            self._writer = SummaryWriter(str(Path(run, "tensorboard")), purge_step=last + 1)

    def restart_clock(self) -> None:
        """Leave what happened since the last line out of the speed."""
        self._words, self._since = 0, time.perf_counter()

    def count(self, values: Mapping[str, float], words: int) -> None:
        """Add what one step of the optimizer reports."""
        for name, value in {**values, "steps": 1}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self._words += words

    def means(self) -> dict[str, float]:
        """The mean of each value since the last call, and the words per second."""
        rate = self._words / max(time.perf_counter() - self._since, 1e-9)
        steps = self.sums.pop("steps")
        means = {name: total / steps for name, total in self.sums.items()}
        self.sums = {}
        self.restart_clock()
        return {**means, "words_per_second": round(rate, 1)}

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append one record, and return it; a number inside it is named like ``dev/en/las`` in TensorBoard."""
        self.history.append(record)
        if self._path is not None:
            with write_errors(self._path, self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in flat(record, "/").items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, record["step"])
        return record

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


class TrainingProgress:
    """Loss, dev score and words per second: a bar on a terminal, elsewhere a line every so often (nohup, Slurm)."""

    EVERY = 30.0  # seconds between lines

    def __init__(self, total: int, done: int, metric: str, enabled: bool = True) -> None:
        """Show nothing yet; `total` steps, of which `done` are done. Silent if not `enabled`."""
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, disable=not enabled or self._lines)
        self._forms = {"loss": "loss {:.3f}", "dev_score": f"dev {metric} {{:.2f}}"}
        self._forms["words_per_second"] = "{:,.0f} words/s"
        self._total, self._step, self._first = total, done, done
        self._phase, self._said = "", set[str]()
        self._values: dict[str, str] = {}  # of `_forms`, once they are known
        self._began = self._last = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Leave the bar as it stands; only now is everything known that the line of the last step shows."""
        self._bar.close()
        if failure is None and self._step == self._total and self._shown:
            self._line("done")

    def phase(self, name: str) -> None:
        """Say what is being trained or done; where there is no bar, once."""
        self._phase = name
        self._bar.set_description(name)
        if self._lines and name not in self._said:
            print(name, file=sys.stderr, flush=True)
        self._said.add(name)

    def step(self, step: int, loss: float) -> None:
        """Move the bar; this loss stands there until the first line of the metrics says one."""
        if "loss" not in self._values:
            self._values["loss"] = self._forms["loss"].format(loss)
            self._bar.set_postfix_str(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)
        self._step = step
        if step < self._total and time.perf_counter() - self._last > self.EVERY:
            seconds = (time.perf_counter() - self._began) / (step - self._first) * (self._total - step)
            self._line(f"about {seconds / 60:.0f} min left")

    def show(self, record: dict[str, Any]) -> None:
        """Show what of loss, score and speed the record holds."""
        self._values |= {name: form.format(record[name]) for name, form in self._forms.items() if name in record}
        self._step = record["step"]
        self._bar.set_postfix_str(self._shown, refresh=False)
        if "dev_score" in record and self._step < self._total:
            self._line()

    @property
    def _shown(self) -> str:
        return " · ".join(self._values[name] for name in self._forms if name in self._values)

    def _line(self, *rest: str) -> None:
        """Where there is no bar, say how far it is."""
        self._last = time.perf_counter()
        if self._lines:
            text = f"step {self._step}/{self._total} ({self._phase}): {self._shown}"
            print(", ".join([text, *rest]), file=sys.stderr, flush=True)
