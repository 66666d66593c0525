"""`Delta`: what a language has learned, as a sparse change of the model that training began with.

A delta holds one `Change` per language, and a change one `Part` per parameter. Changes are put on a model one after the
other. What each was put on is kept beside the model: to take one off, that is put back and what came later is put on
anew, so no rounding is left behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Annotated
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from fastmask.files import FileError, parse_json, read_metadata, read_sealed, write_sealed
from fastmask.live import WHOLE, Live, live_in, masked_parameters
from fastmask.models.attach import attached, owner_of
from fastmask.models.experts import AttachedExperts
from fastmask.records import Record

__all__ = ["Change", "Delta", "Part"]

FORMAT, VERSION = "fastmask.delta", "1"
CONTENT = "content"
_TENSORS = ("live", "difference", "places", "values")  # of a part in a file


@dataclass(frozen=True, eq=False)
class Part:
    """The change of the live part of a parameter, n numbers.

    Attributes:
        live: what may have changed.
        shape: of the parameter.
        base: digest of the live part before.
        difference: [n] in the parameter's dtype; after - before, where before + difference is after to the last bit.
        places, values: int64 [m], and [m] in the parameter's dtype: where it is not (numbers that lost most of their
            size), `difference` is -before there, and `values`, which are after, are added to the sum.
    """

    live: Live
    shape: tuple[int, ...]
    base: str
    difference: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def between(cls, before: Tensor, after: Tensor, live: Live) -> Part:
        """The change of a parameter; raises ValueError if it holds NaN or infinity."""
        old, new = (live.read(tensor.detach()).flatten().cpu() for tensor in (before, after))
        if not (bool(old.isfinite().all()) and bool(new.isfinite().all())):
            raise ValueError("it holds NaN or infinity, from which nothing can be subtracted")
        difference = new - old
        places = (old + difference != new).nonzero().flatten()
        difference[places] = -old[places]
        return cls(live, tuple(after.shape), _digest_of(old), difference, places, new[places])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a file holds of it; what lives is uint8, and empty where everything does."""
        code = torch.empty(0, dtype=torch.uint8, device="cpu") if self.live is WHOLE else self.live.encoded()
        return code, self.difference, self.places, self.values

    def read(self, parameter: Tensor) -> Tensor:
        """The live part of a parameter, flattened [n]."""
        return self._on(parameter.device).read(parameter.detach()).flatten()

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Put back what `read` returned."""
        live = self._on(parameter.device)
        live.write(parameter.detach(), values.view(live.read(parameter.detach()).shape))

    def added_to(self, values: Tensor) -> Tensor:
        """What `read` returned, changed."""
        sums = values + self.difference.to(values.device)
        return sums.index_add_(0, self.places.to(values.device), self.values.to(values.device))

    def _on(self, device: torch.device) -> Live:
        live = self.live
        return live if live.words.device == device else Live(live.kind, live.shape, live.cell, live.words.to(device))


@dataclass(frozen=True, eq=False)
class Change:
    """What one language has changed, by the name of the parameter."""

    language: str
    parts: dict[str, Part]

    @cached_property
    def digest(self) -> str:
        """Identifies its content: two changes of one digest are the same, wherever they come from."""
        described = {}
        for name, part in sorted(self.parts.items()):
            code, *numbers = part.tensors
            described[name] = [part.base, part.shape, *map(_digest_of, (*numbers, code))]
        return hashlib.sha256(json.dumps([self.language, described]).encode()).hexdigest()


class _StoredPart(Record):
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=2)]
    base: str


class _StoredChange(Record):
    language: str
    parts: Annotated[dict[str, _StoredPart], Field(min_length=1)]


class _Content(Record):
    """What the header of a file says of its tensors, four for each parameter of each change."""

    changes: Annotated[list[_StoredChange], Field(min_length=1)]


class Delta:
    """What a language has learned: the live part of each parameter with a mask, and how it differs from the base.

        base = copy.deepcopy(model.state_dict())
        fm.freeze_unmasked(fm.attach(model, subnets, forward="full"))
        ...                                              # train
        fm.Delta.of(model, base, "de").save("de.safetensors")
        ...
        delta = fm.Delta.load("de.safetensors") + fm.Delta.load("ner.safetensors")
        delta.add(plain)                                 # the base model, attached or not
        delta.remove(plain)

    On the base alone the sum is what training left there, to the last bit (a zero loses its sign), and what is removed
    leaves nothing behind. Where two deltas meet, their differences are added in order, each rounded. Adding up
    language and task deltas is from Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer".

    Attributes:
        changes: one for each language; several after `+`.
    """

    def __init__(self, changes: Iterable[Change]) -> None:
        self.changes = tuple(changes)
        digests = [change.digest for change in self.changes]
        for number, change in enumerate(self.changes):
            if change.digest in digests[:number]:
                raise ValueError(f"the delta of {change.language!r} is given twice (expected each change once)")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        base: nn.Module | Mapping[str, Tensor],
        language: str,
        *,
        beside: Iterable[str] = (),
        ignore: str | Iterable[str] = (),
    ) -> Delta:
        """The change of one language.

        Args:
            model: trained, with subnetworks attached.
            base: what training began with, a state dict or a model of the same parameters.
            language: one of the attached subnetworks'.
            beside: languages that were trained together with it: what they own may have changed, too. What they share
                with `language` is in its delta, and in theirs.
            ignore: beginnings of names that are not looked at, or one: a head that was trained for the task, say.

        Raises:
            KeyError: not a language of the attached subnetworks.
            ValueError: nothing attached; parameters of other names, shapes or dtypes; something has changed that the
                language does not own, or experts have; NaN or infinity.
        """
        subnets, owner, skipped = (
            attached(model).subnets,
            owner_of(model),
            ignore if isinstance(ignore, str) else tuple(ignore),
        )
        if isinstance(beside, str):
            raise ValueError(f"expected beside as a sequence of language names, given the single name {beside!r}")
        own, others = subnets.index(language), [subnets.index(name) for name in beside]
        before = base if isinstance(base, Mapping) else _parameters(owner_of(base))
        compared = {name: p for name, p in _parameters(owner).items() if not name.startswith(skipped)}
        for name, new in compared.items():
            old = before.get(name)
            if old is None:
                problem = f"it is of another model (ignore={name!r} leaves it out)"
                raise ValueError(f"the base has no parameter {name!r}: {problem}")
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(
                    f"{name!r} is {old.dtype} {tuple(old.shape)} in the base, and {new.dtype} {tuple(new.shape)} in "
                    "the model: expected the model that training began with"
                )
        masked, parts = masked_parameters(owner), {}
        experts = {p for module in owner.modules() if isinstance(module, AttachedExperts) for p in module.parameters()}
        for name, parameter in compared.items():
            old, new = before[name].detach().to(parameter.device), parameter.detach()
            if parameter in experts and not torch.equal(old, new):
                raise ValueError(f"{name!r} has changed, and holds experts, of which no delta can be taken")
            layer = masked.get(parameter)
            if layer is None:
                _check_unchanged(name, old != new, language, "has no mask")
                continue
            together = live_in(layer, parameter, [own, *others])
            if together.kind != "whole":
                outside = (old != new) & ~together.keep(new)
                _check_unchanged(name, outside, language, f"is not of {language!r} alone")
            live = live_in(layer, parameter, [own])
            if live.share:
                try:
                    parts[name] = Part.between(old, new, live)
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
        return sum(
            tensor.nbytes for part in parts for tensor in (part.live.words, part.difference, part.places, part.values)
        )

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Change a model, attached or plain, in place.

        Raises:
            ValueError: a model of other parameters, or of other values than training began with; a delta that was added
                already; parameters that have changed since an earlier one was added. The model is then as it was.
        """
        model = owner_of(model)
        layers = _layers.setdefault(model, [])
        _forget_if_reloaded(layers, model)
        for change in self.changes:
            _parameters_of(change, model)
            if any(other.digest == change.digest for other, _ in layers):
                raise ValueError(f"the delta of {change.language!r} was added to this {type(model).__name__} already")
        with _without(layers, model):
            parameters = _parameters(model)
            for change in self.changes:
                for name, part in change.parts.items():
                    if _digest_of(part.read(parameters[name])) != part.base:
                        raise ValueError(
                            f"{name!r} is not what it was when the delta of {change.language!r} was taken: expected "
                            "the model that training began with, given another one (or one that was trained since)"
                        )
        layers += [(change, _put_on(model, change)) for change in self.changes]

    @torch.no_grad()
    def remove(self, model: nn.Module) -> None:
        """Take away what was added to this very model object; what was added since stays.

        Raises:
            ValueError: it was never added; parameters have changed since. The model is then as it was.
        """
        model = owner_of(model)
        layers, gone = _layers.get(model, []), {change.digest for change in self.changes}
        _forget_if_reloaded(layers, model)
        for change in self.changes:
            if all(other.digest != change.digest for other, _ in layers):
                names = ", ".join(repr(other.language) for other, _ in layers) or "none"
                raise ValueError(
                    f"the delta of {change.language!r} was never added to this {type(model).__name__} (added: {names})"
                )
        with _without(layers, model):
            layers[:] = [layer for layer in layers if layer[0].digest not in gone]

    def __add__(self, other: Delta) -> Delta:
        """Both, one after the other.

        Raises:
            ValueError: one change is in both, or they are of parameters of other shapes or dtypes.
        """
        if not isinstance(other, Delta):
            return NotImplemented
        for mine in self.changes:
            for theirs in other.changes:
                if mine.digest == theirs.digest:
                    raise ValueError(f"the delta of {mine.language!r} is in both")
                for name in mine.parts.keys() & theirs.parts.keys():
                    a, b = (f"{c.parts[name].difference.dtype} {c.parts[name].shape}" for c in (mine, theirs))
                    if a != b:
                        raise ValueError(
                            f"cannot add deltas of two models: {name!r} is {a} in that of {mine.language!r}, and {b} "
                            f"in that of {theirs.language!r}"
                        )
        return Delta([*self.changes, *other.changes])

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with a checksum; see `fastmask.files.replace_file`.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        tensors: dict[str, Tensor] = {}
        changes = []
        for number, change in enumerate(self.changes):
            for name, part in change.parts.items():
                for kind, tensor in zip(_TENSORS, part.tensors, strict=True):
                    tensors[f"{number}.{name}.{kind}"] = tensor
            parts = {name: _StoredPart(shape=part.shape, base=part.base) for name, part in change.parts.items()}
            changes.append(_StoredChange(language=change.language, parts=parts))
        content = _Content(changes=changes).model_dump_json()
        write_sealed(path, tensors, {"format": FORMAT, "version": VERSION, CONTENT: content})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Delta:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FileError: a ValueError; the file is damaged (one bit is enough), of another kind or of another version.
        """
        header = read_metadata(path)
        if header.get("format") != FORMAT:
            raise FileError(path, "is a safetensors file, but not one of a fastmask delta")
        if header.get("version") != VERSION:
            raise FileError(path, f"has format version {header.get('version')} (expected {VERSION})")
        tensors, header = read_sealed(path)
        content: _Content = parse_json(path, header.get(CONTENT, ""), _Content)
        changes = []
        for number, change in enumerate(content.changes):
            parts = {}
            for name, stored in change.parts.items():
                try:
                    code, *numbers = (tensors[f"{number}.{name}.{kind}"] for kind in _TENSORS)
                    live = WHOLE if code.shape == (0,) else Live.decoded(code, stored.shape)
                except KeyError as error:
                    raise FileError(path, f"is damaged: it has no tensor {error}") from None
                except ValueError as error:
                    raise FileError(path, f"is damaged: {name}: {error}") from None
                parts[name] = Part(live, stored.shape, stored.base, *numbers)
            changes.append(Change(change.language, parts))
        return cls(changes)

    def __repr__(self) -> str:
        described = [
            f"{change.language}: {sum(len(part.difference) for part in change.parts.values()):,} of "
            f"{sum(torch.Size(part.shape).numel() for part in change.parts.values()):,} weights"
            for change in self.changes
        ]
        return f"Delta({' + '.join(described)})"


# ---- changes on a model

# Each change, and the live part of each parameter before it. Beside the models, not on them: copies and pickles are
# models of their own, with nothing to take off.
_Layers = list[tuple[Change, dict[str, Tensor]]]
_layers: WeakKeyDictionary[nn.Module, _Layers] = WeakKeyDictionary()


def _put_on(model: nn.Module, change: Change) -> dict[str, Tensor]:
    """Change a model; what there was before."""
    parameters, before = _parameters(model), {}
    for name, part in change.parts.items():
        before[name] = part.read(parameters[name])
        part.write(parameters[name], part.added_to(before[name]))
    return before


def _take_off(model: nn.Module, change: Change, before: dict[str, Tensor]) -> None:
    parameters = _parameters_of(change, model)
    before = {name: values.to(parameters[name].device) for name, values in before.items()}
    for name, part in change.parts.items():
        if not torch.equal(part.read(parameters[name]), part.added_to(before[name])):
            raise ValueError(
                f"{name!r} has changed since the delta of {change.language!r} was added, which would be lost: take a "
                "new delta of it, or load the parameters that the delta left there"
            )
    for name, part in change.parts.items():
        part.write(parameters[name], before[name])


def _forget_if_reloaded(layers: _Layers, model: nn.Module) -> None:
    """Forget what was added to a model whose parameters are again what they were before the first change."""
    if not layers:
        return
    parameters = _parameters(model)
    parts = [(name, part) for change, _ in layers for name, part in change.parts.items() if name in parameters]
    alike = (part.shape == tuple(parameters[name].shape) for name, part in parts)
    if parts and all(alike) and all(_digest_of(part.read(parameters[name])) == part.base for name, part in parts):
        layers.clear()


@contextmanager
def _without(layers: _Layers, model: nn.Module) -> Iterator[None]:
    """The model without its changes inside; those that are still in `layers` at the end are put on again.

    Raises:
        ValueError: somebody else has changed what they had left there. The model is as it was.
    """
    off: list[Change] = []
    try:
        for change, before in reversed(layers):
            _take_off(model, change, before)
            off.append(change)
        yield
    finally:
        layers[:] = [(change, _put_on(model, change) if change in off else before) for change, before in layers]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _parameters_of(change: Change, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that a change fits."""
    parameters = _parameters(model)
    for name, part in change.parts.items():
        found = parameters.get(name)
        if found is None:
            raise ValueError(f"this {type(model).__name__} has no parameter {name!r}: the delta is of another model")
        if type(found) not in (Tensor, nn.Parameter) or found.is_meta:
            raise ValueError(f"expected {name!r} as a whole tensor with values, given a {type(found).__name__}")
        if tuple(found.shape) != part.shape or found.dtype != part.difference.dtype:
            raise ValueError(
                f"{name!r} is {found.dtype} {tuple(found.shape)} here, and {part.difference.dtype} {part.shape} in the "
                "delta: it is of another model"
            )
    return parameters


def _check_unchanged(name: str, moved: Tensor, language: str, what: str) -> None:
    if bool(moved.any()):
        raise ValueError(
            f"{int(moved.sum())} weights of {name!r} have changed outside of what {language!r} owns: this parameter "
            f"{what}. A delta would lose that: freeze what no mask touches (fastmask.freeze_unmasked), train with "
            "fastmask.LiveAdamW, name the languages that were trained together (beside=...), or ignore=... a head"
        )


def _digest_of(values: Tensor) -> str:
    """The SHA-256 of numbers, of their dtype and how many they are."""
    plain = values.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {plain.numel()} ".encode())
    digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
