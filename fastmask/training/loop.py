"""The training loop: first mixed batches on the full network, then each language's subnetwork, perhaps in episodes.

All methods train the full network alike for the first `discover_at` share of the steps. Then a callback returns the
subnetworks, they are saved and attached, and training goes on to the same number of steps, in mixed batches or in
episodes of meta-learning. A run that is killed at any moment and resumed ends with the weights and metrics of an
unbroken one. What was trained is on disk before it is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastmask.errors import unknown
from fastmask.optim import LiveAdamW
from fastmask.tasks.parsing.evaluation import evaluate, prepare
from fastmask.tasks.parsing.parser import Parser
from fastmask.training import saving
from fastmask.training.budget import Budget
from fastmask.training.build import build_optimizer, encode_training_data, peak_rates
from fastmask.training.config import TrainConfig
from fastmask.training.device import accelerator_for
from fastmask.training.dynamic import DynamicMasks
from fastmask.training.episodes import Episodes, episode_sampler
from fastmask.training.finished import MASKS_FILE
from fastmask.training.inputs import inputs_of
from fastmask.training.metrics import MetricsLog, TrainingProgress
from fastmask.training.outcome import SwitchPoint, TrainingDiverged, TrainResult
from fastmask.training.phases import MixedBatches, Phase
from fastmask.training.processes import held_by_first
from fastmask.training.random_state import preserved_random_state
from fastmask.training.run_folder import check_out
from fastmask.training.schedule import learning_rate_factor
from fastmask.training.window import Window

__all__ = ["MASKS_FILE", "SwitchPoint", "TrainResult", "TrainingDiverged", "train"]


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
        ConfigError: `out` holds another run, settings, data or masks differ from those of the run that is resumed, or
            no episode fits into the steps after the switch.
        CheckpointError: there are checkpoints and none is whole, or they do not fit. (A damaged one is named in a
            warning, and the run goes on from the one before.)
        HeldError: another process is training in `out`.
        OSError: something could not be written, as when the disk is full; what was written before is still there.
        ValueError: the data have too few languages, or a language too few sentences, for the episodes asked for.
        TrainingDiverged: loss, gradient or weights are not finite.
    """
    if config.method != "full" and discover is None:
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
        """Build everything; nothing is written."""
        from accelerate.utils import set_seed

        if config.threads:
            torch.set_num_threads(config.threads)
        self.parser, self.datasets, self.config, self.discover = parser, datasets, config, discover
        self.accelerator = accelerator_for(config.device, config.precision)
        self.folder = Path(config.out)
        self.train_data = encode_training_data(parser, datasets, config.max_length)
        self.budget = Budget.of(config, len(self.train_data))
        if config.meta != "none":
            episode_sampler(config, self.train_data)  # what is wrong with it is said before anything is written
        check_out(config)
        limit = config.dev_sentences or None
        self.dev = {code: prepare(parser, splits["dev"], limit) for code, splits in datasets.items() if "dev" in splits}
        self.inputs = inputs_of(parser.vocabulary, self.train_data, self.dev, config)
        set_seed(config.seed, device_specific=True)
        parser.to(self.accelerator.device)
        optimizer = build_optimizer(parser, config)
        self.announce = optimizer.announce if isinstance(optimizer, LiveAdamW) else None
        self.model, self.optimizer = self.accelerator.prepare(parser, optimizer)
        rates = peak_rates(parser, config)
        self.batches = MixedBatches(self.model, parser, self.train_data, config, rates, self.accelerator)
        self.phase: Phase = self.batches
        self.switched = False
        self.subnetworks: Any = None
        self.language_ids: dict[str, int] | None = None
        self.dynamic: DynamicMasks | None = None
        self.step = 0
        self.unscored = False  # whether the dev scores of this step are still to come
        self.checkpoint: Path | None = None  # the last one
        self.counts: dict[str, int] = {}  # of episodes, for the metrics
        self.window = Window()

    def run(self, on_step: Callable[[int], None] | None, show: bool) -> TrainResult:
        """Take the steps that are left."""
        config = self.config
        self.accelerator.wait_for_everyone()
        with ExitStack() as stack:
            stack.enter_context(held_by_first(self.accelerator, self.folder))
            history = saving.go_on(self)
            self.log = MetricsLog(self.folder, history, config.tensorboard, self.accelerator.is_main_process)
            stack.callback(self.log.close)
            show = show and self.accelerator.is_main_process
            bar = stack.enter_context(TrainingProgress(config.steps, self.step, show))
            bar.phase(self.phase.title)
            self.model.train()
            self.window.restart_clock()
            self._finish_step(bar)  # of a run that was killed after its last checkpoint
            while self.step < config.steps:
                if self.step == config.shared_steps and not self.switched:
                    saving.save(self)
                    if config.switch_step is not None:
                        bar.phase("finding subnetworks")
                        self._switch()
                        bar.phase(self.phase.title)
                before = self.step
                self._update()
                self._after(before, bar)
                if on_step is not None:
                    on_step(self.step)
            return self._result()

    def _after(self, before: int, bar: TrainingProgress) -> None:
        """Do what is due after an update that took the run from step `before` to the one it is at now."""
        config, last = self.config, self.step == self.config.steps

        def passed(every: int) -> bool:
            """Whether a multiple of `every` was reached or passed; never for 0."""
            return every > 0 and before // every < self.step // every

        if self.dynamic is not None and passed(config.update_every):
            self._update_masks(self.dynamic)
        if last or passed(config.log_every):
            bar.show(self.step, self._log_window())
        self.unscored = bool(self.dev) and (last or passed(config.eval_every))
        if last or passed(config.checkpoint_every):
            saving.save(self)
        self._finish_step(bar)

    def _finish_step(self, bar: TrainingProgress) -> None:
        """Do what comes after the checkpoint of a step: scores last, as they may fail where the training did not."""
        if self.step == self.config.steps:
            saving.write_model(self)
        if self.unscored:
            bar.show(self.step, self._evaluate())
            self.unscored = False
            self.window.restart_clock()

    def _update(self) -> None:
        """Take one step of the optimiser."""
        config = self.config
        factor = learning_rate_factor(self.step, config.steps, config.warmup_steps, config.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.phase.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        seen = self.phase.accumulate(self.step)
        for name, value in seen.losses.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"the {name.replace('_', ' ')} is {value}", seen.step, self.checkpoint)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient's norm is {norm}", seen.step, self.checkpoint)
        if self.announce is not None and self.language_ids is not None:
            self.announce([self.language_ids[language] for language in seen.languages])
        self.optimizer.step()
        self.step, self.counts = seen.step, seen.counts
        self.window.add(seen.losses, norm, seen.words)

    def _update_masks(self, dynamic: DynamicMasks) -> None:
        """Let dynamic subnetworks change, and note in the metrics whose did."""
        if changed := dynamic.update(self.step):
            self.subnetworks = dynamic.subnetworks
            self.log.add({"step": self.step, "masks_changed": changed})

    def _log_window(self) -> dict[str, Any]:
        """Write the means since the last line."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        record = {"step": self.step, **self.counts, **self.window.line(), "learning_rate": rate}
        self.log.add(record)
        return record

    def _evaluate(self) -> dict[str, Any]:
        """Score the dev data, each language with its subnetwork once there is one."""
        with self.accelerator.autocast():
            results = evaluate(self.parser, self.dev, self.language_ids)
        scores = {code: {"las": result.las, "uas": result.uas} for code, result in results.items()}
        mean = sum(score["las"] for score in scores.values()) / len(scores)
        record = {"step": self.step, "dev_las": mean, "dev": scores}
        self.log.add(record)
        return record

    def _switch(self) -> None:
        """Go on with subnetworks, and in episodes, as the settings say."""
        if self.config.method != "full":
            self.attach(self._find_subnetworks())
        if self.config.meta != "none":
            if not self.window.empty:
                self._log_window()  # plain steps and episodes do not go into one line
            self.phase = self.episodes()
        self.switched = True
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        self.window.restart_clock()

    def _find_subnetworks(self) -> Any:
        """Ask for the subnetworks, or take those that a killed process had already written."""
        import fastmask as fm

        if not saving.has_switch(self):
            assert self.discover is not None
            with preserved_random_state():
                point = SwitchPoint(self.parser, self.datasets, self.train_data, self.config, self.step)
                found = self.discover(point)
            saving.write_switch(self, found)
        return fm.Subnetworks.load(saving.switch_folder(self.folder) / MASKS_FILE)

    def attach(self, subnetworks: Any) -> None:
        """Put the subnetworks under the encoder and number the languages as they do."""
        import fastmask as fm

        known = list(subnetworks.languages)
        for code in self.train_data:
            if code not in known:
                raise unknown("language", code, known)
        fm.attach(self.parser.encoder, subnetworks)
        self.subnetworks = subnetworks
        self.language_ids = {code: known.index(code) for code in known}
        self.batches.use_subnetworks(self.language_ids)
        if self.config.method == "dynamic":
            self.dynamic = DynamicMasks(self.parser, self.train_data, self.config, self.accelerator)

    def episodes(self) -> Episodes:
        """The phase after the switch, if it is meta-learning."""
        rates = peak_rates(self.parser, self.config, episodes=True)
        return Episodes(self.parser, self.train_data, self.config, rates, self.accelerator)

    def _result(self) -> TrainResult:
        self.accelerator.wait_for_everyone()
        parser = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        parser.eval()
        scouting_share = None if self.dynamic is None else self.dynamic.scouting_share
        return TrainResult(
            parser, self.subnetworks, self.language_ids, self.log.history, self.folder, self.budget, scouting_share
        )
