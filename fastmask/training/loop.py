"""The training loop: first mixed batches on the full network, then each language's subnetwork, perhaps in episodes.

All methods train the full network alike for the first `discover_at` share of the steps. Then a callback returns the
subnetworks, they are saved as ``masks.safetensors`` and attached, and training goes on to the same number of steps, in
mixed batches or in episodes of meta-learning. A run that is killed at any moment and resumed ends with the weights and
metrics of an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastmask.errors import unknown
from fastmask.files import replace_file
from fastmask.optim import LiveAdamW
from fastmask.parsing.evaluation import evaluate, prepare
from fastmask.parsing.parser import Parser
from fastmask.training import checkpoints
from fastmask.training.budget import Budget
from fastmask.training.build import build_optimizer, encode_training_data, peak_rates
from fastmask.training.config import TrainConfig
from fastmask.training.device import accelerator_for
from fastmask.training.dynamic import DYNAMIC_FILE, DynamicMasks
from fastmask.training.episodes import Episodes, episode_sampler
from fastmask.training.metrics import MetricsLog, TrainingProgress
from fastmask.training.outcome import SwitchPoint, TrainingDiverged, TrainResult
from fastmask.training.phases import MixedBatches, Phase
from fastmask.training.random_state import preserved_random_state
from fastmask.training.run_folder import open_run
from fastmask.training.schedule import learning_rate_factor
from fastmask.training.window import Window

__all__ = ["MASKS_FILE", "SwitchPoint", "TrainResult", "TrainingDiverged", "train"]

MASKS_FILE = checkpoints.MASKS


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
        ConfigError: `out` holds another run, the settings differ from those of the run that is resumed, or no episode
            fits into the steps after the switch.
        CheckpointError: the checkpoint does not fit.
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
        checkpoint = open_run(config, self.accelerator)
        self.resumed = checkpoint is not None
        limit = config.dev_sentences or None
        self.dev = {code: prepare(parser, splits["dev"], limit) for code, splits in datasets.items() if "dev" in splits}
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
        self.counts: dict[str, int] = {}  # of episodes, for the metrics
        self.window = Window()
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
            bar.phase(self.phase.title)
            self.window.restart_clock()
            while self.step < config.steps:
                if self.step == config.shared_steps and not self.switched:
                    self._checkpoint()
                    if config.switch_step is not None:
                        bar.phase("finding subnetworks")
                        self._switch()
                        bar.phase(self.phase.title)
                before = self.step
                self._update()
                self._after(before, bar)
                if on_step is not None:
                    on_step(self.step)
        return self._finish()

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
        if last or passed(config.eval_every):
            bar.show(self.step, self._evaluate())
            self.window.restart_clock()
        if last or passed(config.checkpoint_every):
            self._checkpoint()

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
                what = f"the {name.replace('_', ' ')} is {value}"
                raise TrainingDiverged(what, seen.step, checkpoints.latest(self.folder))
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient's norm is {norm}", seen.step, checkpoints.latest(self.folder))
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
        """Go on with subnetworks, and in episodes, as the settings say."""
        if self.config.method != "full":
            self._attach(self._find_subnetworks())
        if self.config.meta != "none":
            if not self.window.empty:
                self._log_window()  # plain steps and episodes do not go into one line
            self.phase = self._episodes()
        self.switched = True
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        self.window.restart_clock()

    def _find_subnetworks(self) -> Any:
        """Ask for the subnetworks, or take those that a killed process had already written."""
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
                replace_file(path, subnetworks.save)
            self.accelerator.wait_for_everyone()
        return fm.Subnetworks.load(path)

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
        self.batches.use_subnetworks(self.language_ids)
        if self.config.method == "dynamic":
            self.dynamic = DynamicMasks(self.parser, self.train_data, self.config, self.accelerator)
            self.accelerator.register_for_checkpointing(self.dynamic)

    def _episodes(self) -> Episodes:
        rates = peak_rates(self.parser, self.config, episodes=True)
        return Episodes(self.parser, self.train_data, self.config, rates, self.accelerator)

    def _checkpoint(self) -> None:
        """Save the state, unless the weights are spoilt."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parser.parameters()):
            raise TrainingDiverged("weights are not finite", self.step, checkpoints.latest(self.folder))
        content = {
            "sampler": self.batches.state_dict(),
            "window": self.window.state_dict(),
            "history": self.log.history,
        }
        if self.phase is not self.batches:
            content["episodes"] = self.phase.state_dict()
        write_masks = None if self.subnetworks is None else self.subnetworks.save
        # Other runs can branch off from the shared steps, so their end is kept.
        keep, pinned = self.config.keep_checkpoints, self.config.shared_steps
        checkpoints.save(self.accelerator, self.folder, self.step, content, write_masks, keep, pinned)

    def _restore(self, path: Path) -> list[dict[str, Any]]:
        """Go back to a checkpoint; return the metrics up to it."""
        import fastmask as fm

        content = checkpoints.read_progress(path)
        self.batches.load_state_dict(content["sampler"])
        if (path / MASKS_FILE).is_file():
            self._attach(fm.Subnetworks.load(path / MASKS_FILE))
            self.switched = True
        if "episodes" in content:
            self.phase = self._episodes()
            self.phase.load_state_dict(content["episodes"])
            self.switched = True
        checkpoints.load(self.accelerator, path)
        if self.dynamic is not None:
            self.subnetworks = self.dynamic.subnetworks
        self.step = int(content["step"])
        self.window.load_state_dict(content["window"])
        return content["history"]

    def _finish(self) -> TrainResult:
        """Save the model where it is looked for."""
        self.accelerator.wait_for_everyone()
        parser = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        parser.eval()
        if self.accelerator.is_main_process:
            parser.save(self.folder / "model")
            if self.dynamic is not None:
                replace_file(self.folder / MASKS_FILE, self.subnetworks.save)
                replace_file(self.folder / DYNAMIC_FILE, self.dynamic.save)
        self.accelerator.wait_for_everyone()
        scouting_share = None if self.dynamic is None else self.dynamic.scouting_share
        return TrainResult(
            parser, self.subnetworks, self.language_ids, self.log.history, self.folder, self.budget, scouting_share
        )
