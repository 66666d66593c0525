"""`DynamicSubnetworks`: scouting, updating and remembering the masks of a model that is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.discovery.gates import probes_of
from fastmask.dynamic.history import History
from fastmask.dynamic.scout import scout
from fastmask.dynamic.swap import Swap
from fastmask.errors import unknown
from fastmask.models.attach import attached, owner_of
from fastmask.models.editing import set_subnetwork
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["STRATEGIES", "DynamicSubnetworks"]

STRATEGIES = ("swap", "random-swap")
VERSION = 2  # of the state: in 1, units came in by magnitude


class DynamicSubnetworks:
    """Subnetworks that are updated jointly with the model they are attached to.

    A training loop scouts each language on a small batch every `every` steps, and then updates::

        dynamic = fm.DynamicSubnetworks(model, until=steps * 3 // 4)
        for step in range(1, steps + 1):
            ...                                          # an ordinary training step
            if dynamic.due(step):
                for language in languages:
                    dynamic.scout(language, small_batch_of(language), loss)
                dynamic.update(step)

    Scouts may also be spread over the steps in between: what they see is added up until the next update. The number of
    live heads and of live neurons of every language stays what it is, and every layer keeps at least one of each.
    Parameters are never touched, so optimizers need not know. No random state is read
    or changed.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached.
        strategy: "swap" (weak live units for dead ones of higher importance) or "random-swap" (its control: the dead
            ones are drawn).
        every: steps between updates.
        until: the last step after which masks are updated; None: no end. Leave some steps at the end in which the
            weights are trained with the masks that stay: what comes in has not been trained for its language before.
        swaps: most pairs of heads, and of neurons, that a language swaps in one update: a whole number from 1 on, or a
            share of its live units below 1 (then at least one pair).
        margin: a unit comes in if what it would bring is more than (1 + margin) times the worth of the
            leaving one (`fastmask.dynamic.swap` says in which numbers).
        decay: weight of what was seen before an update, beside what is new, 0 to below 1.

    Attributes:
        languages: names, in the order of the attached subnetworks.
        history: every mask that a language had, a sequence of `Snapshot(step, language, heads, neurons)` that starts
            with the masks at hand as of step 0; `history.at(step)` are the `Subnetworks` of all languages then.
        seconds: time spent in scouts and updates so far, to be compared with that of the whole training.

    Raises:
        KeyError: an unknown strategy; the message names the nearest.
        ValueError: an option out of range, nothing attached, masks over weights only, masks that leave a layer without
            a live unit, or none in which anything could change; subnetworks attached with `forward="full"`.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str = "swap",
        *,
        every: int = 100,
        until: int | None = None,
        swaps: float = 0.05,
        margin: float = 0.2,
        decay: float = 0.8,
    ) -> None:
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
        _check_options(every, until, swaps, margin, decay)
        probes_of(model)  # sees that there are units to score
        subnets = attached(model).subnets
        masks = _masks_of(subnets)
        _check_masks(subnets.languages, masks)
        self.model = owner_of(model)
        self.languages = subnets.languages
        self.strategy, self.every, self.until = strategy, every, until
        self.history = History(subnets)
        self.seconds = 0.0
        self._swap = Swap(masks, swaps, margin, decay, shuffled=strategy == "random-swap")
        # What scouts have seen since the last update: sums over examples, and how many.
        self._sums = {
            what: {kind: torch.zeros(keep.shape, dtype=torch.float64) for kind, keep in masks.items()}
            for what in self._swap.reads
        }
        self._examples = torch.zeros(len(self.languages), dtype=torch.float64)

    def due(self, step: int) -> bool:
        """Whether masks are updated after step number `step`, counted from 1."""
        return step > 0 and step % self.every == 0 and (self.until is None or step <= self.until)

    def scout(self, language: str, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        """Look at all units of one language, dead ones too, on a small batch.

        Args:
            language: one of `languages`.
            batch: what `loss` takes; a few examples, all of this language.
            loss: runs the model on the batch, once, and returns one loss for each example, [B]; called inside
                `fastmask.language(model, language)`, with the model in eval mode and parameters that get no gradient.

        Raises:
            KeyError: an unknown language.
            ValueError: a loss of another shape.
            FloatingPointError: a gradient is not finite; nothing is kept of this scout.
        """
        with self._timed():
            row = self._subnetworks().index(language)
            found = scout(self.model, language, batch, loss)
            for what, sums in self._sums.items():
                for kind, of_kind in getattr(found, what).items():
                    sums[kind][row] += of_kind
            self._examples[row] += found.examples

    def update(self, step: int, reduce: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """Give new masks to the languages that were scouted since the last update, if one is due.

        Args:
            step: the number of training steps done.
            reduce: with several processes: returns the sum of a float64 tensor [n] over all of them. Each process
                then scouts its own examples, all call `update`, and all get the same masks.

        Returns:
            The languages whose masks changed. Of the attached model, only the masks of these are replaced.

        Raises:
            ValueError: `step` lies before that of the last change.
        """
        if not self.due(step):
            return []
        if step < self.history[-1].step:
            raise ValueError(f"update(step={step}): masks were last changed after step {self.history[-1].step}")
        with self._timed():
            self._subnetworks()
            if reduce is not None:
                self._reduce(reduce)
            scouted = self._examples.nonzero().flatten().tolist()
            changed = [self.languages[row] for row in scouted if self._update_language(step, row)]
            for tensor in self._scouted().values():
                tensor.zero_()
        return changed

    def _update_language(self, step: int, row: int) -> bool:
        subnets = self._subnetworks()
        new = {}
        for kind, masks in _masks_of(subnets).items():
            keep = masks[row].cpu()
            seen = {what: sums[kind][row] for what, sums in self._sums.items()}
            after = self._swap.update(kind, row, keep, seen)
            if not torch.equal(after, keep):
                new[kind] = after
        if not new:
            return False
        set_subnetwork(self.model, self.languages[row], **new)
        self.history.add(step, row, self._subnetworks())
        return True

    def _reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        parts = list(self._scouted().values())
        total = reduce(torch.cat([part.flatten() for part in parts]))
        for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def _subnetworks(self) -> Subnetworks:
        """The masks on the model, which are the only ones there are."""
        subnets = attached(self.model).subnets
        if subnets.languages != self.languages:
            raise ValueError(f"the model now has subnetworks of {subnets.languages}, these are of {self.languages}")
        return subnets

    @contextmanager
    def _timed(self) -> Iterator[None]:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the training step that is still running would count
        start = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds += time.perf_counter() - start

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the masks included.

        Returns:
            "header": what JSON can hold; "tensors": {name: tensor}, a flat dict that safetensors can hold.
        """
        header = {
            "version": VERSION,
            "strategy": self.strategy,
            "languages": list(self.languages),
            "seconds": self.seconds,
        }
        return {"header": header, "tensors": {name: tensor.clone() for name, tensor in self._tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the masks of the attached model become those of the state.

        Raises:
            ValueError: a state of another strategy, other languages, another model, or another version. Nothing is
                changed then.
        """
        header, tensors = state["header"], state["tensors"]
        if header["version"] != VERSION:
            raise ValueError(
                f"this state has version {header['version']}, this fastmask reads version {VERSION}, "
                "whose masks move by another rule: finish the run with the fastmask that began it, or begin it anew"
            )
        for what, expected in (("strategy", self.strategy), ("languages", list(self.languages))):
            if header[what] != expected:
                raise ValueError(f"this state is of {what} {header[what]!r}, expected {expected!r}")
        own_tensors = self._tensors()
        if tensors.keys() != own_tensors.keys():
            different = sorted(tensors.keys() ^ own_tensors.keys())
            raise ValueError(f"this state does not fit: one side only has {', '.join(different)}")
        for name, own in own_tensors.items():
            given, rows = tensors[name], name.startswith("history.")  # a history may have any length
            if given.dtype != own.dtype or given.shape[rows:] != own.shape[rows:]:
                raise ValueError(
                    f"{name} of this state is {given.dtype} {tuple(given.shape)}, "
                    f"expected {own.dtype} {tuple(own.shape)}"
                )
        history = {name.removeprefix("history."): t for name, t in tensors.items() if name.startswith("history.")}
        self.history.check(history)
        masks = {name.removeprefix("masks."): t for name, t in tensors.items() if name.startswith("masks.")}
        _check_masks(self.languages, masks)
        for row, language in enumerate(self.languages):
            set_subnetwork(self.model, language, **{kind: keep[row] for kind, keep in masks.items()})
        for name, own in own_tensors.items():
            if not name.startswith(("history.", "masks.")):
                own.copy_(tensors[name])
        self.history.load(history)
        self.seconds = header["seconds"]

    def _scouted(self) -> dict[str, Tensor]:
        """What scouts have seen since the last update, by name: the tensors themselves."""
        sums = {f"{what}.{kind}": tensor for what, kinds in self._sums.items() for kind, tensor in kinds.items()}
        return {"examples": self._examples, **sums}

    def _tensors(self) -> dict[str, Tensor]:
        """All state by name; those of the swaps and the sums are the tensors themselves, not copies."""
        return {
            **{f"scouted.{name}": tensor for name, tensor in self._scouted().items()},
            **{f"swap.{name}": tensor for name, tensor in self._swap.state.items()},
            **{f"masks.{kind}": keep.cpu() for kind, keep in _masks_of(self._subnetworks()).items()},
            **{f"history.{name}": tensor for name, tensor in self.history.tensors().items()},
        }

    def __repr__(self) -> str:
        return f"DynamicSubnetworks({self.strategy}, {', '.join(self.languages)}: every {self.every} steps)"


def _masks_of(subnets: Subnetworks) -> dict[str, Tensor]:
    return {kind: keep for kind in ("heads", "neurons") if (keep := getattr(subnets, kind)) is not None}


def _check_options(every: int, until: int | None, swaps: float, margin: float, decay: float) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of steps, at least 1, given {every!r}")
    if until is not None and (not isinstance(until, int) or until < 0):
        raise ValueError(f"until must be a step or None, given {until!r}")
    if not 0 < swaps < float("inf") or (swaps >= 1 and swaps != int(swaps)):
        raise ValueError(f"swaps must be a whole number from 1 on, or a share between 0 and 1, given {swaps!r}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, given {margin!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1, given {decay!r}")


def _check_masks(languages: tuple[str, ...], masks: Mapping[str, Tensor]) -> None:
    if not masks:
        raise ValueError("dynamic subnetworks need masks over heads or neurons; these are over weights only")
    for kind, keep in masks.items():
        dead = (~keep.any(-1)).nonzero().tolist()
        if dead:
            language, layer = dead[0]
            raise ValueError(f"{languages[language]!r} has no live {kind} in layer {layer}: it needs at least one")
    if all(bool(keep.all()) for keep in masks.values()):
        raise ValueError(f"every language owns all {' and '.join(masks)}: as sizes are kept, nothing could change")
