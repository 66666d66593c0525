"""`Delta`: the change of one language, or several changes one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import torch
from torch import Tensor, nn

from fastmask.deltas import adding
from fastmask.deltas.part import Part, digest_of
from fastmask.live import Live, live_in, masked_parameters
from fastmask.models.attach import attached, owner_of
from fastmask.models.expert_layer import AttachedExperts

__all__ = ["Change", "Delta"]


@dataclass(frozen=True, eq=False)
class Change:
    """What one language has changed, by the name of the parameter."""

    language: str
    parts: dict[str, Part]

    @cached_property
    def digest(self) -> str:
        """A number for its content: two that are equal are one, wherever they come from."""
        described = {
            name: [part.base, part.shape, *map(digest_of, (part.difference, part.places, part.values, part.code))]
            for name, part in sorted(self.parts.items())
        }
        return hashlib.sha256(json.dumps([self.language, described]).encode()).hexdigest()


class Delta:
    """What a language has learnt: the live part of each parameter with a mask, and how it differs from the base.

        base = copy.deepcopy(model.state_dict())
        fm.freeze_unmasked(fm.attach(model, subnets, forward="full"))
        ...                                              # train
        fm.Delta.of(model, base, "de").save("de.safetensors")
        ...
        delta = fm.Delta.load("de.safetensors") + fm.Delta.load("ner.safetensors")
        delta.add(plain)                                 # the base model, attached or not
        delta.remove(plain)

    On the base alone the sum is what training left there, to the last bit (a zero loses its sign), and what is removed
    leaves nothing behind. Where two deltas meet their differences are added in the order in which they were added, each
    rounded. Language and task deltas that are added up are those of Ansell et al. 2022, "Composable Sparse Fine-Tuning
    for Cross-Lingual Transfer".

    Attributes:
        changes: one for each language; several after `+`.
    """

    def __init__(self, changes: Iterable[Change]) -> None:
        self.changes = tuple(changes)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        base: nn.Module | Mapping[str, Tensor],
        language: str,
        *,
        beside: Iterable[str] = (),
        ignore: Iterable[str] = (),
    ) -> Delta:
        """The change of one language.

        Args:
            model: trained, with subnetworks attached.
            base: what training began with, a state dict or a model of the same parameters.
            language: one of the attached subnetworks'.
            beside: languages that were trained together with it: what they own may have changed, too. What they share
                with `language` is in its delta, and in theirs.
            ignore: beginnings of names that are not looked at: a head that was trained for the task, say.

        Raises:
            KeyError: not a language of the attached subnetworks.
            ValueError: nothing attached; parameters of other names, shapes or dtypes; something has changed that the
                language does not own, or experts have; NaN or infinity.
        """
        state, owner, skipped = attached(model).subnets, owner_of(model), tuple(ignore)
        own, others = state.index(language), [state.index(name) for name in _names(beside)]
        before = base if isinstance(base, Mapping) else dict(owner_of(base).named_parameters(remove_duplicate=False))
        named = owner.named_parameters(remove_duplicate=False)
        compared = {
            name: (parameter, _base_of(before, name, parameter))
            for name, parameter in named
            if not name.startswith(skipped)
        }
        masked, parts = masked_parameters(owner), {}
        experts = {p for module in owner.modules() if isinstance(module, AttachedExperts) for p in module.parameters()}
        for name, (parameter, old) in compared.items():
            after = parameter.detach()
            layer = masked.get(parameter)
            if parameter in experts and not torch.equal(old, after):
                raise ValueError(f"{name!r} has changed, and holds experts, of which no delta can be taken")
            if layer is None:
                _check_unchanged(name, old, after, None, language)
                continue
            live = live_in(layer, parameter, [own])
            _check_unchanged(name, old, after, live_in(layer, parameter, [own, *others]), language)
            if live.share:
                try:
                    parts[name] = Part.between(old, after, live)
                except ValueError as error:
                    raise ValueError(f"{name!r} has no delta: {error}") from None
        if not parts:
            raise ValueError(f"{language!r} owns nothing of this {type(owner).__name__}: it has no delta")
        return cls([Change(language, parts)])

    @property
    def languages(self) -> tuple[str, ...]:
        """The language of each change."""
        return tuple(change.language for change in self.changes)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, flags of what lives included."""
        parts = [part for change in self.changes for part in change.parts.values()]
        tensors = [tensor for part in parts for tensor in (part.difference, part.places, part.values, part.live.words)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add(self, model: nn.Module) -> None:
        """Change a model, attached or plain, in place.

        Raises:
            ValueError: a model of other parameters, or of other values than training began with; a delta that was added
                already; parameters that have changed since an earlier one was added. The model is then as it was.
        """
        adding.add(owner_of(model), self.changes)

    def remove(self, model: nn.Module) -> None:
        """Take away what was added to this very model object; what was added since stays.

        Raises:
            ValueError: it was never added; parameters have changed since. The model is then as it was.
        """
        adding.remove(owner_of(model), self.changes)

    def __add__(self, other: Delta) -> Delta:
        """Both, one after the other.

        Raises:
            ValueError: one change is in both, or they are of parameters of other shapes or dtypes.
        """
        if not isinstance(other, Delta):
            return NotImplemented
        known = {change.digest for change in self.changes}
        for change in other.changes:
            if change.digest in known:
                raise ValueError(f"the delta of {change.language!r} is in both")
            for mine in self.changes:
                for name in mine.parts.keys() & change.parts.keys():
                    a, b = mine.parts[name], change.parts[name]
                    if (a.shape, a.dtype) != (b.shape, b.dtype):
                        raise ValueError(
                            f"cannot add deltas of two models: {name!r} is {a.dtype} {a.shape} in that of "
                            f"{mine.language!r}, and {b.dtype} {b.shape} in that of {change.language!r}"
                        )
        return Delta([*self.changes, *other.changes])

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with a checksum; see `fastmask.files.replace_file`.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        from fastmask.deltas.storage import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Delta:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FileError: a ValueError; the file is damaged (one bit is enough), of another kind or of another version.
        """
        from fastmask.deltas.storage import load

        return load(path)

    def __repr__(self) -> str:
        described = [
            f"{change.language}: {sum(len(part.difference) for part in change.parts.values()):,} of "
            f"{sum(torch.Size(part.shape).numel() for part in change.parts.values()):,} weights"
            for change in self.changes
        ]
        return f"Delta({' + '.join(described)})"


def _names(languages: Iterable[str]) -> Iterable[str]:
    if isinstance(languages, str):
        raise ValueError(f"expected beside as a sequence of language names, given the single name {languages!r}")
    return languages


def _base_of(base: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """The parameter that one was trained from, on its device."""
    old = base.get(name)
    if old is None:
        raise ValueError(f"the base has no parameter {name!r}: it is of another model (ignore={name!r} leaves it out)")
    if old.shape != parameter.shape or old.dtype != parameter.dtype:
        raise ValueError(
            f"{name!r} is {old.dtype} {tuple(old.shape)} in the base, and {parameter.dtype} {tuple(parameter.shape)} "
            "in the model: expected the model that training began with"
        )
    return old.detach().to(parameter.device)


def _check_unchanged(name: str, old: Tensor, new: Tensor, live: Live | None, language: str) -> None:
    """See that a parameter is as it was where nothing is live."""
    moved = old != new
    if live is not None:
        moved = moved & (~live.keep(new) if live.kind != "whole" else torch.zeros_like(moved))
    if bool(moved.any()):
        what = "has no mask" if live is None else f"is not of {language!r} alone"
        raise ValueError(
            f"{int(moved.sum())} weights of {name!r} have changed outside of what {language!r} owns: this parameter "
            f"{what}. A delta would lose that: freeze what no mask touches (fastmask.freeze_unmasked), train with "
            "fastmask.LiveAdamW, name the languages that were trained together (beside=...), or ignore=... a head"
        )
