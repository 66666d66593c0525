"""`Delta`: what a language has learned, as a sparse change of the model that training began with.

A delta holds one `Change` per language, and a change one `Part` per parameter: what training left of it. Changes are
put on a model one after the other. What was there before any of them is kept beside the model: to take one off, that is
put back and the others are put on anew, so no rounding is left behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from fastmask.files import FileError, StrPath, digest_of, parse_json, read_metadata, read_sealed, write_sealed
from fastmask.live import WHOLE, Live, live_in, masked_parameters
from fastmask.models.attach import attached, owner_of
from fastmask.models.experts import AttachedExperts
from fastmask.records import Record

FORMAT, VERSION = "fastmask.delta", "2"
CONTENT = "content"


@dataclass(frozen=True, eq=False)
class Part:
    """What training left of the live part of a parameter, n numbers.

    Attributes:
        live: what may have changed.
        shape: of the parameter.
        base: digest of the live part before.
        after: [n] in the parameter's dtype, finite.
    """

    live: Live
    shape: tuple[int, ...]
    base: str
    after: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it; what lives is uint8, and empty where everything does."""
        code = torch.empty(0, dtype=torch.uint8, device="cpu") if self.live is WHOLE else self.live.encoded()
        return {"live": code, "after": self.after}

    def read(self, parameter: Tensor) -> Tensor:
        """The live part of a parameter, flattened [n]."""
        return self._on(parameter.device).read(parameter.detach()).flatten()

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Put back what `read` returned."""
        live = self._on(parameter.device)
        live.write(parameter.detach(), values.view(live.read(parameter.detach()).shape))

    def put_on(self, parameter: Tensor, base: Tensor) -> None:
        """Change a parameter; `base` is what `read` returned before other changes were put on it, if any were."""
        now, after = self.read(parameter), self.after.to(parameter.device)
        self.write(parameter, torch.where(now == base, after, now - base + after))  # alone it is `after`, to the bit

    def _on(self, device: torch.device) -> Live:
        live = self.live
        return live if live.words.device == device else Live(live.kind, live.shape, live.cell, live.words.to(device))


@dataclass(frozen=True, eq=False)
class Change:
    """What one language has changed, by the name of the parameter."""

    language: str
    parts: dict[str, Part]

    @property
    def base(self) -> dict[str, str]:
        """The digest of each part before."""
        return {name: part.base for name, part in self.parts.items()}

    @cached_property
    def digest(self) -> str:
        """Identifies its content: two changes of one digest are the same, wherever they come from."""
        described = {
            name: [part.base, part.shape, digest_of(part.tensors, {})] for name, part in sorted(self.parts.items())
        }
        return hashlib.sha256(json.dumps([self.language, described]).encode()).hexdigest()


class _StoredPart(Record):
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=2)]
    base: str


class _StoredChange(Record):
    language: str
    parts: Annotated[dict[str, _StoredPart], Field(min_length=1)]


class _Content(Record):
    """What the header of a file says of its tensors, two for each parameter of each change."""

    changes: Annotated[list[_StoredChange], Field(min_length=1)]


class Delta:
    """What a language has learned: the live part of each parameter with a mask, as training left it.

        base = copy.deepcopy(model.state_dict())
        fm.freeze_unmasked(fm.attach(model, subnets, forward="full"))
        ...                                              # train
        fm.Delta.of(model, base, "de").save("de.safetensors")
        ...
        delta = fm.Delta.load("de.safetensors") + fm.Delta.load("ner.safetensors")
        delta.add(plain)                                 # the base model, attached or not
        delta.remove(plain)

    On the base alone the sum is what training left there, to the last bit, and what is removed leaves nothing
    behind. Where two deltas meet, their differences are added in order, each rounded. Adding up
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
        subnets, owner = attached(model).subnets, owner_of(model)
        if isinstance(beside, str):
            raise ValueError(f"expected beside as a sequence of language names, given the single name {beside!r}")
        own, others = subnets.index(language), [subnets.index(name) for name in beside]
        before = base if isinstance(base, Mapping) else _parameters(owner_of(base))
        skipped = ignore if isinstance(ignore, str) else tuple(ignore)
        compared = {name: p for name, p in _parameters(owner).items() if not name.startswith(skipped)}
        for name, new in compared.items():
            old = before.get(name)
            if old is None:
                raise ValueError(f"the base has no parameter {name!r} of this model (ignore={name!r} leaves it out)")
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
                was, now = (live.read(of).flatten().cpu() for of in (old, new))
                if not (was.isfinite().all() and now.isfinite().all()):
                    raise ValueError(f"{name!r} has no delta: it holds NaN or infinity")
                parts[name] = Part(live, tuple(new.shape), digest_of({"": was}, {}), now)
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
        return sum(tensor.nbytes for part in parts for tensor in (part.live.words, part.after))

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Change a model, attached or plain, in place.

        Raises:
            ValueError: a model of other parameters, or of other values than training began with; a delta that was added
                already; parameters that have changed since an earlier one was added. The model is then as it was.
        """
        model = owner_of(model)
        with _without(model) as changes:
            for change in self.changes:
                if any(other.digest == change.digest for other in changes):
                    raise ValueError(
                        f"the delta of {change.language!r} was added to this {type(model).__name__} already"
                    )
                for name, found in _digests(change, model).items():
                    if found != change.base[name]:
                        raise ValueError(
                            f"{name!r} is not what it was when the delta of {change.language!r} was taken: expected "
                            "the model that training began with, given another one (or one that was trained since)"
                        )
                changes.append(change)

    @torch.no_grad()
    def remove(self, model: nn.Module) -> None:
        """Take away what was added to this very model object; what was added since stays.

        Raises:
            ValueError: it was never added; parameters have changed since. The model is then as it was.
        """
        model, gone = owner_of(model), {change.digest: change for change in self.changes}
        with _without(model) as changes:
            on = {change.digest: change.language for change in changes}
            for digest, change in gone.items():
                if digest not in on:
                    raise ValueError(
                        f"the delta of {change.language!r} was never added to this {type(model).__name__} "
                        f"(added: {', '.join(map(repr, on.values())) or 'none'})"
                    )
            changes[:] = [change for change in changes if change.digest not in gone]

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
                    a, b = (f"{c.parts[name].after.dtype} {c.parts[name].shape}" for c in (mine, theirs))
                    if a != b:
                        raise ValueError(
                            f"cannot add deltas of two models: {name!r} is {a} in that of {mine.language!r}, and {b} "
                            f"in that of {theirs.language!r}"
                        )
        return Delta([*self.changes, *other.changes])

    def save(self, path: StrPath) -> None:
        """Write one safetensors file with a checksum; see `fastmask.files.replace_file`.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        tensors: dict[str, Tensor] = {}
        changes = []
        for number, change in enumerate(self.changes):
            for name, part in change.parts.items():
                tensors |= {f"{number}.{name}.{kind}": tensor for kind, tensor in part.tensors.items()}
            parts = {name: _StoredPart(shape=part.shape, base=part.base) for name, part in change.parts.items()}
            changes.append(_StoredChange(language=change.language, parts=parts))
        content = _Content(changes=changes).model_dump_json()
        write_sealed(path, tensors, {"format": FORMAT, "version": VERSION, CONTENT: content})

    @classmethod
    def load(cls, path: StrPath) -> Delta:
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
                    code, after = (tensors[f"{number}.{name}.{kind}"] for kind in ("live", "after"))
                    live = WHOLE if code.shape == (0,) else Live.decoded(code, stored.shape)
                except KeyError as error:
                    raise FileError(path, f"is damaged: it has no tensor {error}") from None
                except ValueError as error:
                    raise FileError(path, f"is damaged: {name}: {error}") from None
                parts[name] = Part(live, stored.shape, stored.base, after)
            changes.append(Change(change.language, parts))
        return cls(changes)

    def __repr__(self) -> str:
        described = [
            f"{change.language}: {sum(len(part.after) for part in change.parts.values()):,} of "
            f"{sum(torch.Size(part.shape).numel() for part in change.parts.values()):,} weights"
            for change in self.changes
        ]
        return f"Delta({' + '.join(described)})"


# ---- changes on a model


class _On(NamedTuple):
    """A change on a model: the live part of each parameter before all changes, and its digest after them."""

    change: Change
    base: dict[str, Tensor]
    left: dict[str, str]


# Beside the models, not on them: copies and pickles are models of their own, with nothing to take off.
_on: WeakKeyDictionary[nn.Module, list[_On]] = WeakKeyDictionary()


@contextmanager
def _without(model: nn.Module) -> Iterator[list[Change]]:
    """The base inside, and the changes that were on it; those in the list at the end are put on, if nothing failed.

    Raises:
        ValueError: somebody else has changed what they had left there. The model is as it was.
    """
    on = _on.get(model, [])
    found = [_digests(change, model) for change, _, _ in on]
    if found == [change.base for change, _, _ in on] != [left for _, _, left in on]:
        on = []  # the base was loaded again since
    for (change, _, left), now in zip(on, found, strict=False):
        for name in left:
            if now[name] != left[name]:
                raise ValueError(
                    f"{name!r} has changed since the delta of {change.language!r} was added, which would be lost: take "
                    "a new delta of it, or load the parameters that the delta left there"
                )
    parameters = _parameters(model)
    for change, base, _ in on:
        for name, part in change.parts.items():
            part.write(parameters[name], base[name].to(parameters[name].device))
    changes = [change for change, _, _ in on]
    try:
        yield (wanted := list(changes))
        changes = wanted
    finally:
        bases = [{name: part.read(parameters[name]) for name, part in change.parts.items()} for change in changes]
        for change, base in zip(changes, bases, strict=True):
            for name, part in change.parts.items():
                part.put_on(parameters[name], base[name])
        _on[model] = [_On(change, base, _digests(change, model)) for change, base in zip(changes, bases, strict=True)]


def _digests(change: Change, model: nn.Module) -> dict[str, str]:
    """Of the live part of each parameter of a model, which the change must fit."""
    parameters = _parameters_of(change, model)
    return {name: digest_of({"": part.read(parameters[name])}, {}) for name, part in change.parts.items()}


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
        if tuple(found.shape) != part.shape or found.dtype != part.after.dtype:
            raise ValueError(
                f"{name!r} is {found.dtype} {tuple(found.shape)} here, and {part.after.dtype} {part.shape} in the "
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
