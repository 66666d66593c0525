"""The training loop: first mixed batches on the full network, then each language's subnetwork, perhaps in episodes.

All methods train the full network alike for the first `discover_at` share of the steps. Then a callback returns the
subnetworks, they are saved and attached, and training goes on to the same number of steps, in mixed batches or in
episodes of meta-learning. A run that is killed at any moment and resumed ends with the weights and metrics of an
unbroken one. What was trained is on disk before it is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmask.errors import unknown
from fastmask.files import FileError, held, read_json_lines, remove_tree, write_folder
from fastmask.files.manifest import MANIFEST, Origin, check_files, write_manifest
from fastmask.models import attach
from fastmask.optim import LiveAdamW
from fastmask.optim.rows import by_rows, sparse_gradients
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.tasks.task import Splits, Task, heading
from fastmask.training import checkpoints
from fastmask.training.batches import MixedBatches
from fastmask.training.checkpoints import CheckpointError
from fastmask.training.config import TrainConfig
from fastmask.training.engine import (
    accelerator_for,
    add_parameter,
    build_optimizer,
    clip_gradients,
    gathered,
    learning_rate_factor,
    looked_up_tables,
    on_first,
    peak_rates,
    preserved_random_state,
    random_state,
)
from fastmask.training.episodes import Budget, Episodes, episode_sampler
from fastmask.training.methods import DynamicMasks, SwitchPoint, digest_of_masks, some_rows, subnetworks_of
from fastmask.training.metrics import METRICS_FILE, MetricsLog, TrainingProgress, Window
from fastmask.training.run_folder import (
    MASKS_FILE,
    check_out,
    check_run,
    is_finished,
    load_run,
    open_run,
    write_finished,
)

__all__ = ["MASKS_INPUT", "TrainResult", "TrainingDiverged", "switch_folder", "train"]

MASKS_INPUT = "masks file"
Writers = dict[str, Callable[[Path], Any]]


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


@dataclass
class TrainResult:
    """What a run leaves.

    Attributes:
        task: trained, in evaluation mode, its encoder attached if there are subnetworks.
        subnetworks: of the languages, or None for method `full`; of method `dynamic` the last ones.
        history: the records of ``metrics.jsonl``.
        run: the run's folder; the model is in its ``model``, the masks in its ``masks.safetensors``.
        budget: how many optimiser steps, episodes, gradient passes and examples that took.
        scouting_share: share of the time since the switch (or since resuming) that went into looking for better masks;
            None for methods other than `dynamic`.
    """

    task: Task = field(repr=False)
    subnetworks: Subnetworks | None
    history: list[dict[str, Any]] = field(repr=False)
    run: Path
    budget: Budget
    scouting_share: float | None = None


def train(
    task: Task,
    datasets: Splits,
    config: TrainConfig,
    discover: Callable[[SwitchPoint], Subnetworks] = subnetworks_of,
    on_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the model of `task`, or resume the run in `config.out`.

    Args:
        task: newly built, with the same settings when resuming.
        datasets: language -> split -> rows ("train" for every language, "dev" where there is one).
        config: the settings; written to ``config.yaml`` of the run.
        discover: returns the subnetworks. Random numbers it draws do not show in the rest of the run. With several
            processes each one calls it; the main one's answer counts.
        on_step: called with the number of steps done after each one.
        progress: show how far it is.

    Raises:
        ConfigError: `out` holds another run, settings, data or masks differ from those of the run that is resumed, or
            no episode fits into the steps after the switch.
        CheckpointError: there are checkpoints and none is whole, or they do not fit. (A damaged one is named in a
            warning, and the run goes on from the one before.)
        HeldError: another process is training in `out`.
        OSError: something could not be written, as when the disk is full; what was written before is still there.
        ValueError: the data have too few languages, or a language too few examples, for the episodes asked for.
        TrainingDiverged: loss, gradient or weights are not finite.
    """
    return _Run(task, datasets, config, discover).train(on_step, progress)


class _Run:
    """One run: what is built once, the steps, and what is kept of them."""

    def __init__(
        self, task: Task, datasets: Splits, config: TrainConfig, discover: Callable[[SwitchPoint], Subnetworks]
    ) -> None:
        """Build everything; nothing is written."""
        from accelerate.utils import set_seed

        if config.threads:
            torch.set_num_threads(config.threads)
        self.task, self.datasets, self.config, self.discover = task, datasets, config, discover
        self.accelerator = accelerator_for(config.device, config.precision)
        self.folder = Path(config.out)
        self.data = {name: task.training_examples(splits["train"], name) for name, splits in datasets.items()}
        task.check(self.data)
        self.budget = Budget.of(config, len(self.data))
        if config.meta != "none":
            episode_sampler(config, self.data)  # what is wrong with it is said before anything is written
        for name, value in (("method", "vector"), ("conflict", "pcgrad")):
            if getattr(config, name) == value and self.accelerator.num_processes > 1:
                raise ConfigError(f"{name} is {value!r}, which runs in one process (expected another one)")
        check_out(config)
        dev = {name: splits["dev"] for name, splits in datasets.items() if "dev" in splits}
        self.dev = {name: task.examples(some_rows(rows, config.dev_sentences)) for name, rows in dev.items()}
        self.inputs = {
            **{f"training data of {name}": task.digest(examples) for name, examples in self.data.items()},
            **{f"dev data of {name}": task.digest(examples) for name, examples in self.dev.items()},
        }
        if given := digest_of_masks(config):
            self.inputs[MASKS_INPUT] = given
        set_seed(config.seed, device_specific=True)
        task.model.to(self.accelerator.device)
        if config.freeze_embeddings:
            task.freeze_embeddings()
        optimizer = build_optimizer(task, config)
        self.announce = optimizer.announce if isinstance(optimizer, LiveAdamW) else None
        self.tables = [] if self.announce is None else looked_up_tables(task)
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        rates = peak_rates(task, config)
        self.batches = MixedBatches(task, self.model, self.data, config, rates, self.accelerator)
        self.phase: MixedBatches | Episodes = self.batches
        self.subnetworks: Subnetworks | None = None
        self.dynamic: DynamicMasks | None = None
        self.step = 0
        self.unscored = False  # whether the dev scores of this step are still to come
        self.checkpoint: Path | None = None  # the last one
        self.counts: dict[str, int] = {}  # of episodes, for the metrics
        self.window = Window()

    @property
    def switched(self) -> bool:
        """Whether there are subnetworks or episodes by now."""
        return self.subnetworks is not None or self.phase is not self.batches

    # ---- the steps

    def train(self, on_step: Callable[[int], None] | None, show: bool) -> TrainResult:
        """Take the steps that are left."""
        config = self.config
        self.accelerator.wait_for_everyone()
        with ExitStack() as stack:
            on_first(self.accelerator, lambda: stack.enter_context(held(self.folder)))
            history = self._resume()
            self.log = MetricsLog(self.folder, history, config.tensorboard, self.accelerator.is_main_process)
            stack.callback(self.log.close)
            show = show and self.accelerator.is_main_process
            bar = stack.enter_context(TrainingProgress(config.steps, self.step, heading(self.task.metric), show))
            bar.phase(self.phase.title)
            self.model.train()
            self.window.restart_clock()
            self._finish_step(bar)  # of a run that was killed after its last checkpoint
            while self.step < config.steps:
                if self.step == config.shared_steps and not self.switched:
                    self._save()
                    if config.switch_step is not None:
                        bar.phase("finding subnetworks")
                        self._switch()
                        bar.phase(self.phase.title)
                before = self.step
                self._update()
                self._after(before, bar)
                bar.step(self.step)
                if on_step is not None:
                    on_step(self.step)
            return self._result()

    def _update(self) -> None:
        """Take one step of the optimiser."""
        config = self.config
        factor = learning_rate_factor(self.step, config.steps, config.warmup_steps, config.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.phase.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        alone = self.accelerator.num_processes == 1  # processes add up dense gradients
        with sparse_gradients(self.tables if alone else ()):
            seen = self.phase.accumulate(self.step)
        for table in self.tables:
            for weight in table.parameters():
                by_rows(weight)
        for name, value in seen.losses.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"the {name.replace('_', ' ')} is {value}", seen.step, self.checkpoint)
        norm = clip_gradients(self.model.parameters(), config.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient's norm is {norm}", seen.step, self.checkpoint)
        if self.announce is not None and self.subnetworks is not None:
            self.announce([self.subnetworks.index(language) for language in seen.languages])
        self.optimizer.step()
        self.step, self.counts = seen.step, seen.counts
        self.window.add(seen.losses, norm, seen.words)

    def _after(self, before: int, bar: TrainingProgress) -> None:
        """Do what is due after an update that took the run from step `before` to the one it is at now."""
        config, last = self.config, self.step == self.config.steps

        def passed(every: int) -> bool:
            """Whether a multiple of `every` was reached or passed; never for 0."""
            return every > 0 and before // every < self.step // every

        if self.dynamic is not None and passed(config.update_every) and (changed := self.dynamic.update(self.step)):
            self.subnetworks = self.dynamic.subnetworks
            self.log.add({"step": self.step, "masks_changed": changed})
        if last or passed(config.log_every):
            bar.show(self.step, self._log_window())
        self.unscored = bool(self.dev) and (last or passed(config.eval_every))
        if last or passed(config.checkpoint_every):
            if last:
                bar.phase("saving")
            self._save()
        self._finish_step(bar)

    def _finish_step(self, bar: TrainingProgress) -> None:
        """Do what comes after the checkpoint of a step: scores last, as they may fail where the training did not."""
        if self.step == self.config.steps:
            self._write_model()
            bar.phase(self.phase.title)
        if self.unscored:
            bar.phase("scoring dev data")
            scores = self._evaluate()
            bar.phase(self.phase.title)
            bar.show(self.step, scores)
            self.unscored = False
            self.window.restart_clock()

    def _log_window(self) -> dict[str, Any]:
        """Write the means since the last line."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        record = {"step": self.step, **self.counts, **self.window.line(), "learning_rate": rate}
        self.log.add(record)
        return record

    def _evaluate(self) -> dict[str, Any]:
        """Score the dev data, each language with its subnetwork once there is one; processes share the languages."""
        mine: list[tuple[str, dict[str, float]]] = []
        with self.accelerator.autocast():
            for name in list(self.dev)[self.accelerator.process_index :: self.accelerator.num_processes]:
                with self.task.reading(name if self.task.is_attached else None):
                    predictions = self.task.predict(self.dev[name])
                mine.append((name, self.task.score(self.dev[name], predictions)))
        found = dict(gathered(mine))
        scores = {name: found[name] for name in self.dev}
        mean = sum(score[self.task.metric] for score in scores.values()) / len(scores)
        record = {"step": self.step, "dev_score": mean, "dev": scores}
        self.log.add(record)
        return record

    def _result(self) -> TrainResult:
        self.accelerator.wait_for_everyone()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.task.model.eval()
        share = None if self.dynamic is None else self.dynamic.scouting_share
        return TrainResult(self.task, self.subnetworks, self.log.history, self.folder, self.budget, share)

    # ---- the switch to subnetworks and episodes

    def _switch(self) -> None:
        """Go on with subnetworks, and in episodes, as the settings say."""
        if self.config.method != "full":
            self._attach(self._find_subnetworks())
        if self.config.meta != "none":
            if not self.window.empty:
                self._log_window()  # plain steps and episodes do not go into one line
            self.phase = self._episodes()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        self.window.restart_clock()

    def _find_subnetworks(self) -> Subnetworks:
        """Ask for the subnetworks, or take those that a killed process had already written: they may take long."""
        if self.config.method == "vector":
            return Subnetworks.full(self.task.encoder, list(self.data))
        folder, origin = switch_folder(self.folder), self._origin()

        def known() -> bool:
            with suppress(FileError):
                return check_files(folder) == origin
            return False

        if not on_first(self.accelerator, known):
            with preserved_random_state(self.accelerator.device):
                process, processes = self.accelerator.process_index, self.accelerator.num_processes
                point = SwitchPoint(self.task, self.datasets, self.data, self.config, self.step, process, processes)
                found = self.discover(point)
            manifest = partial(write_manifest, origin=origin, names=[MASKS_FILE])
            writers: Writers = {MASKS_FILE: found.save, MANIFEST: manifest}
            on_first(self.accelerator, lambda: write_folder(folder, writers, lambda: remove_tree(folder)))
        return Subnetworks.load(folder / MASKS_FILE)

    def _attach(self, subnetworks: Subnetworks) -> None:
        """Put the subnetworks under the encoder and number the languages as they do."""
        for name in self.data:
            if name not in subnetworks.languages:
                raise unknown("language", name, subnetworks.languages)
        attach(self.task.encoder, subnetworks)
        if self.config.method == "vector":
            add_parameter(self.optimizer, self.task, self.task.add_vectors(len(subnetworks.languages)))
        self.subnetworks = subnetworks
        self.batches.use_subnetworks({name: number for number, name in enumerate(subnetworks.languages)})
        if self.config.method == "dynamic":
            self.dynamic = DynamicMasks(self.task, self.data, self.config, self.accelerator)

    def _episodes(self) -> Episodes:
        rates = peak_rates(self.task, self.config, episodes=True)
        return Episodes(self.task, self.data, self.config, rates, self.accelerator)

    # ---- what is kept, by one process for all

    def _origin(self) -> Origin:
        """What is true of everything that is written now."""
        settings, processes = self.config.identity(), self.accelerator.num_processes
        return Origin(step=self.step, processes=processes, settings=settings, inputs=self.inputs)

    def _mask_writers(self) -> Writers:
        """What writes the subnetworks, and how they came to be if they are dynamic."""
        writers: Writers = {}
        if self.subnetworks is not None:
            writers[checkpoints.MASKS] = self.subnetworks.save
        if self.dynamic is not None:
            writers[checkpoints.DYNAMIC] = self.dynamic.save
        return writers

    def _save(self) -> None:
        """Write a checkpoint, unless the weights are spoilt."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.task.model.parameters()):
            raise TrainingDiverged("weights are not finite", self.step, self.checkpoint)
        states = gathered([random_state(self.accelerator.device)])
        writers: Writers = {
            checkpoints.MODEL: partial(checkpoints.save_weights, self.task.model),
            checkpoints.OPTIMIZER: partial(checkpoints.save_optimizer, self.optimizer),
            checkpoints.RANDOM: partial(checkpoints.save_random_states, states),
            **self._mask_writers(),
        }
        progress = checkpoints.Progress(
            sampler=self.batches.sampler.state_dict(),
            window=self.window.state_dict(),
            history=self.log.history,
            evaluate=self.unscored,
            episodes=self.phase.state_dict() if isinstance(self.phase, Episodes) else None,
        )
        # Other runs can branch off from the shared steps, so their end is kept.
        keep, pinned = self.config.keep_checkpoints, self.config.shared_steps
        write = partial(checkpoints.save, self.folder, self._origin(), writers, progress, keep, pinned)
        self.checkpoint = on_first(self.accelerator, write)

    def _write_model(self) -> None:
        """Leave model and masks where they are looked for, unless they are there."""

        def write() -> None:
            if is_finished(self.folder):
                with suppress(FileError):
                    if check_run(self.folder) == self._origin():
                        return
            write_finished(self.folder, self.task, self._origin(), self._mask_writers())

        on_first(self.accelerator, write)

    # ---- going on

    def _resume(self) -> list[dict[str, Any]]:
        """Bring the run to where its folder says it was; returns the metrics up to there."""
        look = partial(open_run, self.config, self.inputs, self.accelerator.num_processes)
        start = on_first(self.accelerator, look)
        if start is None:
            return []
        try:
            return self._to_the_end() if start == self.folder else self._to_checkpoint(start)
        except (FileError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{start} cannot be gone on from: {error}") from error

    def _to_checkpoint(self, path: Path) -> list[dict[str, Any]]:
        progress = checkpoints.read_progress(path)
        self.batches.sampler.load_state_dict(progress.sampler)
        if (path / checkpoints.MASKS).is_file():
            self._attach(Subnetworks.load(path / checkpoints.MASKS))
        if progress.episodes is not None:
            self.phase = self._episodes()
            self.phase.load_state_dict(progress.episodes)
        checkpoints.load_weights(self.task.model, path / checkpoints.MODEL)
        checkpoints.load_optimizer(self.optimizer, path / checkpoints.OPTIMIZER)
        if self.dynamic is not None:
            self.dynamic.load(path / checkpoints.DYNAMIC)
            self.subnetworks = self.dynamic.subnetworks
        self.window.load_state_dict(progress.window)
        self.step, self.unscored, self.checkpoint = checkpoints.step_of(path), progress.evaluate, path
        process, device = self.accelerator.process_index, self.accelerator.device
        checkpoints.load_random_state(path / checkpoints.RANDOM, process, device)  # last: what is built draws numbers
        return progress.history

    def _to_the_end(self) -> list[dict[str, Any]]:
        """A run that has finished and lost its checkpoints since: nothing is left but to score it."""
        loaded = load_run(self.folder, attached=False)
        if loaded.subnetworks is not None:
            self._attach(loaded.subnetworks)
        self.task.model.load_state_dict(loaded.task.model.state_dict())
        self.step = self.config.steps
        history: list[dict[str, Any]] = list(read_json_lines(self.folder / METRICS_FILE))
        self.unscored = bool(self.dev) and not any(r["step"] == self.step and "dev" in r for r in history)
        return history


def switch_folder(run: Path) -> Path:
    """Where the subnetworks are kept that were found at the switch."""
    return checkpoints.folder_of(run) / "switch"
