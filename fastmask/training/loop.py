"""The training loop: mixed-language batches, first on the full network, then on every language's subnetwork.

All methods train the full network alike for the first `discover_at` share of the steps. Then a callback returns the
subnetworks, they are saved as ``masks.safetensors`` and attached, and training goes on to the same number of steps.
A run that is killed at any moment and resumed ends with the weights and metrics of an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmask.errors import unknown
from fastmask.parsing.batch import Encoded
from fastmask.parsing.evaluation import evaluate, prepare
from fastmask.parsing.parser import Parser
from fastmask.training import checkpoints
from fastmask.training.build import build_optimizer, encode_training_data
from fastmask.training.config import TrainConfig
from fastmask.training.device import device_of
from fastmask.training.dynamic import DYNAMIC_FILE, DynamicMasks
from fastmask.training.metrics import MetricsLog, TrainingProgress
from fastmask.training.random_state import preserved_random_state
from fastmask.training.run_folder import open_run
from fastmask.training.sampler import MixedLanguageSampler
from fastmask.training.schedule import learning_rate_factor

__all__ = ["MASKS_FILE", "SwitchPoint", "TrainResult", "TrainingDiverged", "train"]

MASKS_FILE = checkpoints.MASKS


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened
    """Loss, gradient or weights are not finite; the message names the step and the last good checkpoint.

    Attributes:
        step: the step that failed, from 1.
        checkpoint: the last checkpoint, all of whose weights are finite, or None.
    """

    def __init__(self, what: str, step: int, checkpoint: Path | None) -> None:
        """Build the message."""
        where = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"{what} at step {step}; {where}. A lower learning rate or longer warm-up may help.")
        self.step, self.checkpoint = step, checkpoint


@dataclass(frozen=True)
class SwitchPoint:
    """What the callback that returns the subnetworks gets.

    Attributes:
        parser: the full network after `step` steps, encoder not attached. Weights must come back unchanged.
        datasets: by language and split, as given to `train`.
        train: the encoded training sentences of every language.
        config: the run's settings.
        step: steps done.
    """

    parser: Parser
    datasets: Mapping[str, Mapping[str, Any]]
    train: dict[str, Encoded]
    config: TrainConfig
    step: int


@dataclass
class TrainResult:
    """What a run leaves.

    Attributes:
        parser: trained, in evaluation mode, its encoder attached if there are subnetworks.
        subnetworks: a `fastmask.Subnetworks`, or None for method `full`; of method `dynamic` the last ones.
        language_ids: what to pass for a language: its place in `subnetworks.languages`, or None for method `full`.
        history: the records of ``metrics.jsonl``.
        run: the run's folder; the model is in its ``model``, the masks in its ``masks.safetensors``.
        scouting_share: share of the time since the switch (or since resuming) that went into looking for better masks;
            None for other methods.
    """

    parser: Parser = field(repr=False)
    subnetworks: Any
    language_ids: dict[str, int] | None
    history: list[dict[str, Any]] = field(repr=False)
    run: Path
    scouting_share: float | None = None


def train(
    parser: Parser,
    datasets: Mapping[str, Mapping[str, Any]],
    config: TrainConfig,
    discover: Callable[[SwitchPoint], Any] | None = None,
    on_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `parser`, or resume the run in `config.out`.

    Args:
        parser: a new one, built with the same settings when resuming.
        datasets: language -> split -> rows ("train" for every language, "dev" where there is one).
        config: the settings; written to ``config.yaml`` of the run.
        discover: returns the `fastmask.Subnetworks`; needed unless the method is `full`. Random numbers it draws do
            not show in the rest of the run. With several processes each one calls it; the main one's answer counts.
        on_step: called with the number of steps done after each one.
        progress: show a progress bar.

    Raises:
        ConfigError: `out` holds another run, or the settings differ from those of the run that is resumed.
        CheckpointError: the checkpoint does not fit.
        TrainingDiverged: loss, gradient or weights are not finite.
    """
    if config.switch_step is not None and discover is None:
        raise ValueError(f"method {config.method!r} needs `discover`, which returns the subnetworks")
    return _Run(parser, datasets, config, discover).run(on_step, progress)


class _Run:
    """One run: what is built once, and the steps."""

    def __init__(
        self,
        parser: Parser,
        datasets: Mapping[str, Mapping[str, Any]],
        config: TrainConfig,
        discover: Callable[[SwitchPoint], Any] | None,
    ) -> None:
        from accelerate.utils import set_seed

        if config.threads:
            torch.set_num_threads(config.threads)
        self.parser, self.datasets, self.config, self.discover = parser, datasets, config, discover
        self.accelerator = _accelerator(config.precision, device_of(config.device).type == "cpu")
        self.folder = Path(config.out)
        checkpoint = open_run(config, self.accelerator)
        self.resumed = checkpoint is not None
        self.train_data = encode_training_data(parser, datasets, config.max_length)
        self.joined = Encoded.join(list(self.train_data.values()))
        limit = config.dev_sentences or None
        self.dev = {code: prepare(parser, splits["dev"], limit) for code, splits in datasets.items() if "dev" in splits}
        self.sampler = MixedLanguageSampler(
            [encoded.lengths for encoded in self.train_data.values()],
            config.batch_size,
            config.temperature,
            config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        set_seed(config.seed, device_specific=True)
        parser.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(parser, build_optimizer(parser, config))
        self.subnetworks: Any = None
        self.language_ids: dict[str, int] | None = None
        self.dynamic: DynamicMasks | None = None
        self.dynamic_clock: tuple[float, float] | None = None  # seconds scouted, and the time, when this process began
        self.step = 0
        self.window = {"loss": 0.0, "grad_norm": 0.0, "steps": 0}  # since the last line of the metrics
        history: list[dict[str, Any]] = []
        if checkpoint is not None:
            history = self._restore(checkpoint)
        self.log = MetricsLog(self.folder, history, config.tensorboard, self.accelerator.is_main_process)

    def run(self, on_step: Callable[[int], None] | None, show: bool) -> TrainResult:
        """Take the steps that are left."""
        config = self.config
        self.model.train()
        with ExitStack() as stack:
            stack.callback(self.log.close)
            show = show and self.accelerator.is_main_process
            bar = stack.enter_context(TrainingProgress(config.steps, self.step, show))
            if self.subnetworks is not None:
                bar.phase("subnetworks")
            words, clock = 0, time.perf_counter()
            self._start_clock()
            while self.step < config.steps:
                if self.step == config.switch_step and self.subnetworks is None:
                    bar.phase("finding subnetworks")
                    self._checkpoint()
                    self._switch()
                    self._start_clock()
                    bar.phase("subnetworks")
                    words, clock = 0, time.perf_counter()
                words += self._train_step()
                self._update_masks()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    rate = words / max(time.perf_counter() - clock, 1e-9)
                    bar.show(self.step, self._log_window(rate))
                    words, clock = 0, time.perf_counter()
                if last or (config.eval_every and self.step % config.eval_every == 0):
                    bar.show(self.step, self._evaluate())
                    words, clock = 0, time.perf_counter()
                if last or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._checkpoint()
                if on_step is not None:
                    on_step(self.step)
            scouting_share = None
            if self.dynamic is not None and self.dynamic_clock is not None:
                seconds, since = self.dynamic_clock
                scouting_share = (self.dynamic.masks.seconds - seconds) / (time.perf_counter() - since)
        return self._finish(scouting_share)

    def _start_clock(self) -> None:
        if self.dynamic is not None:
            self.dynamic_clock = (self.dynamic.masks.seconds, time.perf_counter())

    def _train_step(self) -> int:
        """Take one step and return the words of the batch over all processes."""
        rows, languages = next(self.sampler)
        batch = self.parser.features.collate(self.joined.select(rows))
        if self.language_ids is not None:
            ids = torch.tensor([self.language_ids[code] for code in self.train_data], dtype=torch.int64)
            batch.language_ids = ids[torch.from_numpy(languages)]
        batch = batch.to(self.accelerator.device)
        config, number = self.config, self.step + 1
        factor = learning_rate_factor(self.step, config.steps, config.warmup_steps, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        loss = self.model(batch).loss
        words = batch.n_words
        if self.accelerator.num_processes > 1 and self.parser.config.loss_over == "words":
            # Gradients are averaged over processes; a process with more words has more to say.
            total = self.accelerator.reduce(torch.tensor(float(words), device=loss.device), "sum")
            loss = loss * (words * self.accelerator.num_processes / total)
            words = int(total.item())
        mean = self.accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(mean):
            raise TrainingDiverged(f"the loss is {mean}", number, checkpoints.latest(self.folder))
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient's norm is {norm}", number, checkpoints.latest(self.folder))
        self.optimizer.step()
        self.step = number
        self.window["loss"] += mean
        self.window["grad_norm"] += norm
        self.window["steps"] += 1
        return words

    def _update_masks(self) -> None:
        """Let dynamic subnetworks change, and note in the metrics whose did."""
        if self.dynamic is None or not (changed := self.dynamic.after_step(self.step)):
            return
        self.subnetworks = self.dynamic.subnetworks
        self.log.add({"step": self.step, "masks_changed": changed})

    def _log_window(self, words_per_second: float) -> dict[str, Any]:
        """Write the means since the last line."""
        steps = self.window["steps"]
        record = {
            "step": self.step,
            "loss": self.window["loss"] / steps,
            "grad_norm": self.window["grad_norm"] / steps,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "words_per_second": round(words_per_second, 1),
        }
        self.window = {"loss": 0.0, "grad_norm": 0.0, "steps": 0}
        self.log.add(record)
        return record

    def _evaluate(self) -> dict[str, Any]:
        """Score the dev data, each language with its subnetwork once there is one."""
        if not self.dev:
            return {}
        with self.accelerator.autocast():
            results = evaluate(self.parser, self.dev, self.language_ids)
        scores = {code: {"las": result.las, "uas": result.uas} for code, result in results.items()}
        mean = sum(score["las"] for score in scores.values()) / len(scores)
        record = {"step": self.step, "dev_las": mean, "dev": scores}
        self.log.add(record)
        return record

    def _switch(self) -> None:
        """Ask for the subnetworks, or take those that a killed process had already written, and attach them."""
        import fastmask as fm

        path = self.folder / MASKS_FILE
        found = self.resumed and path.is_file()
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if not found:
            assert self.discover is not None
            with preserved_random_state():
                point = SwitchPoint(self.parser, self.datasets, self.train_data, self.config, self.step)
                subnetworks = self.discover(point)
            if self.accelerator.is_main_process:
                checkpoints.replace_file(path, subnetworks.save)
            self.accelerator.wait_for_everyone()
        self._attach(fm.Subnetworks.load(path))
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()

    def _attach(self, subnetworks: Any) -> None:
        """Put the subnetworks under the encoder and number the languages as they do."""
        import fastmask as fm

        known = list(subnetworks.languages)
        for code in self.train_data:
            if code not in known:
                raise unknown("language", code, known)
        fm.attach(self.parser.encoder, subnetworks)
        self.subnetworks = subnetworks
        self.language_ids = {code: known.index(code) for code in known}
        if self.config.method == "dynamic":
            self.dynamic = DynamicMasks(self.parser, self.train_data, self.config, self.accelerator)
            self.accelerator.register_for_checkpointing(self.dynamic)

    def _checkpoint(self) -> None:
        """Save the state, unless the weights are spoilt."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parser.parameters()):
            raise TrainingDiverged("weights are not finite", self.step, checkpoints.latest(self.folder))
        content = {"sampler": self.sampler.state_dict(), "window": self.window, "history": self.log.history}
        write_masks = None if self.subnetworks is None else self.subnetworks.save
        checkpoints.save(self.accelerator, self.folder, self.step, content, write_masks)

    def _restore(self, path: Path) -> list[dict[str, Any]]:
        """Go back to a checkpoint; return the metrics up to it."""
        import fastmask as fm

        content = checkpoints.read_progress(path)
        self.sampler.load_state_dict(content["sampler"])
        if (path / MASKS_FILE).is_file():
            self._attach(fm.Subnetworks.load(path / MASKS_FILE))
        checkpoints.load(self.accelerator, path)
        if self.dynamic is not None:
            self.subnetworks = self.dynamic.subnetworks
        self.step, self.window = int(content["step"]), content["window"]
        return content["history"]

    def _finish(self, scouting_share: float | None) -> TrainResult:
        """Save the model where it is looked for."""
        self.accelerator.wait_for_everyone()
        parser = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        parser.eval()
        if self.accelerator.is_main_process:
            parser.save(self.folder / "model")
            if self.dynamic is not None:
                checkpoints.replace_file(self.folder / MASKS_FILE, self.subnetworks.save)
                checkpoints.replace_file(self.folder / DYNAMIC_FILE, self.dynamic.save)
        self.accelerator.wait_for_everyone()
        return TrainResult(parser, self.subnetworks, self.language_ids, self.log.history, self.folder, scouting_share)


def _accelerator(precision: str, cpu: bool) -> Any:
    """Return an `Accelerator`; a second run in the same process may have another precision than the first."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=cpu)
