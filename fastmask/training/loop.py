"""The training loop: first mixed batches on the full network, then each language's subnetwork, perhaps in episodes.

All methods train the full network alike for the first `discover_at` share of the steps. Then a callback returns the
subnetworks, they are attached, and training goes on to the same number of steps, in mixed batches or in episodes of
meta-learning. A run that is killed at any moment and resumed ends with the weights and metrics of an unbroken one. What
was trained is on disk before it is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed

from fastmask import gradients
from fastmask.dynamic import DynamicSubnetworks
from fastmask.files import SEAL, FileError, held, read_metadata, read_tensors, write_tensors
from fastmask.models import attach
from fastmask.models.attach import attached
from fastmask.optim import LiveAdamW, by_rows, sparse_gradients
from fastmask.settings import ConfigError
from fastmask.subnetworks import Subnetworks
from fastmask.subnetworks.subnetworks import masks_file
from fastmask.tasks.task import Splits, Task, heading
from fastmask.training import engine, methods, run_folder
from fastmask.training.batches import Episodes, MixedBatches
from fastmask.training.config import Budget, TrainConfig
from fastmask.training.methods import SwitchPoint
from fastmask.training.metrics import MetricsLog, TrainingProgress

Discover = Callable[[SwitchPoint], Subnetworks]


class TrainingDiverged(RuntimeError):  # noqa: N818 - it names what happened
    """Loss, gradient or weights are not finite; the message names the step and the last good checkpoint."""


@dataclass
class TrainResult:
    """What a run leaves."""

    task: Task = field(repr=False)  # trained, in evaluation mode, its encoder attached if there are subnetworks
    subnetworks: Subnetworks | None  # of the languages, or None for method `full`; of method `dynamic` the last ones
    history: list[dict[str, Any]] = field(repr=False)  # the records of ``metrics.jsonl``
    run: Path  # the run's folder; the model is in its ``model``, the masks in its ``masks.safetensors``
    budget: Budget  # how many optimizer steps, episodes, gradient passes and examples that took


def train(
    task: Task,
    datasets: Splits,
    config: TrainConfig,
    discover: Discover = methods.subnetworks_of,
    on_step: Callable[[int], None] | None = None,
    progress: bool = True,
    origin: Path | None = None,
) -> TrainResult:
    """Train the model of `task`, or resume the run in `config.out`.

    Args:
        task: newly built, with the same settings when resuming.
        datasets: language -> split -> rows ("train" for every language, "dev" where there is one).
        config: the settings; written to ``config.yaml`` of the run.
        discover: returns the subnetworks, the same ones when it is asked again. Random numbers it draws do not show in
            the rest of the run. With several processes each one calls it; the main one's answer counts.
        on_step: called with the number of steps done after each one.
        progress: show how far it is.
        origin: a checkpoint at the switch of another run, which took the same steps, to go on from.

    Raises:
        ConfigError, ValueError: what `run_folder.open_run`, `Budget.of` and `episode_sampler` refuse.
        CheckpointError: there are checkpoints and none is whole (a damaged newer one is a warning), or they do not fit.
        HeldError, OSError: another process trains in `out`, or it cannot be written; what was there still is.
        TrainingDiverged: loss, gradient or weights are not finite.
    """
    run = _Run(task, datasets, config, discover, origin)
    try:
        return run.train(on_step, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after step {run.step}") from None


class _Run:
    """One run: what is built once, the steps, and what is kept of them."""

    def __init__(
        self, task: Task, datasets: Splits, config: TrainConfig, discover: Discover, origin: Path | None = None
    ) -> None:
        """Build everything; nothing is written."""
        if config.threads:
            torch.set_num_threads(config.threads)
        self.task, self.datasets, self.config, self.discover, self.origin = task, datasets, config, discover, origin
        self.accelerator = engine.accelerator_for(config.device, config.precision)
        for name, value in (("method", "vector"), ("conflict", "pcgrad")):
            if getattr(config, name) == value and self.accelerator.num_processes > 1:
                raise ConfigError(f"{name} is {value!r}, which runs in one process (expected another one)")
        self.folder = Path(config.out)
        self.data = methods.training_data(task, datasets, config)
        task.check(self.data)
        dev = {name: splits["dev"] for name, splits in datasets.items() if "dev" in splits}
        some = {name: task.examples(methods.some_rows(rows, config.dev_sentences)) for name, rows in dev.items()}
        self.dev = task.scorable(some, "dev")
        self.inputs = {f"training data of {name}": task.digest(data) for name, data in self.data.items()}
        self.inputs |= {f"dev data of {name}": task.digest(data) for name, data in self.dev.items()}
        if config.masks is not None and config.method != "full":
            self.inputs[run_folder.MASKS_INPUT] = read_metadata(masks_file(config.masks)).get(SEAL, "")
        set_seed(config.seed, device_specific=True)
        task.model.to(self.accelerator.device)
        if config.freeze_embeddings:
            task.freeze_embeddings()
        optimizer = engine.build_optimizer(task, config)
        self.announce = optimizer.announce if isinstance(optimizer, LiveAdamW) else None
        self.tables = [] if self.announce is None else engine.looked_up_tables(task)
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self.batches = MixedBatches(task, self.model, self.data, config, self.accelerator)
        self.episodes = None if config.meta == "none" else Episodes(task, self.data, config, self.accelerator)
        self.phase: MixedBatches | Episodes = self.batches
        self.dynamic: DynamicSubnetworks | None = None
        self.step = 0
        self.unscored = False  # whether the dev scores of this step are still to come
        self.checkpoint: Path | None = None  # the last one
        self.counts: dict[str, int] = {}  # of episodes, for the metrics

    def train(self, on_step: Callable[[int], None] | None, show: bool) -> TrainResult:
        """Take the steps that are left."""
        config, main = self.config, self.accelerator.is_main_process
        with ExitStack() as stack:
            engine.on_first(self.accelerator, lambda: stack.enter_context(held(self.folder)))
            history, sums = self._resume()
            self.log = stack.enter_context(closing(MetricsLog(self.folder, history, sums, config.tensorboard, main)))
            bar = TrainingProgress(config.steps, self.step, heading(self.task.metric), show and main)
            self.bar = stack.enter_context(bar)
            self._begin_phase()
            self._finish_step()  # of a run that was killed after its last checkpoint
            while self.step < config.steps:
                if self.step == config.shared_steps and not self.switched:
                    if self.origin is None:
                        self._save()
                    if config.switch_step is not None:
                        self._switch()
                before = self.step
                self._update()
                self.bar.step(self.step, self.log.sums["loss"] / self.log.sums["steps"])
                self._after(before)
                if on_step is not None:
                    on_step(self.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.task.model.eval()
        budget = Budget.of(config, len(self.data))
        return TrainResult(self.task, self.subnetworks, self.log.history, self.folder, budget)

    @property
    def subnetworks(self) -> Subnetworks | None:
        """Those under the encoder, once there are some."""
        return attached(self.task.encoder).subnets if self.task.is_attached else None

    @property
    def switched(self) -> bool:
        """Whether there are subnetworks or episodes by now."""
        return self.subnetworks is not None or self.phase is not self.batches

    def _begin_phase(self) -> None:
        """Say what is trained from now on, and let the clock run."""
        self.bar.phase(self.phase.title)
        self.model.train()
        self.log.restart_clock()

    # ---- a step, and what is due after it

    def _update(self) -> None:
        """Take one step of the optimizer."""
        config = self.config
        warmup = round(config.steps * config.warmup)
        factor = engine.learning_rate_factor(self.step, config.steps, warmup, config.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.phase.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        alone = self.accelerator.num_processes == 1  # processes add up dense gradients
        with sparse_gradients(self.tables if alone else ()):
            seen = self.phase.accumulate(self.step)
        for table in self.tables:
            for weight in table.parameters():
                by_rows(weight)
        norm = gradients.clip(self.model.parameters(), config.max_grad_norm)
        for name, value in {**seen.losses, "norm of the gradient": norm}.items():
            if not math.isfinite(value):
                raise self._diverged(f"the {name.replace('_', ' ')} is {value}", seen.step)
        if self.announce is not None and self.subnetworks is not None:
            self.announce([self.subnetworks.index(language) for language in seen.languages])
        self.optimizer.step()
        self.step, self.counts = seen.step, seen.counts
        self.log.count({**seen.losses, "grad_norm": norm}, seen.words)

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        where = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
        return TrainingDiverged(f"{what} at step {step}; {where}. A lower learning rate or longer warm-up may help.")

    def _after(self, before: int) -> None:
        """Do what is due after an update that took the run from step `before` to the one it is at now."""
        config, last = self.config, self.step == self.config.steps

        def passed(every: int) -> bool:
            """Whether a multiple of `every` was reached or passed; never for 0."""
            return every > 0 and before // every < self.step // every

        if self.dynamic is not None and passed(config.update_every) and self.dynamic.due(self.step):
            scores = methods.scores_for_update(self.task, self.data, config, self.step)
            if changed := self.dynamic.update(self.step, scores):
                self.log.add({"step": self.step, "masks_changed": changed})
        if last or passed(config.log_every):
            self.bar.show(self._log_means())
        self.unscored = bool(self.dev) and (last or passed(config.eval_every))
        if last or passed(config.checkpoint_every):
            if last:
                self.bar.phase("saving")
            self._save()
        self._finish_step()

    def _finish_step(self) -> None:
        """Do what comes after the checkpoint of a step: scores last, as they may fail where the training did not."""
        if self.step == self.config.steps:
            write = partial(run_folder.write_finished, self.folder, self.task, self._mask_writers())
            engine.on_first(self.accelerator, write)
            self.bar.phase(self.phase.title)
        if self.unscored:
            self.bar.phase("scoring dev data")
            scores = self._evaluate()
            self.bar.phase(self.phase.title)
            self.bar.show(scores)
            self.unscored = False
            self.log.restart_clock()

    def _log_means(self) -> dict[str, Any]:
        """Write the means since the last line."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        return self.log.add({"step": self.step, **self.counts, **self.log.means(), "learning_rate": rate})

    def _evaluate(self) -> dict[str, Any]:
        """Score the dev data, each language with its subnetwork once there is one; processes share the languages."""
        mine: list[tuple[str, dict[str, float]]] = []
        with self.accelerator.autocast():
            for name in list(self.dev)[self.accelerator.process_index :: self.accelerator.num_processes]:
                mine.append((name, self.task.scored(self.dev[name], name if self.task.is_attached else None)))
        found = dict(gather_object(mine))
        scores = {name: found[name] for name in self.dev}
        mean = sum(score[self.task.metric] for score in scores.values()) / len(scores)
        return self.log.add({"step": self.step, "dev_score": mean, "dev": scores})

    # ---- the switch to subnetworks and episodes

    def _switch(self) -> None:
        """Go on with subnetworks, and in episodes, as the settings say."""
        self.bar.phase("finding subnetworks")
        if self.config.method == "vector":
            self._attach(Subnetworks.full(self.task.encoder, list(self.data)))
        elif self.config.method != "full":
            point = SwitchPoint(self.task, self.datasets, self.data, self.config)
            with engine.preserved_random_state(self.accelerator.device):
                found = self.discover(point)
            self._attach(engine.on_first(self.accelerator, lambda: found))
        if self.episodes is not None:
            if self.log.sums:
                self._log_means()  # plain steps and episodes do not go into one line
            self.phase = self.episodes
        self.optimizer.zero_grad(set_to_none=True)
        self._begin_phase()

    def _attach(self, subnetworks: Subnetworks) -> None:
        """Put the subnetworks under the encoder and number the languages as they do."""
        ids = subnetworks.ids(self.data)
        attach(self.task.encoder, subnetworks)
        if self.config.method == "vector":
            engine.add_parameter(self.optimizer, self.task, self.task.add_vectors(len(subnetworks.languages)))
        self.batches.use_subnetworks(ids)
        if self.config.method == "dynamic":
            # Updated about every `update_every` steps: when the run's step, which an episode may move by several,
            # reaches or passes a multiple of it. Masks that change at the end would never be trained.
            last, seed = self.config.last_mask_step, self.config.seed
            self.dynamic = DynamicSubnetworks(self.task.encoder, every=1, until=last, seed=seed)

    # ---- what is kept, by one process for all

    def _save(self) -> None:
        """Write a checkpoint, unless the weights are spoilt."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.task.model.parameters()):
            raise self._diverged("weights are not finite", self.step)
        moments = run_folder.optimizer_tensors(self.optimizer)
        writers = {
            run_folder.WEIGHTS: lambda path: write_tensors(path, self.task.model.state_dict()),
            run_folder.OPTIMIZER: lambda path: write_tensors(path, moments),
            **self._mask_writers(),
        }
        progress = run_folder.Progress(
            inputs=self.inputs,
            sampler=self.batches.sampler.state_dict(),
            window=self.log.sums,
            history=self.log.history,
            evaluate=self.unscored,
            random=gather_object([engine.random_state(self.accelerator.device)]),
            episodes=self.phase.state_dict() if isinstance(self.phase, Episodes) else None,
        )
        # Other runs can branch off from the shared steps, so their end is kept.
        keep, pinned = self.config.keep_checkpoints, self.config.shared_steps
        write = partial(run_folder.save, self.folder, self.step, writers, progress, keep, pinned)
        self.checkpoint = engine.on_first(self.accelerator, write)

    def _mask_writers(self) -> dict[str, Callable[[Path], Any]]:
        """What writes the subnetworks, and how they came to be if they are dynamic."""
        subnetworks = {} if self.subnetworks is None else {run_folder.MASKS_FILE: self.subnetworks.save}
        return subnetworks | ({} if self.dynamic is None else {run_folder.DYNAMIC_FILE: self.dynamic.save})

    def _resume(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Bring the run to where its folder says it was; returns the metrics up to there, and since the last line."""
        look = partial(run_folder.open_run, self.config, self.inputs, self.accelerator.num_processes, self.origin)
        start = engine.on_first(self.accelerator, look)
        if start is None:
            return [], {}
        try:
            progress = run_folder.read_progress(start)
            self.batches.sampler.load_state_dict(progress.sampler)
            if (start / run_folder.MASKS_FILE).is_file():
                self._attach(Subnetworks.load(start / run_folder.MASKS_FILE))
            if self.episodes is not None and progress.episodes is not None:
                self.phase = self.episodes
                self.episodes.load_state_dict(progress.episodes)
            self.task.model.load_state_dict(read_tensors(start / run_folder.WEIGHTS)[0])
            run_folder.load_optimizer(self.optimizer, read_tensors(start / run_folder.OPTIMIZER)[0])
            if self.dynamic is not None:
                self.dynamic.load(start / run_folder.DYNAMIC_FILE)
            self.step, self.unscored, self.checkpoint = run_folder.step_of(start), progress.evaluate, start
            mine = progress.random[self.accelerator.process_index]
            engine.set_random_state(mine, self.accelerator.device)  # last: what is built draws numbers
        except (FileError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise run_folder.CheckpointError(f"the run cannot go on from {start}: {error}") from error
        return progress.history, progress.window
