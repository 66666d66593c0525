"""Dynamic subnetworks: masks that are updated jointly with the model, as in sparse evolutionary training.

At every update, each language gives up the live units that matter least to it for dead units of the same layers, drawn
at random: Mocanu et al. 2018 (https://arxiv.org/abs/1707.04780), with the importance scores of static discovery in
place of weight magnitudes. Choosing dead units by the gradients of their gates, at the price of computing all units,
was no better (docs/results/1-transfer.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastmask.discovery.gates import probes_of
from fastmask.discovery.scores import Importance
from fastmask.files import FileError, StrPath, read_metadata
from fastmask.models.attach import attached, owner_of
from fastmask.models.editing import set_subnetwork, set_subnetworks
from fastmask.subnetworks.subnetworks import Subnetworks

_MARK = {"history": "1"}  # in the header of a file


@dataclass(frozen=True)
class Snapshot:
    """The mask of one language from one step on: `masks` are of this language alone, over heads, neurons or both."""

    step: int
    language: str
    masks: Subnetworks


class History(list[Snapshot]):
    """Every mask that a language had, in the order of their steps; it begins with those of all languages at step 0."""

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        super().__init__(snapshots)
        self.languages = tuple(dict.fromkeys(snapshot.language for snapshot in self))

    def at(self, step: int) -> Subnetworks:
        """The masks of all languages as they were after `step` steps."""
        then = {snapshot.language: snapshot.masks for snapshot in self if snapshot.step <= max(step, 0)}
        return Subnetworks.stack(then[name] for name in self.languages)

    def save(self, path: StrPath) -> None:
        """Write the masks as one file of subnetworks, whose languages are called LANGUAGE@STEP; see `Subnetworks.save`.

        Of several that a language had from one step on, the last is kept.
        """
        named = {f"{of.language}@{of.step}": of for of in self}
        Subnetworks.stack(of.masks.rename({of.language: name}) for name, of in named.items()).save(path, _MARK)

    @classmethod
    def load(cls, path: StrPath) -> History:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FileError: a ValueError; the file is damaged, or no such history.
        """
        if not _MARK.items() <= read_metadata(path).items():
            raise FileError(path, f"is no history of masks (expected {_MARK} in its header)")
        masks, snapshots = Subnetworks.load(path), []
        for name in masks.languages:
            language, _, step = name.rpartition("@")
            if not (language and re.fullmatch("[0-9]{1,18}", step)):
                raise FileError(path, f"is no history of masks: {name!r} (expected LANGUAGE@STEP)")
            snapshots.append(Snapshot(int(step), language, masks.select([name]).rename({name: language})))
        history, steps = cls(snapshots), [of.step for of in snapshots]
        first = snapshots[: len(history.languages)]
        if tuple(of.language for of in first) != history.languages or any(of.step for of in first):
            raise FileError(path, f"expected the masks of {', '.join(history.languages)} from step 0 on")
        if steps != sorted(steps):
            raise FileError(path, "expected masks in the order of their steps")
        return history


class DynamicSubnetworks:
    """Subnetworks that are updated jointly with the model they are attached to.

    A training loop scores the live units of each language every `every` steps, and then updates::

        dynamic = fm.DynamicSubnetworks(model, until=steps * 3 // 4)
        for step in range(1, steps + 1):
            ...                                          # an ordinary training step
            if dynamic.due(step):
                scores = {name: fm.importance(model, [small_batch_of(name)], loss, name) for name in languages}
                dynamic.update(step, scores)

    Every layer of every language keeps as many live heads and neurons as it has. Parameters are never touched, so
    optimizers need not know. No random state is read or changed.

    Args:
        model: a Hugging Face model with subnetworks over heads, neurons or both attached.
        every: steps between updates.
        until: the last step after which masks are updated; None: no end. Leave some steps at the end in which the
            weights are trained with the masks that stay: what comes in has not been trained for its language before.
        swaps: heads, and neurons, that a language swaps in one update: a whole number from 1 on, or a share of its live
            units below 1 (then at least one). Layers without dead units swap nothing.
        seed: of the units that come in; they also depend on the step and the language's place.

    Attributes:
        languages: names, in the order of the attached subnetworks.
        history: every mask that a language had, a sequence of `Snapshot(step, language, masks)` that starts
            with the masks at hand as of step 0; `history.at(step)` are the `Subnetworks` of all languages then.

    Raises:
        ValueError: an option out of range, nothing attached, masks over weights only, masks that leave a layer without
            a live unit, or none in which anything could change; subnetworks attached with `forward="full"`.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, until: int | None = None, swaps: float = 0.05, seed: int = 0
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, at least 1, given {every!r}")
        if until is not None and (not isinstance(until, int) or until < 0):
            raise ValueError(f"until must be a step or None, given {until!r}")
        if not 0 < swaps < float("inf") or (swaps >= 1 and swaps != int(swaps)):
            raise ValueError(f"swaps must be a whole number from 1 on, or a share between 0 and 1, given {swaps!r}")
        probes = probes_of(model)  # sees that there are units to score
        subnets = attached(model).subnets
        masks = subnets.units
        _check_masks(subnets.languages, masks)
        self.model = owner_of(model)
        self.every, self.until, self.swaps, self.seed = every, until, swaps, seed
        self.languages = subnets.languages
        self.history = History(_snapshot(subnets, 0, language) for language in subnets.languages)
        # Layers may have different numbers of units; masks are as wide as the widest.
        self._units = {kind: torch.zeros(of.shape[1:], dtype=torch.bool, device="cpu") for kind, of in masks.items()}
        for probe in probes:
            self._units[probe.kind][probe.layer, : probe.units] = True

    def due(self, step: int) -> bool:
        """Whether masks are updated after step number `step`, counted from 1."""
        return step > 0 and step % self.every == 0 and (self.until is None or step <= self.until)

    def update(self, step: int, scores: Mapping[str, Importance]) -> list[str]:
        """Give new masks to languages, if an update is due.

        Args:
            step: the number of training steps done.
            scores: of `fm.importance`, by language; others keep their masks. With several processes, all give the same.

        Returns:
            The languages whose masks changed. Of the attached model, only the masks of these are replaced.

        Raises:
            KeyError: an unknown language.
            ValueError: `step` lies before that of the last change.
            FloatingPointError: a score is not finite; nothing is changed.
        """
        if not self.due(step):
            return []
        if step < self.history[-1].step:
            raise ValueError(f"update(step={step}): masks were last changed after step {self.history[-1].step}")
        subnets = self._subnetworks()
        new = {subnets.index(name): self._swapped(step, name, of_units) for name, of_units in scores.items()}
        changed = [(self.languages[row], masks) for row, masks in sorted(new.items()) if masks]
        for language, masks in changed:
            set_subnetwork(self.model, language, **masks)
            self.history.append(_snapshot(self._subnetworks(), step, language))
        return [language for language, _ in changed]

    def _swapped(self, step: int, language: str, scores: Importance) -> dict[str, Tensor]:
        """The masks of one language that change, by kind of unit."""
        subnets, new = self._subnetworks(), {}
        row = subnets.index(language)
        for number, (kind, masks) in enumerate(subnets.units.items()):
            keep, worth = masks[row].cpu(), scores[kind].cpu()
            if not worth.isfinite().all():
                raise FloatingPointError(f"the scores of {language!r} are not finite")
            count = int(self.swaps) if self.swaps >= 1 else max(1, int(self.swaps * int(keep.sum())))
            generator = np.random.default_rng([self.seed, step, row, number])
            after = swapped(keep, self._units[kind] & ~keep, worth, count, generator)
            if not torch.equal(after, keep):
                new[kind] = after
        return new

    def _subnetworks(self) -> Subnetworks:
        """The masks on the model, which are the only ones there are."""
        subnets = attached(self.model).subnets
        if subnets.languages != self.languages:
            raise ValueError(f"the model now has subnetworks of {subnets.languages}, these are of {self.languages}")
        return subnets

    def save(self, path: StrPath) -> None:
        """Write everything that a resumed run needs, the masks included; see `History.save`."""
        self.history.save(path)

    def load(self, path: StrPath) -> None:
        """Go on from what `save` wrote; the masks of the attached model become those of the file.

        Raises:
            FileNotFoundError: no such file.
            FileError: a ValueError; the file is damaged, or of other languages or another model. Nothing is changed
                then.
        """
        history = History.load(path)
        if history.languages != self.languages:
            raise FileError(path, f"is of languages {list(history.languages)}, expected {list(self.languages)}")
        units, weights = history.at(history[-1].step).units, self._subnetworks().weights
        try:
            _check_masks(self.languages, units)
            set_subnetworks(self.model, Subnetworks(self.languages, weights=weights, **units))
        except ValueError as error:
            raise FileError(path, str(error)) from None
        self.history = history

    def __repr__(self) -> str:
        return f"DynamicSubnetworks({', '.join(self.languages)}: every {self.every} steps)"


def swapped(keep: Tensor, dead: Tensor, scores: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """A new mask, in which the `count` least important live units gave their places to drawn dead ones of their layers.

    `keep` and `dead` are bool [layers, units]: what is live, and what may come in. Fewer leave where a layer has fewer
    dead units.
    """
    new, units = keep.clone(), keep.shape[1]
    swappable = keep & dead.any(1, keepdim=True)
    weakest = scores.masked_fill(~swappable, float("inf")).flatten().argsort(stable=True)
    weakest = weakest[: min(count, int(swappable.sum()))]
    for layer in (weakest // units).unique().tolist():
        entering = generator.permutation(dead[layer].nonzero().flatten().numpy())
        leaving = weakest[weakest // units == layer][: len(entering)] % units
        new[layer, leaving] = False
        new[layer, torch.from_numpy(entering[: len(leaving)])] = True
    return new


def _snapshot(subnets: Subnetworks, step: int, language: str) -> Snapshot:
    row = subnets.index(language)
    own = {kind: keep[row : row + 1].cpu().clone() for kind, keep in subnets.units.items()}
    return Snapshot(step, language, Subnetworks.of([language], own))


def _check_masks(languages: Sequence[str], masks: Mapping[str, Tensor]) -> None:
    if not masks:
        raise ValueError("dynamic subnetworks need masks over heads or neurons; these are over weights only")
    for kind, keep in masks.items():
        dead = (~keep.any(-1)).nonzero().tolist()
        if dead:
            language, layer = dead[0]
            raise ValueError(f"{languages[language]!r} has no live {kind} in layer {layer}: it needs at least one")
    if all(bool(keep.all()) for keep in masks.values()):
        raise ValueError(f"every language owns all {' and '.join(masks)}: as sizes are kept, nothing could change")
