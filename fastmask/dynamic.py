"""Dynamic subnetworks: masks that are updated jointly with the model, as in sparse evolutionary training.

At every update, each language gives up the live units that matter least to it for dead units of the same layers, drawn
at random: Mocanu et al. 2018 (https://arxiv.org/abs/1707.04780), with the importance scores of static discovery in
place of weight magnitudes. Choosing dead units by the gradients of their gates, at the price of computing all units,
was no better (docs/results/1-transfer.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmask.discovery.gates import probes_of
from fastmask.discovery.scores import Importance
from fastmask.models.attach import attached, owner_of
from fastmask.models.editing import set_subnetwork
from fastmask.subnetworks.subnetworks import Subnetworks

__all__ = ["DynamicSubnetworks", "History", "Snapshot"]

KINDS = ("heads", "neurons")
VERSION = 3  # of the state; earlier ones held averages of gate gradients


@dataclass(frozen=True)
class Snapshot:
    """The mask of one language from one step on; None for a kind of unit that is not masked."""

    step: int
    language: str
    heads: Tensor | None = None  # bool [layers, heads]
    neurons: Tensor | None = None  # bool [layers, ffn]


class History(Sequence[Snapshot]):
    """Every mask that a language had, in the order of their steps; it begins with those of all languages at step 0."""

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        self._snapshots = list(snapshots)
        self.languages = tuple(dict.fromkeys(snapshot.language for snapshot in self._snapshots))

    def __len__(self) -> int:
        return len(self._snapshots)

    def __getitem__(self, at: Any) -> Any:
        return self._snapshots[at]

    def append(self, snapshot: Snapshot) -> None:
        """Remember the mask that a language has from now on."""
        self._snapshots.append(snapshot)

    def at(self, step: int) -> Subnetworks:
        """The masks of all languages as they were after `step` steps."""
        then = {snapshot.language: snapshot for snapshot in self if snapshot.step <= max(step, 0)}
        masks = {
            kind: torch.stack([getattr(then[name], kind) for name in self.languages]) for kind in _masks_of(self[0])
        }
        return Subnetworks(self.languages, masks.get("heads"), masks.get("neurons"))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A header that JSON can hold, and tensors: `when` int64 [n, 2] (step, language), masks of 8 units a byte."""
        rows = [(snapshot.step, self.languages.index(snapshot.language)) for snapshot in self]
        masks = {kind: torch.stack([getattr(snapshot, kind) for snapshot in self]) for kind in _masks_of(self[0])}
        packed = {kind: torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=-1)) for kind, keep in masks.items()}
        units = {kind: keep.shape[-1] for kind, keep in masks.items()}
        return {"languages": list(self.languages), "units": units}, {"when": torch.tensor(rows, device="cpu"), **packed}

    @classmethod
    def of_state(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> History:
        """The history that `state` described.

        Raises:
            KeyError, ValueError: it is not one.
        """
        languages, packed = header["languages"], {kind: tensors[kind] for kind in header["units"]}
        steps, rows = tensors["when"].long().unbind(1)
        if (
            any(flags.dtype != torch.uint8 or flags.shape[:1] != steps.shape for flags in packed.values())
            or rows[: len(languages)].tolist() != list(range(len(languages)))
            or steps[: len(languages)].any()
            or (steps.diff() < 0).any()
            or rows.max() >= len(languages)
        ):
            raise ValueError(f"expected the masks of {', '.join(languages)} from step 0 on")
        masks = {
            kind: torch.from_numpy(np.unpackbits(flags.numpy(), axis=-1, count=header["units"][kind])).bool()
            for kind, flags in packed.items()
        }
        return cls(
            Snapshot(int(step), languages[row], **{kind: keep[at] for kind, keep in masks.items()})
            for at, (step, row) in enumerate(zip(steps, rows, strict=True))
        )


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
        history: every mask that a language had, a sequence of `Snapshot(step, language, heads, neurons)` that starts
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
        masks = _masks_of(subnets)
        _check_masks(subnets.languages, masks)
        self.model = owner_of(model)
        self.every, self.until, self.swaps, self.seed = every, until, swaps, seed
        self.history = History(_snapshot(subnets, 0, language) for language in subnets.languages)
        # Layers may have different numbers of units; masks are as wide as the widest.
        self._units = {
            kind: torch.zeros(keep.shape[1:], dtype=torch.bool, device="cpu") for kind, keep in masks.items()
        }
        for probe in probes:
            self._units[probe.kind][probe.layer, : probe.units] = True

    @property
    def languages(self) -> tuple[str, ...]:
        return self.history.languages

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
        new = {
            subnets.index(language): self._swapped(step, language, of_units) for language, of_units in scores.items()
        }
        changed = [(self.languages[row], masks) for row, masks in sorted(new.items()) if masks]
        for language, masks in changed:
            set_subnetwork(self.model, language, **masks)
            self.history.append(_snapshot(self._subnetworks(), step, language))
        return [language for language, _ in changed]

    def _swapped(self, step: int, language: str, scores: Importance) -> dict[str, Tensor]:
        """The masks of one language that change, by kind of unit."""
        subnets, new = self._subnetworks(), {}
        row = subnets.index(language)
        for number, (kind, masks) in enumerate(_masks_of(subnets).items()):
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the masks included.

        Returns:
            "header": what JSON can hold; "tensors": {name: tensor}, a flat dict that safetensors can hold.
        """
        header, tensors = self.history.state()
        return {"header": {"version": VERSION, **header}, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the masks of the attached model become those of the state.

        Raises:
            ValueError: a state of other languages, another model, or another version. Nothing is changed then.
        """
        header = state["header"]
        if header["version"] != VERSION:
            raise ValueError(
                f"this state has version {header['version']}, this fastmask reads version {VERSION}, "
                "whose masks move by another rule: finish the run with the fastmask that began it, or begin it anew"
            )
        if header["languages"] != list(self.languages):
            raise ValueError(f"this state is of languages {header['languages']}, expected {list(self.languages)}")
        history = History.of_state(header, state["tensors"])
        given, own = (_masks_of(subnets) for subnets in (history.at(history[-1].step), self._subnetworks()))
        shapes = [{kind: tuple(keep.shape[1:]) for kind, keep in masks.items()} for masks in (given, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"this state has masks of shape {shapes[0]}, expected {shapes[1]}")
        _check_masks(self.languages, given)
        for row, language in enumerate(self.languages):
            set_subnetwork(self.model, language, **{kind: keep[row] for kind, keep in given.items()})
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


def _masks_of(masks: Subnetworks | Snapshot) -> dict[str, Tensor]:
    return {kind: keep for kind in KINDS if (keep := getattr(masks, kind)) is not None}


def _snapshot(subnets: Subnetworks, step: int, language: str) -> Snapshot:
    row = subnets.index(language)
    return Snapshot(step, language, **{kind: keep[row].cpu().clone() for kind, keep in _masks_of(subnets).items()})


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
